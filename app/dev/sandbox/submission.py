"""The body of createOrder and replaceOrder: its structure, and a maker for tests, the demo and the admin API."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec

from app.dev.sandbox.values import Positive, Text, canonical_guid

_DAYS_AHEAD = 14
_KINDS = {"PKG": "Package", "GRP": "Group ticket", "CPN": "Coupon"}

_Date = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\d$")]
_Time = Annotated[str, msgspec.Meta(pattern=r"^\d\d:\d\d:\d\d$")]


class Component(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """When one part of a package is to be visited."""

    item_number: str
    visit_date: str
    visit_time: str


class WalletNames(msgspec.Struct, frozen=True, rename="camel"):
    """The partner's data for the wallets of a line; lists have one entry per wallet."""

    external_reference_numbers: list[str] = []
    names: list[str] = []
    component_schedule: list[Component] = []


class Line(msgspec.Struct, rename="camel", kw_only=True):
    """One line of a body."""

    item_number: Text
    quantity: Positive = 1
    visit_date: _Date
    visit_time: _Time
    wallet: WalletNames = WalletNames()

    def __post_init__(self) -> None:
        self.item_number = code(self.item_number, 20)
        for given in (self.wallet.names, self.wallet.external_reference_numbers):
            if len(given) not in (0, self.wallets):
                raise ValueError(f"wallet arrays must have {self.wallets} entries")

    @property
    def description(self) -> str:
        return f"{_KINDS.get(self.item_number[:3], 'Ticket')} {self.item_number}"

    @property
    def wallets(self) -> int:
        """Return the number of wallets: one per guest, or one for a group."""
        return 1 if self.item_number.startswith("GRP") else self.quantity

    @property
    def assets(self) -> list[str]:
        """Return the item numbers of the tickets and coupons in each wallet."""
        if not self.item_number.startswith("PKG"):
            return [self.item_number]
        parts = [part.item_number for part in self.wallet.component_schedule]
        return [*(parts or [f"{self.item_number}-1"]), "CPN-LUNCH"]


class Submission(msgspec.Struct, rename="camel"):
    """The body of createOrder and replaceOrder, with its ids as the table keeps them."""

    partner_id: str
    sell_to_order_reference: Text
    items: Annotated[list[Line], msgspec.Meta(min_length=1)]
    sell_to_email: str = ""
    sell_to_name: str = ""
    sell_to_language: str = ""
    #: "" for an order that is not paid.
    payment_reference: str = ""

    def __post_init__(self) -> None:
        partner_id = canonical_guid(self.partner_id)
        if partner_id is None:
            raise ValueError("Invalid partnerId")
        self.partner_id = partner_id
        self.sell_to_order_reference = code(self.sell_to_order_reference, 50)
        self.payment_reference = code(self.payment_reference, 50)

    @property
    def identity(self) -> tuple[str, str]:
        """Return partner and reference, which only one order of a company has."""
        return self.partner_id, self.sell_to_order_reference

    @property
    def failing(self) -> Line | None:
        """Return the first line that cannot be issued."""
        return next((line for line in self.items if line.item_number.startswith("FAIL")), None)


def order_body(
    partner_id: str,
    reference: str,
    *,
    payment_reference: str = "",
    items: Sequence[str] = ("31001",),
    quantity: int = 1,
) -> dict[str, Any]:
    """Return a body for createOrder with one line per item number (see the package for their meaning)."""
    day = (datetime.now(UTC) + timedelta(days=_DAYS_AHEAD)).date().isoformat()
    return {
        "partnerId": partner_id,
        "sellToOrderReference": reference,
        "sellToEmail": "guest@example.com",
        "sellToName": "Jane Doe",
        "sellToLanguage": "ENU",
        "paymentReference": payment_reference,
        "items": [_line(number, reference, day, quantity) for number in items],
    }


def _line(number: str, reference: str, day: str, quantity: int) -> dict[str, Any]:
    count = 1 if number.startswith("GRP") else quantity
    wallet: dict[str, Any] = {
        "externalReferenceNumbers": [f"{reference}-{number}-{seq}" for seq in range(1, count + 1)],
        "names": ["Jane Doe"] * count,
    }
    if number.startswith("PKG"):
        wallet["componentSchedule"] = [{"itemNumber": "31010", "visitDate": day, "visitTime": "13:00:00"}]
    return {"itemNumber": number, "quantity": quantity, "visitDate": day, "visitTime": "10:30:00", "wallet": wallet}


def code(text: str, length: int) -> str:
    """Return text as AL's type Code keeps it: upper case, no surrounding spaces."""
    return text[:length].strip().upper()
