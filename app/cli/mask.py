"""An order without what would open a door or name a guest, for every screen and pipe that did not ask to see it."""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

import msgspec

from app.upstream.wire import Part

P = TypeVar("P", bound=Part)

_SHOWN: Final = frozenset(
    """
    order_id status partner_id sell_to_order_reference buy_from_order_reference sell_to_language
    received_at job_id line_no item_number description is_package quantity visit_date visit_time seq_no issued_at
    unit_price_excl_vat unit_price_incl_vat currency_code type
    """.split()  # noqa: SIM905  # twenty quoted words hide the list
)
"""What may be seen; a field that is not listed is masked, so a new one is too."""

_ENDS_SHOWN: Final = frozenset(
    """
    id asset_id wallet_id reference_number wallet_reference_number external_reference_number payment_reference
    manifest_url
    """.split()  # noqa: SIM905  # as above
)
"""Numbers and links of which the end is left, enough to compare two of them by eye or over the telephone."""

_EMAIL: Final = re.compile(r"[^\s<>\"']+@[^\s<>\"']+")
"""Upstream's own words on an Error are for ops; an address in them is not."""

_LEFT: Final = 3
_LONG_ENOUGH: Final = 8


def masked(part: P) -> P:
    """Return a copy of an order, or of a part of one, that may be shown."""
    values = {name: _hidden(name, getattr(part, name)) for name in part.__struct_fields__}
    return msgspec.structs.replace(part, **values)


def _hidden(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(masked(one) for one in value)
    if isinstance(value, dict):  # `extra`: fields that we do not know may hold anything
        return {}
    if value is None or name in _SHOWN:
        return value
    if name == "status_message":
        return _EMAIL.sub("…", value)
    text = str(value)
    return f"…{text[-_LEFT:]}" if name in _ENDS_SHOWN and len(text) >= _LONG_ENOUGH else "…"
