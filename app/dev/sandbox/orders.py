"""The orders: getOrder's answer, the operations with their status rules, settling, and the list.

Answers have upstream's fields in upstream's order.
"""

from __future__ import annotations

import asyncio
import base64
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from app.dev.sandbox.http import bad_request, no_order
from app.dev.sandbox.submission import Line, Submission, code
from app.dev.sandbox.values import digits, event_timestamp, guid, utc
from app.dev.sandbox.webhooks import Payload, Webhooks
from app.dev.sandbox.world import Company, World

Status = Literal["Submitted", "Scheduled", "Processing", "Draft", "Issued", "Cancelled", "Error"]
IN_FLIGHT: tuple[Status, ...] = ("Submitted", "Scheduled", "Processing")
# Shares of the settling time after which the job queue schedules the order, processes it, and then settles it.
_STEPS: tuple[tuple[float, Status | None], ...] = ((0.3, "Scheduled"), (0.3, "Processing"), (0.4, None))

_NO_WALLET = "00000000-0000-0000-0000-000000000000"
_MANIFESTS = "https://assets.npretail.app/manifest/"
_VAT = 1.25
_LINE_STEP = 100_000

_HOST = "https://api.npretail.app"
_PAGE_LIMIT = 20_000
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_LISTED = (
    *("orderId", "partnerId", "sellToOrderReference", "buyFromOrderReference", "sellToEmail", "sellToName"),
    *("sellToLanguage", "paymentReference", "status", "statusMessage", "receivedAt", "jobId", "manifestUrl"),
)


@dataclass(eq=False)
class Row:
    """One order in the table."""

    company: Company
    order_id: str
    #: What the partner sent; the payment reference changes with the status.
    submission: Submission
    #: Business Central's own number.
    buy_from_order_reference: str
    received_at: str
    #: The table's rowVersion, which grows with each change in any row.
    version: int
    status: Status = "Submitted"
    issued_at: str = ""
    #: What the numbers of the present tickets and manifests depend on; empty while there are none.
    tickets: tuple[object, ...] = ()
    manifests: tuple[object, ...] = ()
    #: How often this order was changed; each issuing makes new numbers of it.
    changes: int = 0

    @property
    def settled_status(self) -> Status:
        """Return the end of settling: Error if an item asks for it, else Issued if the order is paid, else Draft."""
        if self.submission.failing:
            return "Error"
        return "Issued" if self.submission.payment_reference else "Draft"

    @property
    def status_message(self) -> str:
        """Return why issuing failed."""
        if self.status != "Error":
            return ""
        line = self.submission.failing
        return f"Item {line.item_number} has no capacity left on {line.visit_date}." if line else "Failed."

    def answer(self) -> dict[str, Any]:
        """Return the answer of getOrder; a cancelled order has no items."""
        lines = [] if self.status == "Cancelled" else self.submission.items
        items = [self._item(line, number * _LINE_STEP) for number, line in enumerate(lines, start=1)]
        return {**self._head(), "items": items}

    def listed(self, with_version: bool) -> dict[str, Any]:
        """Return the row of the list: no items, and an empty manifestUrl is not left out."""
        head = self._head()
        row = {name: head.get(name, "") for name in _LISTED} | {"id": guid(self.order_id, "system")}
        return row | {"rowVersion": str(self.version)} if with_version else row

    def _head(self) -> dict[str, Any]:
        sent = self.submission
        return {
            "orderId": self.order_id,
            "status": self.status,
            "statusMessage": self.status_message,
            "partnerId": sent.partner_id,
            "sellToOrderReference": sent.sell_to_order_reference,
            "buyFromOrderReference": self.buy_from_order_reference,
            "sellToEmail": sent.sell_to_email,
            "sellToName": sent.sell_to_name,
            "sellToLanguage": sent.sell_to_language,
            "paymentReference": sent.payment_reference,
            "receivedAt": self.received_at,
            "jobId": guid(*self.tickets, "job").replace("-", "").upper() if self.tickets else "",
            **self._manifest(),
        }

    def _item(self, line: Line, line_no: int) -> dict[str, Any]:
        sent, components = self.submission, line.wallet.component_schedule
        return {
            "lineNo": line_no,
            "itemNumber": line.item_number,
            "description": line.description,
            "isPackage": line.item_number.startswith("PKG"),
            "quantity": line.quantity,
            "visitDate": line.visit_date,
            "visitTime": line.visit_time,
            "sellToName": sent.sell_to_name,
            "sellToEmail": sent.sell_to_email,
            "sellToLanguage": sent.sell_to_language,
            **({"componentSchedule": components} if components else {}),
            "wallets": [self._wallet(line, line_no, seq) for seq in range(1, line.wallets + 1)],
        }

    def _wallet(self, line: Line, line_no: int, seq: int) -> dict[str, Any]:
        """Return one guest's wallet; before the order has tickets it has only what the partner sent."""
        names, references = line.wallet.names, line.wallet.external_reference_numbers
        name, issued, place = names[seq - 1] if names else "", bool(self.tickets), (*self.tickets, line_no, seq)
        price = float(50 + zlib.crc32(line.item_number.encode()) % 200) if issued else 0.0
        return {
            "seqNo": seq,
            "walletId": guid(*place) if issued else _NO_WALLET,
            "walletReferenceNumber": "14" + digits(16, *place) if issued else "",
            "externalReferenceNumber": references[seq - 1] if references else "",
            "name": name or (line.description if issued else ""),
            "issuedAt": self.issued_at if issued else "",
            "unitPriceExclVat": price,
            "unitPriceInclVat": price * _VAT,
            "currencyCode": "DKK" if issued else "",
            **self._manifest(line_no, seq),
            "assets": [_asset(number, *place, index) for index, number in enumerate(line.assets)] if issued else [],
        }

    def _manifest(self, *place: int) -> dict[str, Any]:
        return {"manifestUrl": _MANIFESTS + guid(*self.manifests, "manifest", *place)} if self.manifests else {}


class Orders:
    """The orders of all companies."""

    def __init__(self, world: World, webhooks: Webhooks) -> None:
        self._world = world
        self._webhooks = webhooks
        #: By company id and order id.
        self.rows: dict[tuple[str, str], Row] = {}
        #: The latest order id by company id, partner and reference, also of a removed order.
        self._latest: dict[tuple[str, str, str], str] = {}
        self._settling: set[asyncio.Task[None]] = set()

    def get(self, company: Company, order_id: str) -> Row:
        """Return an order; raises Refusal (404)."""
        row = self.rows.get((company.id, order_id))
        if row is None:
            raise no_order(order_id)
        return row

    def add(self, company: Company, submission: Submission, order_id: str = "") -> Row:
        """Add a new order as Submitted; nothing settles it yet. `order_id` replaces the made-up one.

        A reference is used once per partner, but an order in Error that has it is removed. Raises Refusal (400).
        """
        key = (company.id, *submission.identity)
        latest = self._latest.get(key, "")
        if earlier := self.rows.get((company.id, latest)):
            if earlier.status != "Error":
                raise bad_request(f"An order with sellToOrderReference '{key[-1]}' already exists")
            self._remove(earlier)
        now, version = time.time(), next(self._world.versions)
        order_id = order_id or guid(self._world.seed, *key, latest)
        reference = f"CM-{time.strftime('%y%m%d%H%M%S', time.gmtime(now))}-{version % 65536:04X}"
        row = self.rows[company.id, order_id] = Row(company, order_id, submission, reference, utc(now), version)
        self._latest[key] = order_id
        return row

    def replace(self, company: Company, order_id: str, submission: Submission) -> Row:
        """Give a Draft or Error order new content and make it Submitted; its tickets are destroyed.

        Raises Refusal (404, 400).
        """
        row = self.get(company, order_id)
        if row.status not in ("Draft", "Error"):
            raise bad_request(f"Order cannot be replaced in status {row.status}")
        if submission.identity != row.submission.identity:
            raise bad_request("partnerId and sellToOrderReference cannot be changed via PUT")
        row.submission = submission
        return self.set_status(row, "Submitted")

    def settle(self, row: Row, inside_call: bool) -> None:
        """Let the order settle later, which is announced, or inside the call, as `?sync=1` does, without an event.

        Raises Refusal (400) where issuing inside the call fails.
        """
        if not inside_call:
            settling = asyncio.create_task(self._settle(row))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
        elif self.set_status(row, row.settled_status).status == "Error":
            raise bad_request(row.status_message)

    def confirm(self, company: Company, order_id: str, payment_reference: str) -> Row:
        """Make a Draft Issued, without an event; an Issued order stays as it is. Raises Refusal (404, 400)."""
        row = self.get(company, order_id)
        if row.status == "Issued":
            return row
        if row.status != "Draft":
            raise bad_request(f"Order cannot be confirmed in status {row.status}")
        row.submission.payment_reference = code(payment_reference, 50)
        return self.set_status(row, "Issued")

    def delete(self, company: Company, order_id: str) -> Row:
        """Cancel an order; a Draft or Error order is removed. Raises Refusal (404, 400)."""
        row = self.get(company, order_id)
        if row.status in IN_FLIGHT:
            raise bad_request(f"Order is mid-flight (status {row.status}); retry once it has settled.")
        if row.status in ("Draft", "Error"):
            self._remove(row)
        return self.set_status(row, "Cancelled")

    def set_status(self, row: Row, status: Status) -> Row:
        """Put an order into a status, settled or as the back office sets it, without an event; return its row."""
        numbers = (self._world.seed, row.company.id, row.order_id, row.changes)
        # The tickets of a Draft stay when it is issued; the manifests are made only then.
        if status == "Draft" or (status == "Issued" and row.status != "Draft"):
            row.tickets, row.issued_at = numbers, utc(time.time())
        elif status != "Issued":
            row.tickets = ()
        row.manifests = numbers if status == "Issued" else ()
        if status == "Draft":
            row.submission.payment_reference = ""
        elif status == "Issued":
            row.submission.payment_reference = row.submission.payment_reference or "MANUALLY CONFIRMED"
        row.status = status
        row.version = next(self._world.versions)
        row.changes += 1
        return row

    def announce(self, row: Row, event: tuple[str, str] | None = None) -> int:
        """Send an event of an order and return the number of subscriptions that get it.

        `event` is its status and timestamp; None is the present ones. Cancelling fires no event, so a cancelled order
        is announced as Issued.
        """
        status, timestamp = event or ("Issued" if row.status == "Cancelled" else row.status, event_timestamp())
        payload = Payload(row.order_id, row.buy_from_order_reference, status)
        return self._webhooks.announce(row.company, payload, timestamp)

    def page(self, company: Company, partner_id: str, path: str, query: Mapping[str, str]) -> dict[str, Any]:
        """Return a page of the partner's orders, by time of receipt or, with `sync`, by rowVersion.

        `query` may have `sync`, `lastRowVersion`, `pageSize` and `pageKey`; raises Refusal (400). Read from AL
        (`NPR API Request`): the page key carries the order of the first call's rows, and `nextPageURL` names the
        public host.
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
            ([row.version if sync else row.received_at, row.order_id], row)
            for row in self.rows.values()
            if row.version > last and (row.company.id, row.submission.partner_id) == (company.id, partner_id)
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

    async def _settle(self, row: Row) -> None:
        """Take the order to its end as the job queue does, unless it is changed meanwhile, and announce it."""
        for share, status in _STEPS:
            changes = row.changes
            await asyncio.sleep(share * self._world.settings.settle_after)
            if row.changes != changes:
                return
            self.set_status(row, status or row.settled_status)
        self._world.counts.orders[row.company.id, row.order_id].settlements += 1
        self.announce(row)

    def _remove(self, row: Row) -> None:
        row.changes += 1
        del self.rows[row.company.id, row.order_id]


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


def _asset(number: str, *place: object) -> dict[str, Any]:
    coupon = number.startswith("CPN")
    return {
        "id": guid(*place, "line"),
        "type": "coupon" if coupon else "ticket",
        "assetId": guid(*place, "asset"),
        "referenceNumber": ("CP-" if coupon else "TK-") + digits(12, *place),
        "itemNumber": number,
        "description": f"{'Coupon' if coupon else 'Ticket'} {number}",
    }
