"""What happened to an order as steps in time: repeats folded, each with the time since the step before."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import Final

import msgspec

from app.cli.story import sentence
from app.store.trail import Begun, Entry, Failed, HandedOn, Heard, Refused, Repeated

WIDTH: Final = 80
_INDENT: Final = 24
_MS: Final = timedelta(milliseconds=1)
_UNITS: Final = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"))


class Step(msgspec.Struct, frozen=True):
    """One thing that happened at `at`, or `times` times the same until `until`; `since_ms` since the step before."""

    at: datetime
    since_ms: int | None
    what: str
    text: str
    times: int
    until: datetime


def steps(trail: Sequence[Entry]) -> tuple[Step, ...]:
    """Return the entries of a trail, oldest first, as steps."""
    # The begin of a fetch that failed says nothing that its end does not.
    failed = {entry.fence for entry in trail if isinstance(entry, Failed | Refused)}
    told = [entry for entry in trail if not (isinstance(entry, Begun) and entry.fence in failed)]
    found: list[Step] = []
    before: datetime | None = None
    for _, group in groupby(enumerate(told), key=_likeness):
        entries = [entry for _, entry in group]
        first, last = entries[0], entries[-1]
        since = None if before is None else round((first.at - before) / _MS)
        before = last.at
        what = first.__struct_config__.tag
        found.append(Step(first.at, since, str(what), sentence(last), len(entries), last.at))
    return tuple(found)


def lines(found: Iterable[Step]) -> Iterator[str]:
    """Return the steps for a screen of 80 columns: local time, time since the step before, and what happened."""
    day = None
    for step in found:
        local = step.at.astimezone()
        if local.date() != day:
            day = local.date()
            yield f"{day.isoformat()} ({local.tzname()})"
        clock = f"{local:%H:%M:%S}.{local.microsecond // 1000:03}"
        since = "" if step.since_ms is None else f"+{span(step.since_ms)}"
        text = step.text if step.times == 1 else f"{step.text}; {step.times} times until {_until(step)}"
        yield from textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"{clock}{since:>10}  ",
            subsequent_indent=" " * _INDENT,
            break_on_hyphens=False,
        )


def span(milliseconds: int) -> str:
    """Return a span as people read it: `84 ms`, `1.2 s`, `12 min`."""
    for size, unit in _UNITS:
        if milliseconds >= size:
            amount = milliseconds / size
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{milliseconds} ms"


def _until(step: Step) -> str:
    local = step.until.astimezone()
    same_day = local.date() == step.at.astimezone().date()
    return f"{local:%H:%M:%S}" if same_day else f"{local:%m-%d %H:%M:%S}"


def _likeness(numbered: tuple[int, Entry]) -> tuple[object, ...]:
    """Return what neighbours must share to be one step; what must not be folded has its own number."""
    number, entry = numbered
    match entry:
        case Repeated():
            return (Repeated, entry.status, entry.secret)
        case Heard(outcome="coalesced"):
            return (Heard, entry.status, entry.secret)
        case Failed(verdict="park" | "missing"):
            return (Failed, entry.reason, entry.http)
        case HandedOn(outcome="again"):
            return (HandedOn, entry.sink, entry.revision, entry.reason)
    return (number,)
