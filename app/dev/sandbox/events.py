"""The event as Business Central posts it, and the three wrappers it is documented to come in.

What was asked, answered, settled and sent: what a test compares with the receiver's own account.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator

import msgspec

from app.dev.sandbox.settings import Shape

EVENT_NAME = "ota_cm_order_processed"
EVENT_VERSION = "1.0"
#: The NP Retail app, which the event belongs to.
APP_ID = "992c2309-cca4-43cb-9e41-911f482ec088"

_ENCODER = msgspec.json.Encoder()


class Payload(msgspec.Struct, frozen=True, rename="camel"):
    """What travels: not more than these three."""

    order_id: str
    buy_from_order_reference: str
    status: str


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One element of a delivery."""

    app_id: str = APP_ID
    client_state: str
    company_id: str
    company_name: str
    event_name: str = EVENT_NAME
    event_version: str = EVENT_VERSION
    initiating_user_aad_object_id: str = msgspec.field(name="initiatingUserAADObjectId")
    payload: Payload
    timestamp: str


def wrapped(events: tuple[Event, ...], shape: Shape) -> bytes:
    """Return the body of a POST; "bare" carries one event and no wrapper."""
    return _ENCODER.encode(events[0] if shape == "bare" else {shape: events})


_DELIVERIES_KEPT = 20_000


class OrderTally:
    """The counts of one order; they stay when the order is deleted."""

    __slots__ = ("accepted", "answered", "fired", "gets", "last", "settlements")

    def __init__(self) -> None:
        #: getOrder calls that arrived, and those of them answered 200 with a sound body.
        self.gets = 0
        self.answered = 0
        #: Unix times at which it settled in the background (inside a call does not count: nobody is told).
        self.settlements: list[float] = []
        #: Events handed to the webhook, copies included, and those inside a POST that was answered 2xx.
        self.fired = 0
        self.accepted = 0
        #: The payload and the timestamp of the latest announcement.
        self.last: tuple[Payload, str] | None = None


class Delivery(msgspec.Struct, frozen=True):
    """One POST to a webhook: `code` is None when no answer came, `error` then says why."""

    number: int
    subscription_id: str
    url: str
    at: float
    seconds: float
    attempt: int
    code: int | None
    error: str | None
    events: list[tuple[str, str, str]]


class Tally:
    """All counts of a run."""

    def __init__(self) -> None:
        self._number = 0
        self.clear()

    def clear(self) -> None:
        """Start anew; deliveries go on being numbered from where they were."""
        self.operations: dict[str, Counter[str]] = {}
        self.orders: dict[tuple[str, str], OrderTally] = {}
        self.codes: Counter[str] = Counter()
        #: What the orders' own counts add up to, since adding up 10,000 each time somebody polls would slow us down.
        self.settled = self.fired = self.accepted = 0
        self.lost = 0
        self.throttled: Counter[str] = Counter()
        self._deliveries: deque[Delivery] = deque(maxlen=_DELIVERIES_KEPT)

    def call(self, operation: str, result: int | str) -> None:
        """Count a call with its status, or `abandoned` when the caller hung up."""
        counts = self.operations.get(operation)
        if counts is None:
            counts = self.operations[operation] = Counter()
        counts[str(result)] += 1

    def order(self, company_id: str, order_id: str) -> OrderTally:
        """Return the counts of an order, whether there is such an order or not."""
        key = (company_id, order_id)
        found = self.orders.get(key)
        if found is None:
            found = self.orders[key] = OrderTally()
        return found

    def settlement(self, company_id: str, order_id: str) -> None:
        """Note that an order has settled in the background."""
        self.settled += 1
        self.order(company_id, order_id).settlements.append(time.time())

    def event(self, event: Event) -> None:
        """Note that an event was handed to a webhook."""
        self.fired += 1
        self.order(event.company_id, event.payload.order_id).fired += 1

    def delivery(
        self,
        subscription_id: str,
        url: str,
        began: float,
        seconds: float,
        attempt: int,
        answer: int | str,
        events: tuple[Event, ...],
    ) -> None:
        """Record a POST; `answer` is the status code, or what prevented one."""
        self._number += 1
        code = answer if isinstance(answer, int) else None
        self.codes[str(answer)] += 1
        self._deliveries.append(
            Delivery(
                self._number,
                subscription_id,
                url,
                began,
                seconds,
                attempt,
                code,
                None if isinstance(answer, int) else answer,
                [(one.payload.order_id, one.payload.status, one.timestamp) for one in events],
            )
        )
        if code is not None and 200 <= code < 300:
            self.accepted += len(events)
            for one in events:
                self.order(one.company_id, one.payload.order_id).accepted += 1

    def deliveries(self, since: int) -> Iterator[Delivery]:
        """Return the recorded POSTs with a number above `since`, oldest first."""
        return (one for one in self._deliveries if one.number > since)
