"""Times: milliseconds since 1970 as in Redis, aware times, and what people type and read.

Screens show local times, JSON has UTC. People type ISO 8601, or an age such as 6h.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

HINT: Final = "ISO 8601 (local time unless it names a zone), or an age: 15m, 6h, 2d."
"""How a time is typed."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MS: Final = timedelta(milliseconds=1)
_AGE: Final = re.compile(r"(\d{1,6})\s*([smhdw])")
_NAMES: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_UNITS: Final = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"))


def now() -> datetime:
    """Return the current time, aware, in UTC."""
    return datetime.now(UTC)


def from_ms(milliseconds: int) -> datetime:
    """Return the aware time (UTC) of `milliseconds` since 1970."""
    return _EPOCH + milliseconds * _MS


def to_ms(moment: datetime) -> int:
    """Return the milliseconds since 1970 of an aware time; a naive one raises TypeError."""
    return (moment - _EPOCH) // _MS


def parse(text: str) -> datetime:
    """Return the aware time that a person typed: `6h` is six hours ago. Raises ValueError with a text for people."""
    try:
        if age := _AGE.fullmatch(text.strip().lower()):
            return now() - timedelta(**{_NAMES[age[2]]: int(age[1])})
        return datetime.fromisoformat(text.strip()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a time. Use {HINT}") from None


def short(moment: datetime | None) -> str:
    """Return a time for a table: local, without the year if it is this year; "" for None."""
    if moment is None:
        return ""
    local = moment.astimezone()
    this_year = local.year == now().astimezone().year
    return local.strftime("%m-%d %H:%M:%S" if this_year else "%Y-%m-%d %H:%M")


def age(duration: timedelta) -> str:
    """Return a duration in its largest unit: `3 d`, `5 h`, `12 min`, `8 s`; `0 s` for a negative one."""
    milliseconds = max(0, int(duration / _MS))
    size, unit = next((one for one in _UNITS if milliseconds >= one[0]), _UNITS[-1])
    return f"{milliseconds // size} {unit}"


def span(milliseconds: int) -> str:
    """Return a duration as people read it, with one decimal below 10: `84 ms`, `1.2 s`, `12 min`."""
    for size, unit in _UNITS:
        if milliseconds >= size:
            amount = milliseconds / size
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{milliseconds} ms"
