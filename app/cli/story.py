"""The trail of an order in sentences."""

from __future__ import annotations

from typing import assert_never

from app.store.trail import (
    Begun,
    Entry,
    Failed,
    GaveUp,
    HandedOn,
    Heard,
    Refused,
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
            return f"fetch {entry.fence} stored: {answer} ({entry.http or '-'}, {entry.duration_ms} ms)"
        case Refused():
            return f"fetch {entry.fence} came too late: a later one has taken over"
        case Failed():
            what = _VERDICTS.get(entry.verdict, entry.verdict)
            return f"fetch {entry.fence} failed: {entry.reason} ({entry.http or '-'}, {entry.duration_ms} ms), {what}"
        case GaveUp():
            return f"given up: {entry.reason}"
        case HandedOn():
            why = f" ({entry.reason})" if entry.reason else ""
            return f"revision {entry.revision} to {entry.sink}: {entry.outcome}{why}, {entry.duration_ms} ms"
        case Revived():
            return f"new tries for {entry.sink}"
        case Unread():
            return entry.text
        case _:
            assert_never(entry)
