"""The order as getOrder answers it: what the guest bought, and the wallets, tickets and coupons that came of it.

Fields and their meaning: upstream.md 1. Values are frozen, money is Decimal, times are aware, what is not there is
None or (). Printing any of it shows no person and no ticket (`wire.Part`).
"""

from __future__ import annotations

from datetime import date, datetime, time
from decimal import Decimal
from hashlib import sha256

from app.upstream.wire import Guid, Part, build, canonical, decode

UNSETTLED = frozenset({"Submitted", "Scheduled", "Processing"})
"""The words for "still working"."""


class Asset(Part, frozen=True):
    """A ticket or a coupon in a wallet; `type` tells which."""

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


class Order(Part, frozen=True):
    """One order; `status` is the word as sent, known or not."""

    shown = ("order_id", "status", "items")

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
    items: tuple[Item, ...] = ()

    @property
    def settled(self) -> bool:
        """Return whether upstream has finished with the order for now.

        An unknown status counts as settled: the words for "still working" are known, and waiting for a word we do
        not understand to change would end a paid order in a dead letter. A later settlement brings its own event.
        """
        return self.status not in UNSETTLED

    @property
    def references(self) -> tuple[str, ...]:
        """Return what the venue and the partner call it, as far as they do."""
        return tuple(filter(None, (self.buy_from_order_reference, self.sell_to_order_reference)))

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return the e-mail addresses of the order and of its lines, each once."""
        told = (self.sell_to_email, *(item.sell_to_email for item in self.items))
        return tuple(dict.fromkeys(filter(None, told)))

    @property
    def wallets(self) -> tuple[Wallet, ...]:
        """Return the wallets of all items."""
        return tuple(wallet for item in self.items for wallet in item.wallets)

    @property
    def tickets(self) -> tuple[Asset, ...]:
        """Return the tickets of all wallets."""
        return tuple(ticket for wallet in self.wallets for ticket in wallet.tickets)

    @property
    def coupons(self) -> tuple[Asset, ...]:
        """Return the coupons of all wallets."""
        return tuple(coupon for wallet in self.wallets for coupon in wallet.coupons)


def parse_order(raw: bytes) -> Order:
    """Return the order in the body of an answer.

    Raises UnreadableAnswer, and nothing else, if it is no JSON object with an orderId and a status.
    """
    return build(Order, decode(raw))


def digest(raw: bytes) -> str:
    """Return 64 hex digits that stay the same as long as the content of the body does.

    Neither white space, nor the order of keys, nor 200 against 200.0 changes it.
    Raises UnreadableAnswer, and nothing else, if the body is no JSON.
    """
    return sha256(canonical(raw)).hexdigest()
