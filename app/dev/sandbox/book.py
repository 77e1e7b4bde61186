"""The order book of one company: the operations with their status rules, and settling in the background.

listOrdersByPartner: filters, order and pages, as NaviPartner's shared paging code does them.

Read from AL (`NPR API Request`): the page key carries the view of the first call, so the filters of later calls do
not count; `nextPageURL` names the public host and is glued together without encoding.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from urllib.parse import parse_qsl

import msgspec
from msgspec.structs import replace

from app.dev.sandbox.company import Company
from app.dev.sandbox.http import bad_request, no_order
from app.dev.sandbox.orders import IN_FLIGHT, Issuing, Item, Order, Status, Summary, cancelled, unissued
from app.dev.sandbox.settings import guid, moment
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


_HOST = "https://api.npretail.app"
_PAGE_LIMIT = 20_000
_STATUSES = {"Submitted", "Scheduled", "Processing", "Draft", "Issued", "Cancelled", "Error"}
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What a list shows; times are Unix milliseconds."""

    partner_id: str
    statuses: tuple[str, ...] = ()
    reference: str | None = None
    received_from: float | None = None
    received_to: float | None = None
    by_row_version: bool = False


class PageKey(msgspec.Struct, frozen=True):
    """Where the next page begins: after the row with these index fields."""

    view: View
    after: tuple[int, str]


class Page(msgspec.Struct, frozen=True, rename="camel"):
    """One page."""

    more_pages: bool
    next_page_key: str
    next_page_url: str = msgspec.field(name="nextPageURL")
    data: list[Summary]


def page(rows: Iterable[Row], partner_id: str, path: str, query: bytes) -> Page:
    """Return the page that `query` asks for of a partner's `rows`; raises Refusal (400)."""
    given = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    view, after = _view(given, partner_id), None
    if "pageKey" in given:
        key = _page_key(given["pageKey"])
        view, after = key.view, key.after
    last = _integer(given, "lastRowVersion") if "sync" in given and "lastRowVersion" in given else None
    size = _integer(given, "pageSize") if "pageSize" in given else 0
    size = size if 1 <= size <= _PAGE_LIMIT else _PAGE_LIMIT

    found = sorted(
        (_index(view, row), row)
        for row in rows
        if _shows(view, row) and (last is None or row.version > last) and (after is None or _index(view, row) > after)
    )
    shown = found[:size]
    more = len(found) > size
    key_text = _encoded(PageKey(view, shown[-1][0])) if more else ""
    return Page(more, key_text, _url(path, given, key_text), [_summary(view, row) for _, row in shown])


def _view(given: dict[str, str], partner_id: str) -> View:
    statuses = tuple(name for name in given.get("status", "").split(",") if name)
    unknown = [name for name in statuses if name not in _STATUSES]
    if unknown:
        raise bad_request(f"The filter '{unknown[0]}' is not valid for the Status field.")
    sync = given.get("sync", "false").lower()
    if sync not in _BOOLEANS:
        raise bad_request(f"The value '{sync}' can't be evaluated into type Boolean.")
    return View(
        partner_id=partner_id,
        statuses=statuses,
        reference=given["sellToOrderReference"].upper() if "sellToOrderReference" in given else None,
        received_from=_moment(given, "receivedAtFrom"),
        received_to=_moment(given, "receivedAtTo"),
        by_row_version=_BOOLEANS[sync],
    )


def _shows(view: View, row: Row) -> bool:
    order = row.order
    return (
        order.partner_id == view.partner_id
        and (not view.statuses or order.status in view.statuses)
        and (view.reference is None or order.sell_to_order_reference == view.reference)
        and (view.received_from is None or row.received >= view.received_from)
        and (view.received_to is None or row.received <= view.received_to)
    )


def _index(view: View, row: Row) -> tuple[int, str]:
    return (row.version if view.by_row_version else row.received), row.order.order_id


def _summary(view: View, row: Row) -> Summary:
    return replace(row.summary(), row_version=str(row.version)) if view.by_row_version else row.summary()


def _integer(given: dict[str, str], name: str) -> int:
    try:
        return int(given[name])
    except ValueError:
        raise bad_request(f"The value '{given[name]}' can't be evaluated into type Integer.") from None


def _moment(given: dict[str, str], name: str) -> float | None:
    if name not in given:
        return None
    try:
        value = datetime.fromisoformat(given[name])
    except ValueError:
        raise bad_request(f"{name} must be ISO 8601 datetime") from None
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp() * 1000


def _encoded(key: PageKey) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def _page_key(text: str) -> PageKey:
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return msgspec.json.decode(raw, type=PageKey)
    except ValueError:
        raise bad_request("The input is not a valid Base-64 string.") from None


def _url(path: str, given: dict[str, str], page_key: str) -> str:
    if not page_key:
        return ""
    kept = [f"{name}={value}" for name, value in given.items() if name != "pageKey"]
    return f"{_HOST}{path}?{'&'.join([*kept, f'pageKey={page_key}'])}"
