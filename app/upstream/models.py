"""The answers of the Channel Manager as values: orders (upstream.md 1), pages of summaries (6), subscriptions (3).

Values are frozen, money is Decimal, times are aware, an absent field is None or (). Their repr shows no person and no
ticket (decode.Part). Upstream shows the clientState of every subscription to whoever lists them: it becomes a secret
when it is read.
"""

from __future__ import annotations

from datetime import date, datetime, time
from decimal import Decimal

from msgspec import Struct
from pydantic import SecretStr

from app.errors import UnreadableAnswer
from app.upstream.decode import Guid, Part, build, build_all, decode

EVENT_NAME = "ota_cm_order_processed"
EVENT_VERSION = "1.0"

UNSETTLED = frozenset({"Submitted", "Scheduled", "Processing"})
"""The statuses in which upstream still works on the order."""


class Asset(Part, frozen=True):
    """A ticket or a coupon in a wallet, by `type`."""

    shown = ("type", "item_number")

    id: str | None = None
    type: str | None = None
    asset_id: str | None = None
    reference_number: str | None = None
    item_number: str | None = None
    description: str | None = None


class Wallet(Part, frozen=True):
    """What one guest carries; a shell without `wallet_id` until the order has been issued."""

    shown = ("seq_no", "assets")

    seq_no: int | None = None
    wallet_id: str | None = None
    wallet_reference_number: str | None = None
    external_reference_number: str | None = None
    name: str | None = None
    issued_at: datetime | None = None
    unit_price_excl_vat: Decimal | None = None
    unit_price_incl_vat: Decimal | None = None
    currency_code: str | None = None
    manifest_url: str | None = None
    assets: tuple[Asset, ...] = ()

    @property
    def tickets(self) -> tuple[Asset, ...]:
        return tuple(asset for asset in self.assets if asset.type == "ticket")

    @property
    def coupons(self) -> tuple[Asset, ...]:
        return tuple(asset for asset in self.assets if asset.type == "coupon")


class ComponentSchedule(Part, frozen=True):
    """When one component of a package is visited, in the venue's own time."""

    shown = ("item_number", "visit_date", "visit_time")

    item_number: str | None = None
    visit_date: date | None = None
    visit_time: time | None = None


class Item(Part, frozen=True):
    """One line of the order; `visit_date` and `visit_time` are in the venue's own time."""

    shown = ("line_no", "item_number", "quantity", "wallets")

    line_no: int | None = None
    item_number: str | None = None
    description: str | None = None
    is_package: bool = False
    quantity: int | None = None
    visit_date: date | None = None
    visit_time: time | None = None
    sell_to_name: str | None = None
    sell_to_email: str | None = None
    sell_to_language: str | None = None
    component_schedule: tuple[ComponentSchedule, ...] = ()
    wallets: tuple[Wallet, ...] = ()


class Summary(Part, frozen=True):
    """One row of the list: an order without its items. `status` is as sent, known or not.

    `row_version` is there only in sync mode.
    """

    shown = ("order_id", "status", "row_version")

    order_id: Guid
    status: str
    status_message: str | None = None
    partner_id: str | None = None
    sell_to_order_reference: str | None = None
    buy_from_order_reference: str | None = None
    sell_to_email: str | None = None
    sell_to_name: str | None = None
    sell_to_language: str | None = None
    payment_reference: str | None = None
    received_at: datetime | None = None
    job_id: str | None = None
    manifest_url: str | None = None
    row_version: int | None = None


class Order(Summary, frozen=True):
    """One order with its lines."""

    shown = ("order_id", "status", "items")

    items: tuple[Item, ...] = ()

    @property
    def settled(self) -> bool:
        """Return whether upstream has finished its work on the order.

        An unknown status counts as settled: waiting for it to change would end a paid order in a dead letter. A later
        settlement brings its own event.
        """
        return self.status not in UNSETTLED

    @property
    def references(self) -> tuple[str, ...]:
        """Return the references that the venue and the partner have given the order."""
        return tuple(filter(None, (self.buy_from_order_reference, self.sell_to_order_reference)))

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return the e-mail addresses of the order and of its lines, each once."""
        found = (self.sell_to_email, *(item.sell_to_email for item in self.items))
        return tuple(dict.fromkeys(filter(None, found)))

    @property
    def wallets(self) -> tuple[Wallet, ...]:
        return tuple(wallet for item in self.items for wallet in item.wallets)

    @property
    def tickets(self) -> tuple[Asset, ...]:
        return tuple(ticket for wallet in self.wallets for ticket in wallet.tickets)

    @property
    def coupons(self) -> tuple[Asset, ...]:
        return tuple(coupon for wallet in self.wallets for coupon in wallet.coupons)


class Page(Struct, frozen=True, kw_only=True):
    """The rows of one page, the key of the next page (None on the last), and how many rows could not be read."""

    rows: tuple[Summary, ...]
    next_key: str | None
    unreadable: int

    @property
    def row_versions(self) -> dict[str, int]:
        """Return order id -> row version of the rows that have one; it is a 64-bit number (upstream.md 6)."""
        return {row.order_id: version for row in self.rows if 0 < (version := row.row_version or 0) < 2**63}


class Subscription(Part, frozen=True):
    """One subscription; `subscription_state` other than "Active" means that no events come."""

    shown = ("id", "company_id", "event_name", "subscription_state", "client_state")

    id: str | None = None
    company_id: str | None = None
    event_name: str | None = None
    event_version: str | None = None
    notification_url: str | None = None
    client_state: SecretStr | None = None
    subscription_state: str | None = None
    last_modified_date_time: datetime | None = None

    @property
    def active(self) -> bool:
        return (self.subscription_state or "").casefold() == "active"


def parse_order(raw: bytes) -> Order:
    """Return the order in the body of an answer.

    Raises UnreadableAnswer, and nothing else, if it is no JSON object with an orderId and a status.
    """
    return build(Order, decode(raw))


def parse_page(raw: bytes) -> Page:
    """Return the page in the body of an answer, be it a page wrapper or a plain list (upstream.md 6).

    Raises UnreadableAnswer if it is neither.
    """
    tree = decode(raw)
    wrapper = tree if isinstance(tree, dict) else {"data": tree}
    data, key = wrapper.get("data"), wrapper.get("nextPageKey")
    if not isinstance(data, list):
        raise UnreadableAnswer("unreadable_answer")
    rows = tuple(row for row in map(_row, data) if row is not None)
    last = wrapper.get("morePages") is False or not isinstance(key, str) or not key
    return Page(rows=rows, next_key=None if last else key, unreadable=len(data) - len(rows))


def parse_subscriptions(raw: bytes) -> tuple[Subscription, ...]:
    """Return the subscriptions in the body of an answer, be it `{"value": [...]}` or a plain list.

    Raises UnreadableAnswer if it is neither.
    """
    tree = decode(raw)
    listed = tree.get("value") if isinstance(tree, dict) else tree
    if not isinstance(listed, list):
        raise UnreadableAnswer("unreadable_answer")
    return build_all(Subscription, listed)


def _row(raw: object) -> Summary | None:
    try:
        return build(Summary, raw)
    except UnreadableAnswer:  # one bad row must not hide the others
        return None
