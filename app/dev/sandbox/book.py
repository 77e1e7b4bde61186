"""The order book of one company: the operations with their status rules, and settling in the background."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import msgspec
from msgspec.structs import replace

from app.dev.sandbox.company import Company
from app.dev.sandbox.issuing import Issuing, cancelled, unissued
from app.dev.sandbox.mint import guid, moment
from app.dev.sandbox.order import IN_FLIGHT, Item, Order, Status, Summary
from app.dev.sandbox.refusal import bad_request, no_order
from app.dev.sandbox.submission import Header

_ENCODER = msgspec.json.Encoder()
# Shares of the settling time at which the job queue claims the order and begins to issue it.
_SCHEDULED, _PROCESSING = 0.3, 0.6


class Row:
    """One order in the table: its present content, encoded once a change, and what the table knows beside it."""

    __slots__ = ("_encoded", "issued", "order", "received", "system_id", "turn", "version")

    def __init__(self, order: Order, received: float, system_id: str) -> None:
        self.order = order
        #: Unix time in whole milliseconds, as `receivedAt` shows it.
        self.received = round(received * 1000)
        self.system_id = system_id
        self.version = 0
        #: How often it was issued; numbers of a replaced order are new ones.
        self.issued = 0
        #: Counts what happened to it, so that a step of settling that comes too late can tell.
        self.turn = 0
        self._encoded: bytes | None = None

    def become(self, order: Order, version: int) -> None:
        """Take new content; `version` is the table's new rowVersion."""
        self.order, self.version, self._encoded = order, version, None
        self.turn += 1

    @property
    def encoded(self) -> bytes:
        """Return the answer of getOrder."""
        if self._encoded is None:
            self._encoded = _ENCODER.encode(self.order)
        return self._encoded

    def summary(self) -> Summary:
        """Return the row of a list."""
        order = self.order
        return Summary(
            order_id=order.order_id,
            partner_id=order.partner_id,
            sell_to_order_reference=order.sell_to_order_reference,
            buy_from_order_reference=order.buy_from_order_reference,
            sell_to_email=order.sell_to_email,
            sell_to_name=order.sell_to_name,
            sell_to_language=order.sell_to_language,
            payment_reference=order.payment_reference,
            status=order.status,
            status_message=order.status_message,
            received_at=order.received_at,
            job_id=order.job_id,
            manifest_url=order.manifest_url or "",
            id=self.system_id,
        )


class Book:
    """The orders of one company.

    `versions` counts for all companies, as SQL Server's rowversion does; `settled` is told of each order that has
    settled in the background.
    """

    def __init__(
        self,
        company: Callable[[], Company],
        seed: int,
        versions: Iterator[int],
        settle_after: Callable[[], float],
        settled: Callable[[Company, Order], None],
    ) -> None:
        self._company = company
        self._seed = seed
        self._versions = versions
        self._settle_after = settle_after
        self._settled = settled
        self._rows: dict[str, Row] = {}
        self._by_reference: dict[tuple[str, str], str] = {}
        self._by_partner: dict[str, dict[str, Row]] = {}
        self._used: dict[tuple[str, str], int] = {}
        self._number = 0

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def of_partner(self, partner_id: str) -> list[Row]:
        """Return a partner's orders in the order they came."""
        return list(self._by_partner.get(partner_id, {}).values())

    def get(self, order_id: str) -> Row:
        """Return an order; raises Refusal (404)."""
        row = self._rows.get(order_id)
        if row is None:
            raise no_order(order_id)
        return row

    def make_room(self, top: Header) -> None:
        """Raise Refusal (400) unless the reference is free; an order in Error that holds it gives it up."""
        known = self._company().partner_ids
        if known and top.partner_id not in known:
            raise bad_request(f"Unknown partnerId '{{{top.partner_id.upper()}}}'")
        holder = self._by_reference.get((top.partner_id, top.reference))
        if holder is None:
            return
        if self._rows[holder].order.status != "Error":
            raise bad_request(
                f"An order with sellToOrderReference '{top.reference}' already exists for partner '{top.partner_id}'"
            )
        self._remove(self._rows[holder])

    def place(self, top: Header, items: tuple[Item, ...], order_id: str | None = None) -> Row:
        """Enter a new order as Submitted; nothing settles it yet."""
        key = (top.partner_id, top.reference)
        generation = self._used[key] = self._used.get(key, 0) + 1
        made = guid(self._seed, self._company().id, *key, generation)
        # The table keeps milliseconds, and a filter on what receivedAt shows must find the row.
        now = int(time.time() * 1000) / 1000
        self._number += 1
        order = Order(
            order_id=order_id or made,
            status="Submitted",
            status_message="",
            partner_id=top.partner_id,
            sell_to_order_reference=top.reference,
            buy_from_order_reference=(
                f"CM-{time.strftime('%y%m%d%H%M%S', time.gmtime(now))}-{self._number % 65536:04X}"
            ),
            sell_to_email=top.email,
            sell_to_name=top.name,
            sell_to_language=top.language,
            payment_reference=top.payment,
            received_at=moment(now),
            job_id="",
            items=items,
        )
        row = Row(order, now, guid(made, "system"))
        row.become(order, next(self._versions))
        self._rows[order.order_id] = row
        self._by_reference[key] = order.order_id
        self._by_partner.setdefault(top.partner_id, {})[order.order_id] = row
        return row

    def resubmit(self, row: Row, top: Header, items: tuple[Item, ...]) -> None:
        """Give a Draft or Error order new content and make it Submitted; what was issued is destroyed."""
        renewed = replace(
            unissued(row.order, "Submitted"),
            sell_to_email=top.email,
            sell_to_name=top.name,
            sell_to_language=top.language,
            payment_reference=top.payment,
            items=items,
        )
        row.become(renewed, next(self._versions))

    def replaceable(self, order_id: str) -> Row:
        """Return an order that may be replaced; raises Refusal (404, 400)."""
        row = self.get(order_id)
        if row.order.status not in ("Draft", "Error"):
            raise bad_request(f"Order cannot be replaced in status {row.order.status}")
        return row

    def settle_later(self, row: Row) -> None:
        """Let the job queue take the order through Scheduled and Processing to its end, which is announced."""
        after = self._settle_after()
        self._at(row, after * _SCHEDULED, lambda: self._step(row, "Scheduled", after))

    def settle_now(self, row: Row) -> None:
        """Issue inside the call, as `?sync=1` does: not announced; raises Refusal (400) where issuing fails."""
        self.force(row, None)
        if row.order.status == "Error":
            raise bad_request(row.order.status_message)

    def confirm(self, row: Row, payment_reference: str) -> None:
        """Take a Draft to Issued; nobody is told."""
        paid = replace(row.order, payment_reference=payment_reference[:50].strip().upper())
        row.become(self._issuing(row).confirmed(paid), next(self._versions))

    def delete(self, order_id: str) -> Order:
        """Cancel an order: Draft and Error leave no trace; raises Refusal (404, 400)."""
        row = self.get(order_id)
        status = row.order.status
        if status in IN_FLIGHT:
            raise bad_request(f"Order is mid-flight (status {status}); retry once it has settled.")
        row.become(cancelled(row.order), next(self._versions))
        if status in ("Draft", "Error"):
            self._remove(row)
        return row.order

    def force(self, row: Row, status: Status | None) -> None:
        """Put an order into a status (None: where its content takes it); nobody is told."""
        row.issued += 1
        issuing = self._issuing(row)
        order = issuing.outcome(row.order) if status is None else issuing.to(row.order, status)
        row.become(order, next(self._versions))

    def _step(self, row: Row, status: Status, after: float) -> None:
        row.become(replace(row.order, status=status), next(self._versions))
        if status == "Scheduled":
            wait = after * (_PROCESSING - _SCHEDULED)
            self._at(row, wait, lambda: self._step(row, "Processing", after))
        elif not any(item.item_number.startswith("STUCK") for item in row.order.items):
            self._at(row, after * (1 - _PROCESSING), lambda: self._end(row))

    def _end(self, row: Row) -> None:
        self.force(row, None)
        self._settled(self._company(), row.order)

    def _at(self, row: Row, seconds: float, step: Callable[[], None]) -> None:
        turn = row.turn
        asyncio.get_running_loop().call_later(seconds, lambda: step() if row.turn == turn else None)

    def _issuing(self, row: Row) -> Issuing:
        source = (self._seed, self._company().id, row.order.order_id, row.issued)
        return Issuing(source, time.time(), self._company().manifest)

    def _remove(self, row: Row) -> None:
        row.turn += 1
        order = row.order
        del self._rows[order.order_id]
        del self._by_partner[order.partner_id][order.order_id]
        self._by_reference.pop((order.partner_id, order.sell_to_order_reference), None)
