"""The trail of one order: each line that a script noted, as a typed entry.

A line is `<ms> <word> <values>`; which values stands in the script that writes it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec

from app.times import from_ms


class _Entry(msgspec.Struct, frozen=True, tag_field="what"):
    at: datetime


class Heard(_Entry, frozen=True, tag="event"):
    """An event came; `outcome` is queued, coalesced or erased (accept)."""

    event_id: str
    status: str
    outcome: str
    secret: str
    request_id: str


class Repeated(_Entry, frozen=True, tag="duplicate"):
    """An event came again, and was dropped (accept)."""

    status: str
    secret: str
    request_id: str


class Wanted(_Entry, frozen=True, tag="wanted"):
    """Somebody asked for a fetch: replay, requeue, refetch (want)."""

    why: str
    queue: str


class Begun(_Entry, frozen=True, tag="begin"):
    """A worker began a fetch for the settlement with this number (begin)."""

    settlement: int
    fence: int
    worker: str


class Stored(_Entry, frozen=True, tag="stored"):
    """An answer of getOrder was stored (finish)."""

    fence: int
    status: str
    revision: int
    http: int | None
    duration_ms: int


class Refused(_Entry, frozen=True, tag="refused"):
    """A fetch came too late: one that began after it has taken over (finish, fail)."""

    fence: int


class Failed(_Entry, frozen=True, tag="failed"):
    """A fetch ended without an order; `verdict`: again, park, missing, dead, gone (fail)."""

    verdict: str
    fence: int
    reason: str
    http: int | None
    duration_ms: int


class GaveUp(_Entry, frozen=True, tag="dead"):
    """The order was given up without a failed call: it stayed unsettled, or ends its workers (finish, begin)."""

    reason: str


class HandedOn(_Entry, frozen=True, tag="sink"):
    """A sink was given a revision; `outcome`: done, again, dead (handed)."""

    sink: str
    revision: int
    outcome: str
    reason: str
    duration_ms: int


class Revived(_Entry, frozen=True, tag="revived"):
    """A sink that had been given up gets new tries (revive_sink)."""

    sink: str


class Dropped(_Entry, frozen=True, tag="dropped"):
    """What was given up for `reason` was given up for good, by hand: the fetch (`sink` is "") or a hand-on (drop)."""

    reason: str
    sink: str


class Rehanded(_Entry, frozen=True, tag="rehand"):
    """A replay owes the stored revision to a sink once more (rehand)."""

    plan: str
    sink: str


class Erased(_Entry, frozen=True, tag="erased"):
    """All else that was known of the order was erased (erase)."""


class Unread(_Entry, frozen=True, tag="unread"):
    """A line of another version of the scripts."""

    text: str


Entry = (
    Heard
    | Repeated
    | Wanted
    | Begun
    | Stored
    | Refused
    | Failed
    | GaveUp
    | HandedOn
    | Revived
    | Dropped
    | Rehanded
    | Erased
    | Unread
)

LONGEST: Final = 200
"""Lines that the scripts keep of one order (trail.lua)."""


def parse_line(line: str) -> Entry:
    """Return what a line of the trail says; never raises."""
    ms, _, rest = line.partition(" ")
    if not (ms.isascii() and ms.isdigit()):
        return Unread(from_ms(0), line)
    at = from_ms(int(ms))
    try:
        return _entry(at, rest.split(" "))
    except ValueError:
        return Unread(at, rest)


def _entry(at: datetime, words: list[str]) -> Entry:
    match words:
        case ["event", event_id, status, outcome, secret, request_id]:
            return Heard(at, event_id, status, outcome, secret, request_id)
        case ["duplicate", status, secret, request_id]:
            return Repeated(at, status, secret, request_id)
        case ["wanted", why, queue]:
            return Wanted(at, why, queue)
        case ["begin", settlement, fence, worker]:
            return Begun(at, int(settlement), int(fence), worker)
        # Upstream's own word for the status may hold blanks.
        case ["stored", fence, *status, revision, http, duration]:
            return Stored(at, int(fence), " ".join(status), int(revision), _http(http), int(duration))
        case ["refused", fence]:
            return Refused(at, int(fence))
        case ["again" | "park" | "missing" | "dead" | "gone" as verdict, fence, reason, http, duration]:
            return Failed(at, verdict, int(fence), reason, _http(http), int(duration))
        case ["dead", reason]:
            return GaveUp(at, reason)
        case ["sink", sink, revision, outcome, reason, duration]:
            return HandedOn(at, sink, int(revision), outcome, "" if reason == "-" else reason, int(duration))
        case ["revived", sink]:
            return Revived(at, sink)
        case ["rehand", plan, sink]:
            return Rehanded(at, plan, sink)
        case ["erased"]:
            return Erased(at)
        case ["dropped", reason, *sink] if len(sink) < 2:
            return Dropped(at, reason, "".join(sink))
    return Unread(at, " ".join(words))


def _http(text: str) -> int | None:
    return None if text == "-" else int(text)
