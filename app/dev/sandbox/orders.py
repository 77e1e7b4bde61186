"""An order as getOrder and listOrdersByPartner write it, and how it becomes issued, failed or cancelled.

The structures have upstream's fields in upstream's order; an UNSET field is left out.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from app.dev.sandbox.values import digits, guid, utc

Status = Literal["Submitted", "Scheduled", "Processing", "Draft", "Issued", "Cancelled", "Error"]
IN_FLIGHT: tuple[Status, ...] = ("Submitted", "Scheduled", "Processing")
_MANIFESTS = "https://assets.npretail.app/manifest/"
_VAT = 1.25


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
    wallet_id: str
    wallet_reference_number: str
    external_reference_number: str
    name: str
    issued_at: str
    unit_price_excl_vat: float
    unit_price_incl_vat: float
    currency_code: str
    manifest_url: str | UnsetType = UNSET
    assets: tuple[Asset, ...]


class Component(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """When one part of a package is to be visited."""

    item_number: str
    visit_date: str
    visit_time: str


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
    status_message: str
    partner_id: str
    sell_to_order_reference: str
    buy_from_order_reference: str
    sell_to_email: str
    sell_to_name: str
    sell_to_language: str
    payment_reference: str
    received_at: str
    job_id: str
    manifest_url: str | UnsetType = UNSET
    items: tuple[Item, ...]


class Summary(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One row of listOrdersByPartner: no items, and an empty manifestUrl is not left out."""

    order_id: str
    partner_id: str
    sell_to_order_reference: str
    buy_from_order_reference: str
    sell_to_email: str
    sell_to_name: str
    sell_to_language: str
    payment_reference: str
    status: str
    status_message: str
    received_at: str
    job_id: str
    manifest_url: str
    id: str
    row_version: str | UnsetType = UNSET


@dataclass(frozen=True)
class Issuing:
    """One issuing of one order; its numbers depend on `source`: the seed, the order, how often it was issued."""

    source: tuple[object, ...]
    now: float

    def outcome(self, order: Order) -> Order:
        """Return the settled order: Error if an item asks for it, else Issued if it is paid, else Draft."""
        failing = next((item for item in order.items if item.item_number.startswith("FAIL")), None)
        if failing is not None:
            return self.failed(order, failing)
        return self.issued(order) if order.payment_reference else self.draft(order)

    def to(self, order: Order, status: Status) -> Order:
        """Return the order in any status, as the back office can set it."""
        if status == "Issued":
            paid = replace(order, payment_reference=order.payment_reference or "MANUALLY CONFIRMED")
            return self.confirmed(paid) if order.status == "Draft" else self.issued(paid)
        if status == "Draft":
            return self.draft(replace(order, payment_reference=""))
        if status == "Error":
            return self.failed(order, order.items[0] if order.items else None)
        return cancelled(order) if status == "Cancelled" else unissued(order, status)

    def draft(self, order: Order) -> Order:
        """Return the order with filled wallets, not yet paid."""
        return replace(
            order,
            status="Draft",
            status_message="",
            job_id=guid(*self.source, "job").replace("-", "").upper(),
            manifest_url=UNSET,
            items=tuple(self._filled(item) for item in order.items),
        )

    def issued(self, order: Order) -> Order:
        """Return the order with filled wallets and manifests."""
        return self.confirmed(self.draft(order))

    def confirmed(self, order: Order) -> Order:
        """Return a Draft as Issued; the manifests are made only now."""
        items = tuple(
            replace(
                item,
                wallets=tuple(
                    replace(wallet, manifest_url=self._manifest(item.line_no, wallet.seq_no)) for wallet in item.wallets
                ),
            )
            for item in order.items
        )
        return replace(order, status="Issued", manifest_url=self._manifest(), items=items)

    def failed(self, order: Order, item: Item | None) -> Order:
        """Return the order as Error with empty wallets, since the step that fills them is rolled back."""
        text = f"Item {item.item_number} has no capacity left on {item.visit_date}." if item else "Failed."
        return replace(unissued(order, "Error"), status_message=text)

    def _filled(self, item: Item) -> Item:
        price = float(50 + zlib.crc32(item.item_number.encode()) % 200)
        wallets = tuple(
            replace(
                wallet,
                wallet_id=guid(*self.source, item.line_no, wallet.seq_no),
                wallet_reference_number="14" + digits(16, *self.source, item.line_no, wallet.seq_no),
                name=wallet.name or item.description,
                issued_at=utc(self.now),
                unit_price_excl_vat=price,
                unit_price_incl_vat=price * _VAT,
                currency_code="DKK",
                assets=self._assets(item, wallet),
            )
            for wallet in item.wallets
        )
        return replace(item, wallets=wallets)

    def _assets(self, item: Item, wallet: Wallet) -> tuple[Asset, ...]:
        place = (item.line_no, wallet.seq_no)
        if not item.is_package:
            return (self._asset(item.item_number, *place, 0),)
        parts = item.component_schedule or ()
        tickets = [self._asset(part.item_number, *place, number) for number, part in enumerate(parts, 1)]
        return (*(tickets or [self._asset(f"{item.item_number}-1", *place, 1)]), self._asset("CPN-LUNCH", *place, 0))

    def _asset(self, item_number: str, *place: int) -> Asset:
        coupon = item_number.startswith("CPN")
        return Asset(
            id=guid(*self.source, *place, "line"),
            type="coupon" if coupon else "ticket",
            asset_id=guid(*self.source, *place, "asset"),
            reference_number=("CP-" if coupon else "TK-") + digits(12, *self.source, *place),
            item_number=item_number,
            description=f"{'Coupon' if coupon else 'Ticket'} {item_number}",
        )

    def _manifest(self, *place: int) -> str:
        return _MANIFESTS + guid(*self.source, "manifest", *place)


def cancelled(order: Order) -> Order:
    """Return the order as deleteOrder leaves it: no lines, no job, no manifest; the payment reference stays."""
    return replace(order, status="Cancelled", status_message="", job_id="", manifest_url=UNSET, items=())


def unissued(order: Order, status: Status) -> Order:
    """Return the order with nothing issued: every wallet is empty."""

    def emptied(item: Item) -> Item:
        wallets = (
            empty_wallet(wallet.seq_no, wallet.external_reference_number, wallet.name) for wallet in item.wallets
        )
        return replace(item, wallets=tuple(wallets))

    items = tuple(emptied(item) for item in order.items)
    return replace(order, status=status, status_message="", job_id="", manifest_url=UNSET, items=items)


def empty_wallet(seq_no: int, external_reference_number: str, name: str) -> Wallet:
    """Return the wallet of an order that is not issued: only what the partner sent."""
    return Wallet(
        seq_no=seq_no,
        wallet_id="00000000-0000-0000-0000-000000000000",
        wallet_reference_number="",
        external_reference_number=external_reference_number,
        name=name,
        issued_at="",
        unit_price_excl_vat=0,
        unit_price_incl_vat=0,
        currency_code="",
        assets=(),
    )
