"""Times: milliseconds since 1970 as in Redis, aware times, and what people type and read.

Screens show local times, JSON has UTC. People type an age, a time of the day, a day, or ISO 8601.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, time, timedelta
from typing import Final

HINT: Final = (
    "90min or 2h30m (ago), 02:50 (the last one), yesterday, 2026-11-27, 2026-11-27T02:50 or with a zone +01:00."
)
"""How a time is typed; without a zone it is local."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MS: Final = timedelta(milliseconds=1)
_PART: Final = re.compile(r"(\d{1,9})\s*(sec|s|min|m|h|d|w)\s*")
_SECONDS: Final = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_CLOCK: Final = re.compile(r"\d{1,2}:\d\d(:\d\d)?")
_DAYS: Final = {"today": 0, "yesterday": 1}
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


def seconds(text: str) -> int:
    """Return the seconds of a duration: 90s, 90min, 2h30m, 1d. Raises ValueError with a text for people."""
    typed = text.strip().lower()
    if not re.fullmatch(f"(?:{_PART.pattern})+", typed):
        raise ValueError("is not a duration such as 90s, 15m or 2h30m")
    return sum(int(number) * _SECONDS[unit] for number, unit in _PART.findall(typed))


def parse(text: str, at: datetime | None = None) -> datetime:
    """Return the aware time (UTC) that a person typed at the time `at` (now), in a form of HINT.

    A day means its beginning. Raises ValueError with a text for people; also for a local time that there never was, or
    that there was twice, as a clock that is set back shows it: nothing is guessed.
    """
    typed, current = text.strip(), at or now()
    try:
        if _PART.match(typed.lower()):
            return current - timedelta(seconds=seconds(typed))
        if _CLOCK.fullmatch(typed):
            return _last(time.fromisoformat(typed.zfill(5 if typed.count(":") == 1 else 8)), current)
        if typed.lower() in _DAYS:
            typed = (current.astimezone() - timedelta(days=_DAYS[typed.lower()])).date().isoformat()
        found = datetime.fromisoformat(typed)
        moments = _moments(found) if found.tzinfo is None else [found.astimezone(UTC)]
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a time. Use {HINT}") from None
    if not moments:
        raise ValueError(f"{text!r} never was: the clocks were set forward over it. Use {HINT}")
    if len(moments) > 1:
        which = " or ".join(one.astimezone().isoformat() for one in moments)
        raise ValueError(f"{text!r} was twice, as the clocks were set back. Say which: {which}")
    return moments[0]


def _last(clock: time, current: datetime) -> datetime:
    """Return the latest time that is past when a local clock showed this."""
    today = current.astimezone().date()
    days = (datetime.combine(today - timedelta(days=ago), clock) for ago in range(3))
    return max(one for day in days for one in _moments(day) if one <= current)


def _moments(local: datetime) -> list[datetime]:
    """Return the times (UTC), none to two, at which a local clock showed this."""
    both = {local.replace(fold=fold).astimezone(UTC) for fold in (0, 1)}
    return sorted(one for one in both if one.astimezone().replace(tzinfo=None) == local)


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
