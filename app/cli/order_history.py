"""The history of an order as sentences, as steps in time, and as durations of fetch and delivery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import Final, assert_never

import msgspec

from app import times
from app.cli import console
from app.ledger.history import (
    DeadLettered,
    DeliveryEnded,
    DeliveryRetried,
    Discarded,
    DuplicateReceived,
    Entry,
    Erased,
    EventReceived,
    FetchFailed,
    FetchRefused,
    FetchRequested,
    FetchStarted,
    FetchStored,
    Redelivered,
    Unread,
)
from app.upstream.models import UNSETTLED

_STEP_INDENT: Final = 24
_MS: Final = timedelta(milliseconds=1)


class Step(msgspec.Struct, frozen=True):
    """One thing that happened at `at`, or the same thing `times` times until `until`.

    `what` is the kind of history entry, `since_ms` the time since the step before.
    """

    at: datetime
    since_ms: int | None
    what: str
    text: str
    times: int
    until: datetime


class Requested(msgspec.Struct, frozen=True):
    """A fetch or a delivery that was requested `by` a person, a replay or reconcile; ms since then, None if not yet."""

    by: str
    fetched_ms: int | None = None
    delivered_ms: int | None = None


class Durations(msgspec.Struct, frozen=True):
    """ms from the latest fetched event until its fetch and its latest delivery; None if not (yet).

    `requested` is the latest request since that event, or the one that fetched it after all (a requeue).
    """

    fetched_ms: int | None = None
    delivered_ms: int | None = None
    requested: Requested | None = None


_FAILED = {
    "retry": "will retry",
    "client_error": "will retry",
    "deferred": "deferred, does not count as an attempt",
    "not_found": "not there yet, will retry",
    "dead": "now a dead letter",
    "deleted_upstream": "deleted upstream",
}
_DELIVERED = {"retry": "will retry", "dead": "now a dead letter"}


def describe(entry: Entry) -> str:
    """Return a history entry in words."""
    match entry:
        case EventReceived():
            return f"event {entry.event_id}: {entry.status}, {entry.outcome} (secret {entry.secret})"
        case DuplicateReceived():
            return f"duplicate event: {entry.status}, ignored (secret {entry.secret})"
        case FetchRequested():
            return f"fetch requested by {entry.reason} ({entry.queue} queue)"
        case FetchStarted():
            return f"fetch {entry.token} started by {entry.worker}"
        case FetchStored():
            answer = f"{entry.status}, revision {entry.revision}"
            return f"fetch {entry.token} stored: {answer}{_call(entry.http, entry.duration_ms)}"
        case FetchRefused():
            return f"fetch {entry.token} came too late: a later fetch replaced it"
        case FetchFailed():
            outcome = _FAILED.get(entry.outcome, entry.outcome)
            return f"fetch {entry.token} failed: {entry.reason}{_call(entry.http, entry.duration_ms)}, {outcome}"
        case DeadLettered():
            return f"now a dead letter: {entry.reason}"
        case DeliveryEnded(outcome="succeeded"):
            return f"revision {entry.revision} delivered to {entry.sink} in {entry.duration_ms} ms"
        case DeliveryEnded():
            failed = f"delivery of revision {entry.revision} to {entry.sink} failed: {entry.reason}"
            return f"{failed} after {entry.duration_ms} ms, {_DELIVERED.get(entry.outcome, entry.outcome)}"
        case DeliveryRetried():
            return f"delivery to {entry.sink} requeued"
        case Redelivered():
            return f"another delivery to {entry.sink} requested by replay {entry.plan}"
        case Discarded():
            what = f"the delivery to {entry.sink}" if entry.sink else "the fetch"
            return f"{what} was discarded by hand ({entry.reason})"
        case Erased():
            return "erased, with everything known about the order until then"
        case Unread():
            return entry.text
        case _:
            assert_never(entry)


def _call(http: int, duration_ms: int) -> str:
    if http:
        return f" (HTTP {http} in {duration_ms} ms)"
    # Without a permit, or with the breaker open, there was no call.
    return f" (no answer in {duration_ms} ms)" if duration_ms else ""


def steps(history: Sequence[Entry]) -> tuple[Step, ...]:
    """Return the history as steps: equal neighbours are one step."""
    # The start of a fetch that failed adds nothing to its end.
    failed = {entry.token for entry in history if isinstance(entry, FetchFailed | FetchRefused)}
    shown = [entry for entry in history if not (isinstance(entry, FetchStarted) and entry.token in failed)]
    found: list[Step] = []
    before: datetime | None = None
    for _, group in groupby(enumerate(shown), key=_likeness):
        entries = [entry for _, entry in group]
        first, last = entries[0], entries[-1]
        since = None if before is None else round((first.at - before) / _MS)
        before = last.at
        what = str(first.__struct_config__.tag)
        found.append(Step(first.at, since, what, describe(last), len(entries), last.at))
    return tuple(found)


def _likeness(numbered: tuple[int, Entry]) -> tuple[object, ...]:
    """Return what neighbours must share to be one step; the entry's number if it is always one by itself."""
    number, entry = numbered
    match entry:
        case DuplicateReceived():
            return (DuplicateReceived, entry.status, entry.secret)
        case EventReceived(outcome="coalesced"):
            return (EventReceived, entry.status, entry.secret)
        case FetchFailed(outcome="deferred" | "not_found"):
            return (FetchFailed, entry.reason, entry.http)
        case DeliveryEnded(outcome="retry"):
            return (DeliveryEnded, entry.sink, entry.revision, entry.reason)
    return (number,)


def step_lines(found: Sequence[Step]) -> Iterator[str]:
    """Return steps on lines of 80 columns: local time, time since the step before, what happened."""
    day = None
    for step in found:
        local = step.at.astimezone()
        if local.date() != day:
            day = local.date()
            yield f"{day.isoformat()} ({local.tzname()})"
        clock = f"{local:%H:%M:%S}.{local.microsecond // 1000:03}"
        since = "" if step.since_ms is None else f"+{times.span(step.since_ms)}"
        text = step.text if step.times == 1 else f"{step.text}; {step.times} times until {_until(step)}"
        yield from console.wrap(text, f"{clock}{since:>10}  ", " " * _STEP_INDENT)


def _until(step: Step) -> str:
    local = step.until.astimezone()
    same_day = local.date() == step.at.astimezone().date()
    return f"{local:%H:%M:%S}" if same_day else f"{local:%m-%d %H:%M:%S}"


def durations(history: Sequence[Entry]) -> Durations:
    """Return how long fetch and delivery took, as far as the history reaches.

    A fetch covers the events and requests before its start: an event that arrives while it runs belongs to the next.
    """
    reading = _Reading()
    for entry in history:
        reading.read(entry)
    event = reading.event
    return Durations(event.fetched_ms, event.delivered_ms, reading.requested)


class _Reading:
    """The history read so far."""

    def __init__(self) -> None:
        self.event = Requested("event")
        self.requested: Requested | None = None
        self._causes: list[EventReceived | FetchRequested] = []
        self._settled = 0
        # Fencing token -> number of causes when that fetch started. A fetch whose start is no longer kept covers none.
        self._started: dict[int, int] = {}
        self._event_at = self._request_at = datetime.max
        self._revision = 0
        self._redelivered: set[str] = set()

    def read(self, entry: Entry) -> None:
        match entry:
            case EventReceived() | FetchRequested():
                self._causes.append(entry)
            case FetchStarted():
                self._started[entry.token] = len(self._causes)
            case FetchStored():
                self._stored(entry)
            case FetchFailed(outcome="deleted_upstream"):
                self._settled = max(self._settled, self._started.get(entry.token, 0))
            case Discarded(sink=""):
                self._settled = len(self._causes)
            case Redelivered():
                if not self._redelivered:
                    self._request_at, self.requested = entry.at, Requested(f"replay:{entry.plan}")
                self._redelivered.add(entry.sink)
            case DeliveryEnded(outcome="succeeded"):
                self._delivered(entry)

    def _stored(self, entry: FetchStored) -> None:
        end = self._started.get(entry.token, 0)
        covered = self._causes[self._settled : end]
        event = next((one for one in covered if isinstance(one, EventReceived)), None)
        request = next((one for one in covered if isinstance(one, FetchRequested)), None)
        if event is not None:
            self._event_at, self._revision = event.at, entry.revision
            self.event, self.requested = Requested("event", _between(event.at, entry.at)), None
        if request is not None:
            self._request_at = request.at
            self.requested = Requested(request.reason, _between(request.at, entry.at))
        self._redelivered.clear()
        # An unsettled order is still pending: its next fetch counts from the same event.
        if entry.status not in UNSETTLED:
            self._settled = max(self._settled, end)

    def _delivered(self, entry: DeliveryEnded) -> None:
        requested = self.requested
        if entry.sink in self._redelivered or (requested is not None and entry.revision > self._revision):
            took = _between(self._request_at, entry.at)
            self.requested = requested and msgspec.structs.replace(requested, delivered_ms=took)
        elif self.event.fetched_ms is not None and entry.revision == self._revision:
            self.event = msgspec.structs.replace(self.event, delivered_ms=_between(self._event_at, entry.at))


def _between(start: datetime, end: datetime) -> int:
    return round((end - start) / _MS)
