"""The body of createOrder and replaceOrder, checked in the Channel Manager's order and words, made into shells.

Example bodies of createOrder: for bulk orders, demos and tests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec
from msgspec import UNSET

from app.dev.sandbox.http import bad_request
from app.dev.sandbox.orders import Component, Item, shell
from app.dev.sandbox.settings import canonical_guid

_DATE = re.compile(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])")
_TIME = re.compile(r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d")
_LINE_STEP = 100_000


class Header(msgspec.Struct, frozen=True):
    """Who buys, from whom, and whether it is paid; cut and upper-cased as the table's fields do it."""

    partner_id: str
    reference: str
    email: str
    name: str
    language: str
    payment: str


def decoded(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`; raises Refusal (400)."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise bad_request("Body must be a JSON object")
    return value


def header(body: dict[str, Any]) -> Header:
    """Return what stands above the items; raises Refusal (400)."""
    partner_id = canonical_guid(required(body, "partnerId"))
    if partner_id is None:
        raise bad_request("partnerId is not a valid GUID")
    return Header(
        partner_id=partner_id,
        reference=_code(required(body, "sellToOrderReference"), 50),
        email=_optional(body, "sellToEmail")[:100],
        name=_optional(body, "sellToName")[:100],
        language=_code(_optional(body, "sellToLanguage"), 10),
        payment=_code(_optional(body, "paymentReference"), 50),
    )


def shells(body: dict[str, Any], top: Header) -> tuple[Item, ...]:
    """Return the lines, each with its empty wallets; raises Refusal (400)."""
    lines = body.get("items")
    if "items" not in body:
        raise bad_request("items array is required")
    if not isinstance(lines, list):
        raise bad_request("items must be an array")
    if not lines:
        raise bad_request("items array must contain at least one entry")
    return tuple(_item(line, index, top) for index, line in enumerate(lines))


def required(body: dict[str, Any], name: str) -> str:
    """Return the text of a field that must be there and not empty; raises Refusal (400)."""
    if name not in body:
        raise bad_request(f"Required field '{name}' is missing")
    value = body[name]
    if isinstance(value, dict | list):
        raise bad_request(f"Required field '{name}' must be a primitive value")
    if value is None:
        raise bad_request(f"Required field '{name}' cannot be null")
    if value == "":
        raise bad_request(f"Required field '{name}' cannot be empty")
    return str(value)


def _optional(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if isinstance(value, dict | list):
        raise bad_request(f"Optional field '{name}' must be a primitive value")
    return "" if value is None else str(value)


def _code(text: str, length: int) -> str:
    """Return text as AL's type Code keeps it: upper case, no blanks around it."""
    return text[:length].strip().upper()


def _item(line: object, index: int, top: Header) -> Item:
    if not isinstance(line, dict):
        raise bad_request(f"items[{index}] must be an object")
    line_no = (index + 1) * _LINE_STEP
    number = _code(required(line, "itemNumber"), 20)
    if number.startswith("UNKNOWN"):
        raise bad_request(f"Unknown item '{number}'")
    quantity = _quantity(line, line_no)
    visit_date, visit_time = _visit(line, f"items[{index}]")
    wallet = line.get("wallet")
    block: dict[str, Any] = wallet if isinstance(wallet, dict) else {}
    count = 1 if number.startswith("GRP") else quantity
    names = _per_wallet(block, "names", count, line_no)
    references = _per_wallet(block, "externalReferenceNumbers", count, line_no)
    schedule = _schedule(block, number, index, line_no)
    return Item(
        line_no=line_no,
        item_number=number,
        description=_description(number),
        is_package=number.startswith("PKG"),
        quantity=quantity,
        visit_date=visit_date,
        visit_time=visit_time,
        sell_to_name=(_optional(line, "sellToName") if "sellToName" in line else top.name)[:100],
        sell_to_email=(_optional(line, "sellToEmail") if "sellToEmail" in line else top.email)[:100],
        sell_to_language=(_code(_optional(line, "sellToLanguage"), 10) if "sellToLanguage" in line else top.language),
        component_schedule=schedule or UNSET,
        wallets=tuple(shell(seq + 1, references[seq][:100], names[seq][:100]) for seq in range(count)),
    )


def _quantity(line: dict[str, Any], line_no: int) -> int:
    value = line.get("quantity")
    try:
        quantity = 1 if value is None else int(value)
    except (TypeError, ValueError):
        # The conversion fails in AL, and every unhandled AL error is a 400.
        raise bad_request(f"quantity is not an integer (line {line_no})") from None
    if quantity < 1:
        raise bad_request(f"quantity must be >= 1 (line {line_no})")
    return quantity


def _visit(entry: dict[str, Any], where: str) -> tuple[str, str]:
    visit_date = required(entry, "visitDate")
    if not _DATE.fullmatch(visit_date):
        raise bad_request("Required field 'visitDate' must be YYYY-MM-DD")
    visit_time = required(entry, "visitTime")
    if not _TIME.fullmatch(visit_time):
        raise bad_request("Required field 'visitTime' must be HH:mm:ss")
    today = datetime.now(UTC).date()
    try:
        past = date.fromisoformat(visit_date) < today
    except ValueError:
        raise bad_request(f"'{visit_date}' is not a valid Date") from None
    if past:
        text = f"visitDate must not be in the past (received {visit_date}, local today {today})"
        raise bad_request(f"{where} {text}")
    return visit_date, visit_time


def _per_wallet(block: dict[str, Any], name: str, count: int, line_no: int) -> list[str]:
    values = block.get(name)
    if not isinstance(values, list):
        return [""] * count
    if len(values) != count:
        raise bad_request(f"wallet.{name} array length ({len(values)}) must equal {count} on line {line_no}")
    return [str(value) for value in values]


def _schedule(block: dict[str, Any], number: str, index: int, line_no: int) -> tuple[Component, ...]:
    entries = block.get("componentSchedule")
    if not isinstance(entries, list):
        return ()
    if not number.startswith("PKG"):
        raise bad_request(f"wallet.componentSchedule is only valid for package items (line {line_no})")
    schedule = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise bad_request(f"wallet.componentSchedule entries must be objects (line {line_no})")
        component = _code(required(entry, "itemNumber"), 20)
        day, at = _visit(entry, f"items[{index}].componentSchedule entry '{component}'")
        schedule.append(Component(item_number=component, visit_date=day, visit_time=at))
    return tuple(schedule)


def _description(number: str) -> str:
    kinds = {"PKG": "Package", "GRP": "Group ticket", "CPN": "Coupon"}
    return f"{kinds.get(number[:3], 'Ticket')} {number}"


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
