"""The counts of a run: calls, answers, settlements, events. Tests compare them with the receiver's own."""

from __future__ import annotations

from collections import Counter, defaultdict


class OrderCounts:
    """The counts of one order; they stay when the order is deleted."""

    __slots__ = ("accepted", "answered", "fired", "gets", "last_event", "settlements")

    def __init__(self) -> None:
        #: getOrder calls, and those of them answered 200 with a sound body.
        self.gets = 0
        self.answered = 0
        #: Settlements in the background; those inside a call send no event and do not count.
        self.settlements = 0
        #: Events for the webhook, duplicates included, and those that were answered 2xx.
        self.fired = 0
        self.accepted = 0
        #: Status and timestamp of the latest event.
        self.last_event: tuple[str, str] | None = None


class Counts:
    """All counts of a run."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Reset all counts."""
        #: Calls per operation by status, or `abandoned` when the caller disconnected.
        self.operations: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._orders: defaultdict[tuple[str, str], OrderCounts] = defaultdict(OrderCounts)
        self.throttled: Counter[str] = Counter()
        #: Deliveries by status, or by the name of the error.
        self.deliveries: Counter[str] = Counter()
        # The sums of the orders' counts: adding up 10,000 orders at each poll would slow the sandbox down.
        self.settlements = self.fired = self.accepted = 0
        self.lost = 0

    @property
    def orders(self) -> list[tuple[str, str]]:
        """Return company id and order id of each order that has counts."""
        return list(self._orders)

    def order(self, company_id: str, order_id: str) -> OrderCounts:
        """Return the counts of an order, which need not exist."""
        return self._orders[company_id, order_id]

    def settled(self, company_id: str, order_id: str) -> None:
        """Count a settlement in the background."""
        self.settlements += 1
        self.order(company_id, order_id).settlements += 1

    def event_fired(self, company_id: str, order_id: str) -> None:
        """Count an event for a webhook."""
        self.fired += 1
        self.order(company_id, order_id).fired += 1

    def event_accepted(self, company_id: str, order_id: str) -> None:
        """Count an event that was answered 2xx."""
        self.accepted += 1
        self.order(company_id, order_id).accepted += 1
