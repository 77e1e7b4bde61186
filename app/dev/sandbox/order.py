"""The order as getOrder and listOrdersByPartner write it: every field, its place, and when it is left out.

Written in the order of the fields; what is UNSET is left out.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

Status = Literal["Submitted", "Scheduled", "Processing", "Draft", "Issued", "Cancelled", "Error"]
IN_FLIGHT: tuple[Status, ...] = ("Submitted", "Scheduled", "Processing")


class Asset(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A ticket or a coupon in a wallet."""

    id: str
    type: Literal["ticket", "coupon"]
    asset_id: str
    reference_number: str
    item_number: str
    description: str


class Wallet(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One guest's wallet; a shell (no ids, no assets, price 0) until the order is issued."""

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
    """One row of listOrdersByPartner: no items, and an empty manifestUrl is there."""

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


def shell(seq_no: int, external_reference_number: str, name: str) -> Wallet:
    """Return the wallet of an order that is not issued: the partner's own words, and nothing else."""
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
