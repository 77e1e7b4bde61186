"""The history of an order as sentences, as steps in time, and as durations of fetch and delivery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import Final

import msgspec

from app import times
from app.ledger import history as kinds
from app.upstream.models import UNSETTLED

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


_TEXTS: Final[dict[type[kinds.Entry], str]] = {
    kinds.EventReceived: "event {0.event_id}: {0.status}, {0.outcome} (secret {0.secret}, request {0.request_id})",
    kinds.DuplicateReceived: "duplicate event: {0.status}, ignored (secret {0.secret}, request {0.request_id})",
    kinds.FetchRequested: "fetch requested by {0.reason} ({0.queue} queue)",
    kinds.FetchStarted: "fetch {0.token} started by {0.worker}",
    kinds.FetchStored: "fetch {0.token} stored: {0.status}, revision {0.revision}{call}",
    kinds.FetchRefused: "fetch {0.token} came too late: a later fetch replaced it",
    kinds.FetchFailed: "fetch {0.token} failed: {0.reason}{call}, {outcome}",
    kinds.DeadLettered: "now a dead letter: {0.reason}",
    kinds.WorkerCrashed: "{0.worker} ended or froze during the delivery to {0.sink}",
    kinds.DeliveryEnded: (
        "delivery of revision {0.revision} to {0.sink} failed: {0.reason} after {0.duration_ms} ms, {outcome}"
    ),
    kinds.DeliveryRetried: "delivery to {0.sink} requeued",
    kinds.Redelivered: "another delivery to {0.sink} requested by replay {0.plan}",
    kinds.Discarded: "the delivery to {0.sink} was discarded by hand ({0.reason})",
    kinds.Erased: "erased, with everything known about the order until then",
    kinds.Unread: "{0.text}",
}
_OUTCOMES: Final = {
    "retry": "will retry",
    "client_error": "will retry",
    "deferred": "deferred, does not count as an attempt",
    "uncounted": "perhaps all orders fail: does not count as an attempt",
    "not_found": "not there yet, will retry",
    "dead": "now a dead letter",
    "disabled": "so the sink is disabled, does not count as an attempt",
    "deleted_upstream": "deleted upstream",
}


def describe(entry: kinds.Entry) -> str:
    """Return a history entry in words."""
    text, call, outcome = _TEXTS[type(entry)], "", ""
    match entry:
        case kinds.FetchStored():
            call = _call(entry.http_status, entry.duration_ms)
        case kinds.FetchFailed():
            call = _call(entry.http_status, entry.duration_ms)
            outcome = _OUTCOMES.get(entry.outcome, entry.outcome)
        case kinds.DeliveryEnded(outcome="succeeded"):
            text = "revision {0.revision} delivered to {0.sink} in {0.duration_ms} ms"
        case kinds.DeliveryEnded(outcome="skipped"):
            text = "delivery of revision {0.revision} to {0.sink} skipped: {0.reason}"
        case kinds.DeliveryEnded(outcome="postponed"):
            text = "revision {0.revision} postponed by {0.sink} after {0.duration_ms} ms: {0.reason}"
        case kinds.DeliveryEnded(outcome="rejected"):
            text = "revision {0.revision} rejected by {0.sink}, now a dead letter: {0.reason}"
        case kinds.DeliveryEnded():
            outcome = _OUTCOMES.get(entry.outcome, entry.outcome)
        case kinds.WorkerCrashed(sink=""):
            text = "{0.worker} ended or froze during its fetch"
        case kinds.Discarded(sink=""):
            text = "the fetch was discarded by hand ({0.reason})"
    return text.format(entry, call=call, outcome=outcome)


def _call(http: int, duration_ms: int) -> str:
    if http:
        return f" (HTTP {http} in {duration_ms} ms)"
    # Without a permit, or with the breaker open, there was no call.
    return f" (no answer in {duration_ms} ms)" if duration_ms else ""


def steps(history: Sequence[kinds.Entry]) -> tuple[Step, ...]:
    """Return the history as steps: equal neighbours are one step."""
    # The start of a fetch that failed adds nothing to its end.
    failed = {entry.token for entry in history if isinstance(entry, kinds.FetchFailed | kinds.FetchRefused)}
    shown = [entry for entry in history if not (isinstance(entry, kinds.FetchStarted) and entry.token in failed)]
    found: list[Step] = []
    before: datetime | None = None
    for _, group in groupby(enumerate(shown), key=_likeness):
        entries = [entry for _, entry in group]
        first, last = entries[0], entries[-1]
        # An entry without a time came with its neighbours.
        known = None if first.at_ms else next((entry.at for entry in (*entries, *shown) if entry.at_ms), None)
        start, end = (first.at, last.at) if known is None else (before or known, before or known)
        since = None if before is None else round((start - before) / _MS)
        before = end
        what = str(first.__struct_config__.tag)
        found.append(Step(start, since, what, describe(last), len(entries), end))
    return tuple(found)


def _likeness(numbered: tuple[int, kinds.Entry]) -> tuple[object, ...]:
    """Return what neighbours must share to be one step; the entry's number if it never shares a step."""
    number, entry = numbered
    match entry:
        case kinds.DuplicateReceived():
            return (kinds.DuplicateReceived, entry.status, entry.secret)
        case kinds.EventReceived(outcome="coalesced"):
            return (kinds.EventReceived, entry.status, entry.secret)
        case kinds.FetchFailed(outcome="deferred" | "uncounted" | "not_found"):
            return (kinds.FetchFailed, entry.reason, entry.http_status)
        case kinds.DeliveryEnded(outcome="retry" | "postponed"):
            return (kinds.DeliveryEnded, entry.sink, entry.revision, entry.outcome, entry.reason)
    return (number,)


def durations(history: Sequence[kinds.Entry]) -> Durations:
    """Return how long fetch and delivery took, as far as the history reaches.

    A fetch covers the events and requests before its start: an event that arrives while it runs belongs to the next.
    """
    causes: list[kinds.EventReceived | kinds.FetchRequested] = []
    settled = 0
    # Fencing token -> number of causes when that fetch started. A fetch whose start is no longer kept covers none.
    started: dict[int, int] = {}
    event, event_at, revision = Requested("event"), datetime.max, 0
    requested, requested_at = Requested(""), datetime.max
    redelivered: set[str] = set()
    for entry in history:
        match entry:
            case kinds.EventReceived() | kinds.FetchRequested():
                causes.append(entry)
            case kinds.FetchStarted():
                started[entry.token] = len(causes)
            case kinds.FetchFailed(outcome="deleted_upstream"):
                settled = max(settled, started.get(entry.token, 0))
            case kinds.Discarded(sink=""):
                settled = len(causes)
            case kinds.FetchStored():
                end = started.get(entry.token, 0)
                covered = causes[settled:end]
                if first := next((one for one in covered if isinstance(one, kinds.EventReceived)), None):
                    event, event_at = Requested("event", _between(first.at, entry.at)), first.at
                    revision, requested = entry.revision, Requested("")
                if request := next((one for one in covered if isinstance(one, kinds.FetchRequested)), None):
                    requested, requested_at = Requested(request.reason, _between(request.at, entry.at)), request.at
                redelivered.clear()
                # An unsettled order is still pending: its next fetch counts from the same event.
                if entry.status not in UNSETTLED:
                    settled = max(settled, end)
            case kinds.Redelivered():
                if not redelivered:
                    requested, requested_at = Requested(f"replay:{entry.plan}"), entry.at
                redelivered.add(entry.sink)
            case kinds.DeliveryEnded(outcome="succeeded"):
                if entry.sink in redelivered or (requested.by and entry.revision > revision):
                    requested = msgspec.structs.replace(requested, delivered_ms=_between(requested_at, entry.at))
                elif event.fetched_ms is not None and entry.revision == revision:
                    event = msgspec.structs.replace(event, delivered_ms=_between(event_at, entry.at))
    return Durations(event.fetched_ms, event.delivered_ms, requested if requested.by else None)


def took(found: Durations) -> Iterator[str]:
    """Return the durations in words: those since the event, then those since the request."""
    event = Requested("event", found.fetched_ms, found.delivered_ms)
    for one in filter(None, (event if found.fetched_ms is not None else None, found.requested)):
        fetched = "" if one.fetched_ms is None else f"fetched after {times.span(one.fetched_ms)}"
        delivered = "" if one.delivered_ms is None else f"last delivery after {times.span(one.delivered_ms)}"
        if took := ", ".join(filter(None, (fetched, delivered))):
            yield f"{one.by}: {took}"


def _between(start: datetime, end: datetime) -> int:
    return round((end - start) / _MS)
