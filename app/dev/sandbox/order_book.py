"""The orders of one company: the operations with their status rules, settling in the background, and the list.

The list is read from AL (`NPR API Request`): the page key carries the order of the first call's rows, and
`nextPageURL` names the public host.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import parse_qsl

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from app.dev.sandbox.http import bad_request, no_order
from app.dev.sandbox.orders import IN_FLIGHT, Issuing, Order, Status, Summary, cancelled, unissued
from app.dev.sandbox.settings import Settings
from app.dev.sandbox.submission import Submission
from app.dev.sandbox.values import guid, utc

_ENCODER = msgspec.json.Encoder()
# Shares of the settling time after which the job queue schedules the order and then issues it.
_SCHEDULED, _PROCESSING = 0.3, 0.6

_HOST = "https://api.npretail.app"
_PAGE_LIMIT = 20_000
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Row:
    """One order in the table: its present content, encoded once per change, and the fields of the table."""

    __slots__ = ("_encoded", "changes", "issued", "order", "received", "system_id", "version")

    def __init__(self, order: Order, received: float, system_id: str, version: int) -> None:
        self.order = order
        #: Unix time in whole milliseconds, as `receivedAt` shows it.
        self.received = round(received * 1000)
        self.system_id = system_id
        #: The table's rowVersion, which grows with each change in any row.
        self.version = version
        #: How often it was issued; a replaced order gets new numbers.
        self.issued = 0
        #: Lets a step of settling see that the order was changed meanwhile.
        self.changes = 0
        self._encoded: bytes | None = None

    def change(self, order: Order, version: int) -> None:
        """Take new content."""
        self.order, self.version, self._encoded = order, version, None
        self.changes += 1

    @property
    def encoded(self) -> bytes:
        """Return the answer of getOrder."""
        if self._encoded is None:
            self._encoded = _ENCODER.encode(self.order)
        return self._encoded

    def summary(self, with_version: bool) -> Summary:
        """Return the row of the list."""
        order = msgspec.structs.asdict(self.order)
        fields = {name: order[name] for name in Summary.__struct_fields__ if name in order}
        fields["manifest_url"] = self.order.manifest_url or ""
        return Summary(**fields, id=self.system_id, row_version=str(self.version) if with_version else UNSET)


class PageKey(msgspec.Struct, frozen=True):
    """Where the next page starts: after the row with these index fields."""

    sync: bool
    after: tuple[int, str]


class Page(msgspec.Struct, frozen=True, rename="camel"):
    """One page of listOrdersByPartner."""

    more_pages: bool
    next_page_key: str
    next_page_url: str = msgspec.field(name="nextPageURL")
    data: list[Summary]


class OrderBook:
    """The orders of one company.

    `versions` is shared by all companies, as SQL Server's rowversion is. `settled` is called with each order that has
    settled in the background.
    """

    def __init__(
        self,
        company_id: str,
        seed: int,
        settings: Settings,
        versions: Iterator[int],
        settled: Callable[[Order], None],
    ) -> None:
        self._source = (seed, company_id)
        self._settings = settings
        self._versions = versions
        self._settled = settled
        self._rows: dict[str, Row] = {}
        self._by_reference: dict[tuple[str, str], str] = {}
        self._submissions: dict[tuple[str, str], int] = {}
        self._number = 0

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, order_id: str) -> Row:
        """Return an order; raises Refusal (404)."""
        row = self._rows.get(order_id)
        if row is None:
            raise no_order(order_id)
        return row

    def add(self, submission: Submission, order_id: str | None = None) -> Row:
        """Add a new order as Submitted; nothing settles it yet.

        A reference is used once per partner, but an order in Error that has it is removed. Raises Refusal (400).
        """
        key = (submission.partner, submission.reference)
        if key in self._by_reference:
            earlier = self._rows[self._by_reference[key]]
            if earlier.order.status != "Error":
                raise bad_request(f"An order with sellToOrderReference '{submission.reference}' already exists")
            self._remove(earlier)
        repeat = self._submissions[key] = self._submissions.get(key, 0) + 1
        made = guid(*self._source, *key, repeat)
        # In whole milliseconds, as the table keeps it.
        now = int(time.time() * 1000) / 1000
        self._number += 1
        order = Order(
            order_id=order_id or made,
            status="Submitted",
            status_message="",
            partner_id=submission.partner,
            sell_to_order_reference=submission.reference,
            buy_from_order_reference=(
                f"CM-{time.strftime('%y%m%d%H%M%S', time.gmtime(now))}-{self._number % 65536:04X}"
            ),
            sell_to_email=submission.sell_to_email,
            sell_to_name=submission.sell_to_name,
            sell_to_language=submission.sell_to_language,
            payment_reference=submission.payment,
            received_at=utc(now),
            job_id="",
            items=submission.lines(),
        )
        row = Row(order, now, guid(made, "system"), next(self._versions))
        self._rows[order.order_id] = row
        self._by_reference[key] = order.order_id
        return row

    def replace(self, order_id: str, submission: Submission) -> Row:
        """Give a Draft or Error order new content and make it Submitted; its tickets are destroyed.

        Raises Refusal (404, 400).
        """
        row = self.get(order_id)
        if row.order.status not in ("Draft", "Error"):
            raise bad_request(f"Order cannot be replaced in status {row.order.status}")
        if (submission.partner, submission.reference) != (row.order.partner_id, row.order.sell_to_order_reference):
            raise bad_request("partnerId and sellToOrderReference cannot be changed via PUT")
        renewed = replace(
            unissued(row.order, "Submitted"),
            sell_to_email=submission.sell_to_email,
            sell_to_name=submission.sell_to_name,
            sell_to_language=submission.sell_to_language,
            payment_reference=submission.payment,
            items=submission.lines(),
        )
        row.change(renewed, next(self._versions))
        return row

    def settle_later(self, row: Row) -> None:
        """Let the job queue take the order through Scheduled and Processing to its end, which is announced."""
        after = self._settings.settle_after
        self._after(after * _SCHEDULED, row, lambda: self._step(row, "Scheduled", after))

    def settle_now(self, row: Row) -> None:
        """Issue inside the call, as `?sync=1` does: no event; raises Refusal (400) where issuing fails."""
        self.set_status(row, None)
        if row.order.status == "Error":
            raise bad_request(row.order.status_message)

    def confirm(self, order_id: str, payment_reference: str) -> Row:
        """Make a Draft Issued, without an event; an Issued order stays as it is. Raises Refusal (404, 400)."""
        row = self.get(order_id)
        if row.order.status == "Issued":
            return row
        if row.order.status != "Draft":
            raise bad_request(f"Order cannot be confirmed in status {row.order.status}")
        paid = replace(row.order, payment_reference=payment_reference[:50].strip().upper())
        row.change(self._issuing(row).confirmed(paid), next(self._versions))
        return row

    def delete(self, order_id: str) -> Order:
        """Cancel an order; a Draft or Error order is removed. Raises Refusal (404, 400)."""
        row = self.get(order_id)
        status = row.order.status
        if status in IN_FLIGHT:
            raise bad_request(f"Order is mid-flight (status {status}); retry once it has settled.")
        row.change(cancelled(row.order), next(self._versions))
        if status in ("Draft", "Error"):
            self._remove(row)
        return row.order

    def set_status(self, row: Row, status: Status | None) -> None:
        """Put an order into a status (None: the one its content leads to), without an event."""
        row.issued += 1
        issuing = self._issuing(row)
        order = issuing.outcome(row.order) if status is None else issuing.to(row.order, status)
        row.change(order, next(self._versions))

    def _step(self, row: Row, status: Status, after: float) -> None:
        row.change(replace(row.order, status=status), next(self._versions))
        if status == "Scheduled":
            self._after(after * (_PROCESSING - _SCHEDULED), row, lambda: self._step(row, "Processing", after))
        else:
            self._after(after * (1 - _PROCESSING), row, lambda: self._settle(row))

    def _settle(self, row: Row) -> None:
        self.set_status(row, None)
        self._settled(row.order)

    def _after(self, seconds: float, row: Row, step: Callable[[], None]) -> None:
        changes = row.changes
        asyncio.get_running_loop().call_later(seconds, lambda: step() if row.changes == changes else None)

    def _issuing(self, row: Row) -> Issuing:
        return Issuing((*self._source, row.order.order_id, row.issued), time.time())

    def _remove(self, row: Row) -> None:
        row.changes += 1
        order = row.order
        del self._rows[order.order_id]
        self._by_reference.pop((order.partner_id, order.sell_to_order_reference), None)


def page(rows: Iterable[Row], partner_id: str, path: str, query: bytes) -> Page:
    """Return a page of a partner's orders, by time of receipt or, with `sync`, by rowVersion.

    `query` may have `sync`, `lastRowVersion`, `pageSize` and `pageKey`; raises Refusal (400).
    """
    given = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    sync, after = _BOOLEANS.get(given.get("sync", "false").lower()), None
    if sync is None:
        raise bad_request(f"The value '{given['sync']}' can't be evaluated into type Boolean.")
    if "pageKey" in given:
        key = _decoded(given["pageKey"])
        sync, after = key.sync, key.after
    last = _integer(given, "lastRowVersion") if "sync" in given else 0
    size = _integer(given, "pageSize")
    size = size if 1 <= size <= _PAGE_LIMIT else _PAGE_LIMIT

    indexed = [
        ((row.version if sync else row.received, row.order.order_id), row)
        for row in rows
        if row.order.partner_id == partner_id and row.version > last
    ]
    found = sorted((index, row) for index, row in indexed if after is None or index > after)
    shown, more = found[:size], len(found) > size
    key_text = _encoded(PageKey(sync, shown[-1][0])) if more else ""
    url = f"{_HOST}{path}?pageKey={key_text}" if more else ""
    return Page(more, key_text, url, [row.summary(sync) for _, row in shown])


def _integer(given: dict[str, str], name: str) -> int:
    try:
        return int(given.get(name, "0"))
    except ValueError:
        raise bad_request(f"The value '{given[name]}' can't be evaluated into type Integer.") from None


def _encoded(key: PageKey) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def _decoded(text: str) -> PageKey:
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return msgspec.json.decode(raw, type=PageKey)
    except ValueError:
        raise bad_request("The input is not a valid Base-64 string.") from None
