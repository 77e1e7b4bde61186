"""An order without its secrets: names of guests, numbers and links. It is shown so, unless a command has --reveal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, TypeVar

import msgspec

from app.upstream.decode import Part

P = TypeVar("P", bound=Part)

_SHOWN: Final = frozenset(
    """
    order_id status partner_id sell_to_order_reference buy_from_order_reference sell_to_language
    received_at job_id line_no item_number description is_package quantity visit_date visit_time seq_no issued_at
    unit_price_excl_vat unit_price_incl_vat currency_code type
    """.split()  # noqa: SIM905  # twenty quoted words hide the list
)
"""Fields that are shown. Others are masked, so a new field is too."""

_ENDS_SHOWN: Final = frozenset(
    """
    id asset_id wallet_id reference_number wallet_reference_number external_reference_number payment_reference
    manifest_url
    """.split()  # noqa: SIM905  # as above
)
"""Numbers and links of which the end is shown, enough to compare two by eye or over the telephone."""

_EMAIL: Final = re.compile(r"(?<![^\s<>\"'])[^\s<>\"']+@[^\s<>\"']+")
"""An e-mail address in upstream's status message. It begins where a word does: else a long word takes minutes."""

_NAMES: Final = frozenset({"name", "sell_to_name"})

_LEFT: Final = 3
_LONG_ENOUGH: Final = 8
_GLUED_FROM: Final = 5
"""Length from which a value is cut out of a text also inside a word; "1" would match anywhere."""


def masked(part: P) -> P:
    """Return a copy of an order, or of a part of one, that may be shown.

    From its status message, upstream's own words, e-mail addresses are cut out, and all values that are masked in other
    fields: names and each word of them, numbers and links.
    """
    return _masked(part, _secrets(part))


def _masked(part: P, cut: re.Pattern[str]) -> P:
    values = {name: _hidden(name, getattr(part, name), cut) for name in part.__struct_fields__}
    return msgspec.structs.replace(part, **values)


def _secrets(part: Part) -> re.Pattern[str]:
    """Return the pattern of what is cut out of the status message of this order."""
    fields = list(_fields(part))
    shown = {text.casefold() for name, text in fields if name in _SHOWN}
    hidden: set[str] = set()
    for name, text in fields:
        # The wallet of a package has the package's name, which is shown.
        if name in _SHOWN or name == "status_message" or text.casefold() in shown:
            continue
        hidden.add(text)
        if name in _NAMES:
            hidden |= {word for word in re.findall(r"\w+", text) if len(word) >= _LEFT}
    # The longest first: a name is cut as a whole before its words.
    patterns = [_EMAIL.pattern, *map(_pattern, sorted(hidden, key=len, reverse=True))]
    return re.compile("|".join(patterns), re.IGNORECASE)


def _pattern(text: str) -> str:
    found = r"\s+".join(map(re.escape, text.split()))
    return found if len(text) >= _GLUED_FROM and not text.isalpha() else rf"(?<!\w){found}(?!\w)"


def _fields(part: Part) -> Iterator[tuple[str, str]]:
    """Return name and text of each known field of the part and of its parts."""
    for name in part.__struct_fields__:
        value = getattr(part, name)
        if isinstance(value, tuple):
            for one in value:
                yield from _fields(one)
        elif isinstance(value, str) and value.strip():
            yield name, value


def _hidden(name: str, value: Any, cut: re.Pattern[str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_masked(one, cut) for one in value)
    if isinstance(value, dict):  # `extra`: unknown fields may hold anything
        return {}
    if value is None or name in _SHOWN:
        return value
    if name == "status_message":
        return cut.sub("…", value)
    text = str(value)
    return f"…{text[-_LEFT:]}" if name in _ENDS_SHOWN and len(text) >= _LONG_ENOUGH else "…"
