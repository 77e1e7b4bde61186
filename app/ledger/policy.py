"""The constants of the counters and the clock, in one place, with their reasons. Times in milliseconds.

What an answer of upstream means for its order: the table of docs/architecture.md as one pure function.
"""

from __future__ import annotations

import random
from typing import Final

import msgspec

from app.errors import ConnectionFault, OrderNotFound, RequestRejected, Throttled, UnreadableAnswer, UpstreamError
from app.ledger.work import Failure, Fetch, Outcome

SECOND: Final = 1000
MINUTE: Final = 60 * SECOND
DAY: Final = 24 * 60 * MINUTE

GRACE: Final = 120 * SECOND
"""A job that was pushed and not begun by then is taken for lost; longer than any queue of a healthy day."""

LONGEST_WAIT: Final = 60 * MINUTE
"""The doubling of GRACE for a job pushed again and again ends here."""

FARTHEST: Final = 180 * MINUTE
"""No wait of ours is longer (2.4 h after the last tries, 1.25 h between looks, 1 h of Retry-After): what is due later
was written by a clock that was ahead."""

LEASE_MARGIN: Final = 40 * SECOND
"""Beyond UPSTREAM_TIMEOUT: a fetch cannot outlive its lease (60 s with the default of 20 s), so nobody renews it."""

JOB_TIMEOUT: Final = 120
"""Seconds after which RQ interrupts a job: one fetch and its hand-ons."""

JOB_OVERDUE: Final = JOB_TIMEOUT + 30
"""Seconds after which the pool kills a worker that RQ's interrupt did not reach: a sink swallowed it, or is C code."""

HAND_LEASE: Final = (JOB_OVERDUE + 10) * SECOND
"""A hand-on ends with its job, at the latest with its worker; the rest is for a busy machine."""

CRASHES_ALLOWED: Final = 3
"""Fetches of one settlement, or hand-ons of one revision, that began and never ended; then `kills_worker`."""

REDIS_PATIENCE: Final = 20 * SECOND
"""How long a worker with nothing in hand waits for Redis to come back before it ends and is started anew."""

MISSING_GRACE: Final = 120 * SECOND
"""How long a 404 may mean "not yet": the event is sent on commit, so minutes are generous (upstream.md 0)."""

MISSING_AGAIN: Final = (2, 5, 10, 20, 30, 30, 30)
"""Seconds between looks at an order that is not there yet."""

LOOKS: Final = (2, 10, 30, 75)
"""Minutes until an unsettled order is looked at again: an order stuck in Processing is swept to Error after an
hour, and no event tells (upstream.md 4)."""

TRIES: Final = (5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600) + (7200,) * 12
"""Seconds before each further try, 22 over about 26 h: an upstream outage of a day is survived."""

FEW_TRIES: Final = 4
"""Tries for an answer that another try seldom mends (400, an unreadable body)."""

SLOT_PATIENCE: Final = 250
"""How long a job waits for a slot before it sets its order's score and ends: no company blocks another."""

LONGEST_TURN: Final = 30 * SECOND
"""The longest an order waits beyond the moment at which its key may be used again, however often it was full."""

BREAKER_FIRST: Final = 15 * SECOND
BREAKER_LONGEST: Final = 5 * MINUTE
BREAKER_FAILURES: Final = 5
"""Failures in a row, over all workers of a key, that open its breaker; a connection fault opens it at once."""


def spread(milliseconds: float) -> int:
    """Return the time ±20 %, so that what failed together does not come back together."""
    return round(milliseconds * random.uniform(0.8, 1.2))  # noqa: S311  # jitter, no secret


def until_next_try(tries: int) -> int | None:
    """Return the wait in ms after `tries` earlier failures, None when there is none left."""
    return spread(TRIES[tries] * SECOND) if tries < len(TRIES) else None


def until_next_turn(parks: int) -> int:
    """Return a wait in ms after `parks` earlier ones in a row.

    Any moment up to a limit that doubles: a long backlog does not spin, and somebody is there at once. A wait of the
    whole limit let one order out of 3,000 come home two minutes late (measured by tests.chaos).
    """
    return round(random.uniform(0.1 * SECOND, min(2**parks * SECOND, LONGEST_TURN)))  # noqa: S311  # jitter, no secret


THROTTLED_WAIT = 5.0
"""Seconds for all workers of a key after a 429 without Retry-After (neither side documents one)."""


class Decision(msgspec.Struct, frozen=True):
    """What becomes of the order, and when it is looked at again (ms since 1970)."""

    what: Failure
    reason: str
    due: int = 0


def of_connection(error: UpstreamError) -> Outcome:
    """Return what the error says of the API key: answered (it works), failed, fault (it does not)."""
    if isinstance(error, ConnectionFault):
        return "fault"
    works = isinstance(error, OrderNotFound | RequestRejected | UnreadableAnswer | Throttled)
    return "answered" if works else "failed"


def of_order(error: UpstreamError, fetch: Fetch, now: int, closed_until: int) -> Decision:
    """Return what to do with the order; `closed_until` is the breaker's word, ms since 1970."""
    if isinstance(error, ConnectionFault | Throttled):
        return Decision("park", error.reason, max(closed_until, now) + spread(2 * SECOND))
    if isinstance(error, OrderNotFound):
        return _missing(fetch, now)
    if isinstance(error, RequestRejected | UnreadableAnswer):
        if fetch.rejects >= FEW_TRIES:
            return Decision("dead", error.reason)
        pause = spread(TRIES[fetch.rejects] * SECOND)
        return Decision("reject", error.reason, max(now + pause, closed_until))
    wait = until_next_try(fetch.tries)
    if wait is None:
        return Decision("dead", error.reason)
    return Decision("again", error.reason, max(now + wait, closed_until))


def of_own_fault(fetch: Fetch, now: int) -> Decision:
    """Return what to do with the order when not upstream failed, but we: `internal_error`."""
    wait = until_next_try(fetch.tries)
    return Decision("dead", "internal_error") if wait is None else Decision("again", "internal_error", now + wait)


def of_redis_away(now: int) -> Decision:
    """Return what to do with the order when our own books could not be reached: no try is burnt for that."""
    return Decision("park", "redis_away", now + spread(2 * SECOND))


def of_look(fetch: Fetch, now: int) -> tuple[int, str]:
    """Return when an unsettled order is looked at again, and the reason to give up when it is not any more."""
    if fetch.looks >= len(LOOKS):
        return now, "unsettled"
    return now + spread(LOOKS[fetch.looks] * MINUTE), ""


def _missing(fetch: Fetch, now: int) -> Decision:
    since = fetch.missing or now
    if now - since < MISSING_GRACE:
        wait = MISSING_AGAIN[min(fetch.tries, len(MISSING_AGAIN) - 1)]
        return Decision("missing", "order_not_found", now + spread(wait * SECOND))
    # deleteOrder removes a Draft or Error order (upstream.md 1); every other status keeps a row.
    if fetch.known in {"Draft", "Error"}:
        return Decision("gone", "order_not_found")
    return Decision("dead", "order_missing")
