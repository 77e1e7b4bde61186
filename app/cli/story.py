"""The trail of an order in sentences."""

from __future__ import annotations

from typing import assert_never

from app.store.trail import (
    Begun,
    Dropped,
    Entry,
    Erased,
    Failed,
    GaveUp,
    HandedOn,
    Heard,
    Refused,
    Rehanded,
    Repeated,
    Revived,
    Stored,
    Unread,
    Wanted,
)

_VERDICTS = {
    "again": "will be tried again",
    "park": "parked, no try is burnt",
    "missing": "not there yet",
    "dead": "given up",
    "gone": "deleted upstream",
}


def sentence(entry: Entry) -> str:
    """Return what an entry says."""
    match entry:
        case Heard():
            return f"event {entry.event_id}: {entry.status}, {entry.outcome} (secret {entry.secret})"
        case Repeated():
            return f"the same event again: {entry.status}, dropped (secret {entry.secret})"
        case Wanted():
            return f"asked for by {entry.why}, queue {entry.queue}"
        case Begun():
            return f"fetch {entry.fence} begun by {entry.worker}"
        case Stored():
            answer = f"{entry.status}, revision {entry.revision}"
            return f"fetch {entry.fence} stored: {answer}{_call(entry.http, entry.duration_ms)}"
        case Refused():
            return f"fetch {entry.fence} came too late: a later one has taken over"
        case Failed():
            what = _VERDICTS.get(entry.verdict, entry.verdict)
            return f"fetch {entry.fence} failed: {entry.reason}{_call(entry.http, entry.duration_ms)}, {what}"
        case GaveUp():
            return f"given up: {entry.reason}"
        case HandedOn():
            why = f" ({entry.reason})" if entry.reason else ""
            return f"revision {entry.revision} to {entry.sink}: {entry.outcome}{why}, {entry.duration_ms} ms"
        case Revived():
            return f"new tries for {entry.sink}"
        case Rehanded():
            return f"the stored revision is owed to {entry.sink} once more, by replay {entry.plan}"
        case Dropped():
            what = f"the hand-on to {entry.sink}" if entry.sink else "the fetch"
            return f"{what} given up for good, by hand ({entry.reason})"
        case Erased():
            return "erased: all else that was known of it"
        case Unread():
            return entry.text
        case _:
            assert_never(entry)


def _call(http: int | None, duration_ms: int) -> str:
    if http is not None:
        return f" (HTTP {http} in {duration_ms} ms)"
    # No call at all was made: no slot was free, or the breaker was open.
    return f" (no answer in {duration_ms} ms)" if duration_ms else ""
