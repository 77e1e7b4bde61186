"""What looks wrong at this moment, read off the vital signs and the counters. Pure; onset.py makes alarms of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from app.alarms import silence
from app.store import clockwork
from app.store.gauges import is_open
from app.store.vitals import Subject, Vitals
from app.store.watch import AlarmState

LATE: Final = 5 * clockwork.MINUTE
"""Age of an owed fetch that somebody should know of; in a healthy hour it is seconds."""

SILENT_POOL: Final = clockwork.MINUTE
"""A pool beats each second; one that was told to stop takes itself out of the list."""

Totals = Mapping[tuple[str, ...], int]
"""Every counter by field prefix and label values, with company ids."""


class Sign(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that may be wrong, and whether it is.

    `count`: a counter that is wrong when it rises, instead of `is_on`. `figure` is what the log line tells: seconds,
    or how many. `company` is a slug, `sink` a name of SINKS, "" where the alarm is of neither.
    """

    name: str
    company: str = ""
    sink: str = ""
    is_on: bool = False
    count: int | None = None
    figure: float = 0
    reason: str = ""
    usual: float | None = None

    @property
    def field(self) -> str:
        """Return what it is kept under."""
        return f"{self.name}|{self.company}|{self.sink}"


class Seen(msgspec.Struct, frozen=True):
    """All that is looked at. `hours`: company id -> hour since 1970 -> new events; `states`: what was known before."""

    vitals: Vitals
    totals: Totals
    hours: Mapping[str, Mapping[int, int]]
    states: Mapping[str, AlarmState]


def read(seen: Seen, subjects: tuple[Subject, ...]) -> list[Sign]:
    """Return every sign, on or not: an alarm that is no more is one whose sign is off."""
    return [
        *(sign for one in subjects for sign in _of_company(seen, one)),
        *_of_sinks(seen),
        _of_pools(seen.vitals),
    ]


def _of_company(seen: Seen, one: Subject) -> Iterator[Sign]:
    vitals, slug, now = seen.vitals.companies[one.company_id], one.slug, seen.vitals.now
    yield Sign(name="fetch_late", company=slug, is_on=vitals.oldest_owed > LATE, figure=_seconds(vitals.oldest_owed))
    yield Sign(name="breaker_open", company=slug, is_on=is_open(seen.vitals, one.company_id))
    previous = vitals.previous_seen
    yield Sign(
        name="previous_secret",
        company=slug,
        is_on=previous > 0 and now - previous < clockwork.DAY,
        figure=_seconds(now - previous) if previous else 0,
    )
    dead = _total(seen.totals, "dead", one.company_id)
    yield Sign(name="dead_letters", company=slug, count=dead, figure=seen.vitals.dead)
    rejected = _total(seen.totals, "rejected", one.company_id)
    yield Sign(name="rejected_secrets", company=slug, count=rejected, figure=rejected)
    missed = seen.totals.get(("gaps", one.company_id, "never_heard"), 0)
    sign = Sign(name="missed_events", company=slug, count=missed, figure=missed)
    yield sign
    found = silence.of(
        silence.Heard(
            last=vitals.last_event,
            missed=seen.states.get(sign.field, AlarmState()).seen,
            unsettled_since=vitals.unsettled_since,
            hours=seen.hours.get(one.company_id, {}),
        ),
        now,
    )
    if found is None:
        yield Sign(name="silence", company=slug)
    else:
        quiet, usual = _seconds(found.quiet), found.usual
        yield Sign(name="silence", company=slug, is_on=True, figure=quiet, reason=found.reason, usual=usual)


def _of_sinks(seen: Seen) -> Iterator[Sign]:
    for name, sink in seen.vitals.sinks.items():
        yield Sign(name="sink_failing", sink=name, is_on=sink.failing > 0, figure=sink.failing)
        total = seen.totals.get(("dead_hand_ons", name), 0)
        yield Sign(name="dead_hand_ons", sink=name, count=total, figure=total)


def _of_pools(vitals: Vitals) -> Sign:
    ages = [vitals.now - pool.beat for pool in vitals.heartbeats()]
    silent = [age for age in ages if age > SILENT_POOL]
    return Sign(name="pool_silent", is_on=bool(silent), figure=_seconds(max(silent, default=0)))


def _total(totals: Totals, prefix: str, company_id: str) -> int:
    return sum(count for name, count in totals.items() if name[:2] == (prefix, company_id))


def _seconds(milliseconds: int) -> int:
    return round(milliseconds / 1000)
