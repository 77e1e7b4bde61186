"""The orders: their content as getOrder writes it, the operations with their status rules, settling, and the list.

The structures have upstream's fields in upstream's order; an UNSET field is left out.
"""

from __future__ import annotations

import asyncio
import base64
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from app.dev.sandbox.http import bad_request, no_order
from app.dev.sandbox.submission import Component, Line, Submission, code
from app.dev.sandbox.values import digits, event_timestamp, guid, utc
from app.dev.sandbox.webhooks import Payload, Webhooks
from app.dev.sandbox.world import Company, World

Status = Literal["Submitted", "Scheduled", "Processing", "Draft", "Issued", "Cancelled", "Error"]
IN_FLIGHT: tuple[Status, ...] = ("Submitted", "Scheduled", "Processing")
# Shares of the settling time after which the job queue schedules the order, processes it, and then settles it.
_STEPS: tuple[tuple[float, Status | None], ...] = ((0.3, "Scheduled"), (0.3, "Processing"), (0.4, None))

_MANIFESTS = "https://assets.npretail.app/manifest/"
_VAT = 1.25
_LINE_STEP = 100_000
_KINDS = {"PKG": "Package", "GRP": "Group ticket", "CPN": "Coupon"}

_HOST = "https://api.npretail.app"
_PAGE_LIMIT = 20_000
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_LISTED = (
    *("orderId", "partnerId", "sellToOrderReference", "buyFromOrderReference", "sellToEmail", "sellToName"),
    *("sellToLanguage", "paymentReference", "status", "statusMessage", "receivedAt", "jobId", "manifestUrl"),
)


class Asset(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A ticket or a coupon in a wallet."""

    id: str
    type: Literal["ticket", "coupon"]
    asset_id: str
    reference_number: str
    item_number: str
    description: str


class Wallet(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One guest's wallet; empty (no ids, no assets, price 0) until the order is issued."""

    seq_no: int
    wallet_id: str = "00000000-0000-0000-0000-000000000000"
    wallet_reference_number: str = ""
    external_reference_number: str
    name: str
    issued_at: str = ""
    unit_price_excl_vat: float = 0
    unit_price_incl_vat: float = 0
    currency_code: str = ""
    manifest_url: str | UnsetType = UNSET
    assets: tuple[Asset, ...] = ()


class Item(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One line of an order."""

    line_no: int
    item_number: str
    description: str
    is_package: bool
    quantity: int
    visit_date: str
    visit_time: str
    sell_to_name: str
    sell_to_email: str
    sell_to_language: str
    component_schedule: tuple[Component, ...] | UnsetType = UNSET
    wallets: tuple[Wallet, ...]


class Order(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The answer of getOrder."""

    order_id: str
    status: Status
    status_message: str = ""
    partner_id: str
    sell_to_order_reference: str
    buy_from_order_reference: str
    sell_to_email: str
    sell_to_name: str
    sell_to_language: str
    payment_reference: str
    received_at: str
    job_id: str = ""
    manifest_url: str | UnsetType = UNSET
    items: tuple[Item, ...]


class Row:
    """One order in the table: its company, its present content, and the fields that only the table has."""

    __slots__ = ("changes", "company", "order", "version")

    def __init__(self, company: Company, order: Order, version: int) -> None:
        self.company = company
        self.order = order
        #: The table's rowVersion, which grows with each change in any row.
        self.version = version
        #: How often this order was changed; each issuing makes new numbers of it.
        self.changes = 0

    def listed(self, with_version: bool) -> dict[str, Any]:
        """Return the row of the list: no items, and an empty manifestUrl is not left out."""
        order = msgspec.to_builtins(replace(self.order, items=()))
        row = {name: order.get(name, "") for name in _LISTED} | {"id": guid(self.order.order_id, "system")}
        return row | {"rowVersion": str(self.version)} if with_version else row


class Orders:
    """The orders of all companies."""

    def __init__(self, world: World, webhooks: Webhooks) -> None:
        self._world = world
        self._webhooks = webhooks
        #: By company id and order id.
        self._rows: dict[tuple[str, str], Row] = {}
        #: The latest order id by company id, partner and reference, also of a removed order.
        self._latest: dict[tuple[str, str, str], str] = {}
        self._settling: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, company: Company, order_id: str) -> Row:
        """Return an order; raises Refusal (404)."""
        row = self._rows.get((company.id, order_id))
        if row is None:
            raise no_order(order_id)
        return row

    def add(self, company: Company, submission: Submission, order_id: str = "") -> Row:
        """Add a new order as Submitted; nothing settles it yet. `order_id` replaces the made-up one.

        A reference is used once per partner, but an order in Error that has it is removed. Raises Refusal (400).
        """
        key = (company.id, submission.partner, submission.reference)
        latest = self._latest.get(key, "")
        if earlier := self._rows.get((company.id, latest)):
            if earlier.order.status != "Error":
                raise bad_request(f"An order with sellToOrderReference '{submission.reference}' already exists")
            self._remove(earlier)
        now, version = time.time(), next(self._world.versions)
        order = Order(
            order_id=order_id or guid(self._world.seed, *key, latest),
            status="Submitted",
            partner_id=submission.partner,
            sell_to_order_reference=submission.reference,
            buy_from_order_reference=f"CM-{time.strftime('%y%m%d%H%M%S', time.gmtime(now))}-{version % 65536:04X}",
            received_at=utc(now),
            **_content(submission),
        )
        row = self._rows[company.id, order.order_id] = Row(company, order, version)
        self._latest[key] = order.order_id
        return row

    def replace(self, company: Company, order_id: str, submission: Submission) -> Row:
        """Give a Draft or Error order new content and make it Submitted; its tickets are destroyed.

        Raises Refusal (404, 400).
        """
        row = self.get(company, order_id)
        if row.order.status not in ("Draft", "Error"):
            raise bad_request(f"Order cannot be replaced in status {row.order.status}")
        if (submission.partner, submission.reference) != (row.order.partner_id, row.order.sell_to_order_reference):
            raise bad_request("partnerId and sellToOrderReference cannot be changed via PUT")
        return self.set_status(row, "Submitted", **_content(submission))

    def settle(self, row: Row, inside_call: bool) -> None:
        """Let the order settle later, which is announced, or inside the call, as `?sync=1` does, without an event.

        Raises Refusal (400) where issuing inside the call fails.
        """
        if not inside_call:
            settling = asyncio.create_task(self._settle(row))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
        elif self.set_status(row, settled_status(row.order)).order.status == "Error":
            raise bad_request(row.order.status_message)

    def confirm(self, company: Company, order_id: str, payment_reference: str) -> Row:
        """Make a Draft Issued, without an event; an Issued order stays as it is. Raises Refusal (404, 400)."""
        row = self.get(company, order_id)
        if row.order.status == "Issued":
            return row
        if row.order.status != "Draft":
            raise bad_request(f"Order cannot be confirmed in status {row.order.status}")
        return self.set_status(row, "Issued", payment_reference=code(payment_reference, 50))

    def delete(self, company: Company, order_id: str) -> Row:
        """Cancel an order; a Draft or Error order is removed. Raises Refusal (404, 400)."""
        row = self.get(company, order_id)
        status = row.order.status
        if status in IN_FLIGHT:
            raise bad_request(f"Order is mid-flight (status {status}); retry once it has settled.")
        if status in ("Draft", "Error"):
            self._remove(row)
        return self.set_status(row, "Cancelled")

    def set_status(self, row: Row, status: Status, **content: Any) -> Row:
        """Put an order into a status, without an event, and return its row; `content` replaces fields before."""
        source = (self._world.seed, row.company.id, row.order.order_id, row.changes)
        row.order = in_status(replace(row.order, **content), status, source)
        row.version = next(self._world.versions)
        row.changes += 1
        return row

    def announce(self, row: Row, event: tuple[str, str] | None = None) -> int:
        """Send an event of an order and return the number of subscriptions that get it.

        `event` is its status and timestamp; None is the present ones. Cancelling fires no event, so a cancelled order
        is announced as Issued.
        """
        order = row.order
        status, timestamp = event or ("Issued" if order.status == "Cancelled" else order.status, event_timestamp())
        payload = Payload(order.order_id, order.buy_from_order_reference, status)
        return self._webhooks.announce(row.company, payload, timestamp)

    async def _settle(self, row: Row) -> None:
        """Take the order to its end as the job queue does, unless it is changed meanwhile, and announce it."""
        for share, status in _STEPS:
            changes = row.changes
            await asyncio.sleep(share * self._world.settings.settle_after)
            if row.changes != changes:
                return
            self.set_status(row, status or settled_status(row.order))
        self._world.counts.orders[row.company.id, row.order.order_id].settlements += 1
        self.announce(row)

    def _remove(self, row: Row) -> None:
        row.changes += 1
        del self._rows[row.company.id, row.order.order_id]


def page(rows: Iterable[Row], path: str, query: Mapping[str, str]) -> dict[str, Any]:
    """Return a page of `rows`, by time of receipt or, with `sync`, by rowVersion.

    `query` may have `sync`, `lastRowVersion`, `pageSize` and `pageKey`; raises Refusal (400). Read from AL (`NPR API
    Request`): the page key carries the order of the first call's rows, and `nextPageURL` names the public host.
    """
    sync, after = _BOOLEANS.get(query.get("sync", "false").lower()), None
    if sync is None:
        raise bad_request(f"The value '{query['sync']}' can't be evaluated into type Boolean.")
    if "pageKey" in query:
        sync, *after = _decoded(query["pageKey"])
    last = _integer(query, "lastRowVersion") if "sync" in query else 0
    size = _integer(query, "pageSize")
    size = size if 1 <= size <= _PAGE_LIMIT else _PAGE_LIMIT

    indexed = [
        ([row.version if sync else row.order.received_at, row.order.order_id], row)
        for row in rows
        if row.version > last
    ]
    found = sorted((index, row) for index, row in indexed if after is None or index > after)
    shown, more = found[:size], len(found) > size
    key = _encoded(sync, *shown[-1][0]) if more else ""
    return {
        "morePages": more,
        "nextPageKey": key,
        "nextPageURL": f"{_HOST}{path}?pageKey={key}" if more else "",
        "data": [row.listed(sync) for _, row in shown],
    }


def _integer(query: Mapping[str, str], name: str) -> int:
    try:
        return int(query.get(name, "0"))
    except ValueError:
        raise bad_request(f"The value '{query[name]}' can't be evaluated into type Integer.") from None


def _encoded(*key: Any) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def _decoded(text: str) -> tuple[bool, int | str, str]:
    """Return whether rows are in the order of their versions, and the index of the last row before the page."""
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return msgspec.json.decode(raw, type=tuple[bool, int | str, str])
    except ValueError:
        raise bad_request("The input is not a valid Base-64 string.") from None


def settled_status(order: Order) -> Status:
    """Return the end of settling: Error if an item asks for it, else Issued if the order is paid, else Draft."""
    if any(item.item_number.startswith("FAIL") for item in order.items):
        return "Error"
    return "Issued" if order.payment_reference else "Draft"


def in_status(order: Order, status: Status, source: tuple[object, ...]) -> Order:
    """Return the order in a status, settled or as the back office sets it; its numbers depend on `source`."""
    order, before = replace(order, status=status, status_message="", manifest_url=UNSET), order.status
    match status:
        case "Draft":
            return _filled(replace(order, payment_reference=""), source)
        case "Issued":
            # The tickets of a Draft stay; the manifests are made only now.
            order = order if before == "Draft" else _filled(order, source)
            items = tuple(
                replace(
                    item,
                    wallets=tuple(
                        replace(wallet, manifest_url=_manifest(source, item.line_no, wallet.seq_no))
                        for wallet in item.wallets
                    ),
                )
                for item in order.items
            )
            paid = order.payment_reference or "MANUALLY CONFIRMED"
            return replace(order, payment_reference=paid, manifest_url=_manifest(source), items=items)
        case "Cancelled":
            return replace(order, job_id="", items=())
    failures = (
        f"Item {item.item_number} has no capacity left on {item.visit_date}."
        for item in order.items
        if item.item_number.startswith("FAIL")
    )
    message = next(failures, "Failed.") if status == "Error" else ""
    # The step that fills the wallets has not run, or is rolled back.
    emptied = tuple(
        replace(
            item, wallets=tuple(_empty(one.seq_no, one.external_reference_number, one.name) for one in item.wallets)
        )
        for item in order.items
    )
    return replace(order, status_message=message, job_id="", items=emptied)


def _content(submission: Submission) -> dict[str, Any]:
    """Return the fields of an order that createOrder and replaceOrder set; raises Refusal (400)."""
    return {
        "sell_to_email": submission.sell_to_email,
        "sell_to_name": submission.sell_to_name,
        "sell_to_language": submission.sell_to_language,
        "payment_reference": submission.payment,
        "items": tuple(
            _item(submission, line, number * _LINE_STEP) for number, line in enumerate(submission.items, start=1)
        ),
    }


def _item(submission: Submission, line: Line, line_no: int) -> Item:
    number = code(line.item_number, 20)
    count = 1 if number.startswith("GRP") else line.quantity
    names, references = line.wallet.names, line.wallet.external_reference_numbers
    if any(len(given) not in (0, count) for given in (names, references)):
        raise bad_request(f"wallet arrays must have {count} entries (line {line_no})")
    wallets = zip(references or [""] * count, names or [""] * count, strict=True)
    return Item(
        line_no=line_no,
        item_number=number,
        description=f"{_KINDS.get(number[:3], 'Ticket')} {number}",
        is_package=number.startswith("PKG"),
        quantity=line.quantity,
        visit_date=line.visit_date,
        visit_time=line.visit_time,
        sell_to_name=submission.sell_to_name,
        sell_to_email=submission.sell_to_email,
        sell_to_language=submission.sell_to_language,
        component_schedule=tuple(line.wallet.component_schedule) or UNSET,
        wallets=tuple(_empty(seq, reference, name) for seq, (reference, name) in enumerate(wallets, start=1)),
    )


def _empty(seq_no: int, external_reference_number: str, name: str) -> Wallet:
    """Return the wallet of an order that is not issued: only what the partner sent."""
    return Wallet(seq_no=seq_no, external_reference_number=external_reference_number, name=name)


def _filled(order: Order, source: tuple[object, ...]) -> Order:
    """Return the order with tickets and coupons in its wallets, and the job that made them."""
    job_id = guid(*source, "job").replace("-", "").upper()
    items = (
        replace(item, wallets=tuple(_filled_wallet(item, one, source) for one in item.wallets)) for item in order.items
    )
    return replace(order, job_id=job_id, items=tuple(items))


def _filled_wallet(item: Item, wallet: Wallet, source: tuple[object, ...]) -> Wallet:
    price = float(50 + zlib.crc32(item.item_number.encode()) % 200)
    source = (*source, item.line_no, wallet.seq_no)
    assets = [item.item_number]
    if item.is_package:
        parts = [part.item_number for part in item.component_schedule or ()]
        assets = [*(parts or [f"{item.item_number}-1"]), "CPN-LUNCH"]
    return replace(
        wallet,
        wallet_id=guid(*source),
        wallet_reference_number="14" + digits(16, *source),
        name=wallet.name or item.description,
        issued_at=utc(time.time()),
        unit_price_excl_vat=price,
        unit_price_incl_vat=price * _VAT,
        currency_code="DKK",
        assets=tuple(_asset(number, *source, place) for place, number in enumerate(assets)),
    )


def _asset(item_number: str, *source: object) -> Asset:
    coupon = item_number.startswith("CPN")
    return Asset(
        id=guid(*source, "line"),
        type="coupon" if coupon else "ticket",
        asset_id=guid(*source, "asset"),
        reference_number=("CP-" if coupon else "TK-") + digits(12, *source),
        item_number=item_number,
        description=f"{'Coupon' if coupon else 'Ticket'} {item_number}",
    )


def _manifest(source: tuple[object, ...], *place: int) -> str:
    return _MANIFESTS + guid(*source, "manifest", *place)
