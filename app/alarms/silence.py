"""Is a company silent? No event comes, although one should: pure, the time is an argument.

A sender that has stopped, or a subscription that is gone, fails no request of ours; only what does not come tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from app.store import clockwork
from app.store.watch import HOUR

WEEK: Final = 7 * clockwork.DAY
WEEKS: Final = 4

QUIET: Final = 30 * clockwork.MINUTE
"""No company is silent sooner: senders hold batches back, and guests come in groups."""

WINDOW: Final = clockwork.DAY
"""No longer window is compared: it holds every hour of a day, so whoever is usually heard in any of them is missed."""

ENOUGH: Final = 5.0
"""Events that usually come in such a window. With fewer, none at all is no news."""

OPEN: Final = 10 * clockwork.MINUTE
"""An order settles about a minute after createOrder, and an event tells of it; after so many one should have come."""

MISSED_WITHIN: Final = 60 * clockwork.MINUTE
"""How long it counts that the list showed settled orders of which no event had told."""

Reason = Literal["missed_events", "open_orders", "usual"]
"""`missed_events`: the list shows settled orders of which no event told, and none has come for QUIET.
`open_orders`: the list shows an order unsettled since OPEN, and no event has come since it was seen.
`usual`: at this time of the week events usually come."""


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a company; moments in ms since 1970, 0 for never. `hours`: hour since 1970 -> new events.

    `missed`: when a missed event was found last; `unsettled_since`: when the oldest unsettled order was first seen.
    """

    last: int
    missed: int
    unsettled_since: int
    hours: Mapping[int, int]


class Silence(msgspec.Struct, frozen=True):
    """It is silent: why, for how many ms (0 if it was never heard), and how many events usually come in that time."""

    reason: Reason
    quiet: int
    usual: float | None


def of(heard: Heard, now: int) -> Silence | None:
    """Return the silence of a company at `now`, None if there is none."""
    # A clock that was ahead wrote a moment to come: that is now.
    last = min(heard.last, now)
    quiet = now - last if last else 0
    usual = usual_count(heard.hours, max(last, now - WINDOW), now)
    # Found later than it happened: what has come since then shows that the sender lives.
    is_quiet = not last or quiet >= QUIET
    if heard.missed > last and now - heard.missed < MISSED_WITHIN and is_quiet:
        return Silence("missed_events", quiet, usual)
    if heard.unsettled_since > last and now - heard.unsettled_since >= OPEN:
        return Silence("open_orders", quiet, usual)
    if is_quiet and usual is not None and usual >= ENOUGH:
        return Silence("usual", quiet, usual)
    return None


def usual_count(hours: Mapping[int, int], start: int, end: int) -> float | None:
    """Return how many events at least come between two moments of a week (ms), None while fewer than two weeks tell.

    The least of the last four weeks, but for one: a holiday, or a silence, among them must neither hide the next one
    nor cause an alarm.
    """
    first = min(hours, default=None)
    if first is None:
        return None
    weeks = range(1, WEEKS + 1)
    told = [
        _between(hours, start - week * WEEK, end - week * WEEK) for week in weeks if start - week * WEEK >= first * HOUR
    ]
    if len(told) < 2:
        return None
    return sorted(told)[1 if len(told) > 2 else 0]


def _between(hours: Mapping[int, int], start: int, end: int) -> float:
    """Count events between two moments; of an hour that is only in part between them, that part."""
    total = 0.0
    for hour in range(start // HOUR, end // HOUR + 1):
        share = min(end, (hour + 1) * HOUR) - max(start, hour * HOUR)
        total += hours.get(hour, 0) * share / HOUR
    return total
