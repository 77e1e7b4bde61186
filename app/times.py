"""Milliseconds since 1970, as the scripts keep them, and the aware times that people are shown.

Times as people type and read them: ISO 8601 or an age such as 6h; local on screen, UTC in JSON.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MS: Final = timedelta(milliseconds=1)


def from_ms(milliseconds: int) -> datetime:
    """Return the aware time (UTC) of `milliseconds` since 1970."""
    return _EPOCH + milliseconds * _MS


def to_ms(moment: datetime) -> int:
    """Return the milliseconds since 1970 of an aware time; a naive one raises TypeError."""
    return (moment - _EPOCH) // _MS


HINT: Final = "ISO 8601 (local unless it names a zone), or an age: 15m, 6h, 2d."

_AGE: Final = re.compile(r"(\d{1,6})\s*([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_STEPS: Final = ((86400, "d"), (3600, "h"), (60, "min"))


def now() -> datetime:
    """Return the present, aware, in UTC."""
    return datetime.now(UTC)


def parse(text: str) -> datetime:
    """Return the aware time that `text` means: `6h` is six hours ago.

    Raises ValueError, whose text is for people.
    """
    try:
        if age := _AGE.fullmatch(text.strip().lower()):
            return now() - timedelta(**{_UNITS[age[2]]: int(age[1])})
        return datetime.fromisoformat(text.strip()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time. Give {HINT}") from None


def short(moment: datetime | None) -> str:
    """Return a time for a table: local, without the year if it is this one; "" for None."""
    if moment is None:
        return ""
    local = moment.astimezone()
    this_year = local.year == now().astimezone().year
    return local.strftime("%m-%d %H:%M:%S" if this_year else "%Y-%m-%d %H:%M")


def age(span: timedelta) -> str:
    """Return a span in its largest unit: `3 d`, `5 h`, `12 min`, `8 s`."""
    seconds = max(0, int(span.total_seconds()))
    for size, unit in _STEPS:
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
