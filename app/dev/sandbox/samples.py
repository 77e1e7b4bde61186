"""Example bodies of createOrder: for bulk orders, demos and tests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

_DAYS_AHEAD = 14


def order_body(
    partner_id: str,
    reference: str,
    *,
    payment_reference: str = "",
    items: Sequence[str] = ("31001",),
    quantity: int = 1,
) -> dict[str, Any]:
    """Return a body that createOrder takes: one line an item number (see the package for what they mean)."""
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
    return {
        "itemNumber": number,
        "quantity": quantity,
        "visitDate": day,
        "visitTime": "10:30:00",
        "wallet": wallet,
    }
