"""What an answer of upstream means for its order: the table of docs/architecture.md as one pure function."""

from __future__ import annotations

import msgspec

from app.errors import (
    ConnectionFault,
    OrderNotFound,
    RequestRejected,
    Throttled,
    UnreadableAnswer,
    UpstreamError,
)
from app.store import clockwork
from app.store.budget import Outcome
from app.store.work import Failure, Fetch

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
        return Decision("park", error.reason, max(closed_until, now) + clockwork.spread(2 * clockwork.SECOND))
    if isinstance(error, OrderNotFound):
        return _missing(fetch, now)
    if isinstance(error, RequestRejected | UnreadableAnswer):
        if fetch.rejects >= clockwork.FEW_TRIES:
            return Decision("dead", error.reason)
        pause = clockwork.spread(clockwork.TRIES[fetch.rejects] * clockwork.SECOND)
        return Decision("reject", error.reason, max(now + pause, closed_until))
    wait = clockwork.until_next_try(fetch.tries)
    if wait is None:
        return Decision("dead", error.reason)
    return Decision("again", error.reason, max(now + wait, closed_until))


def of_own_fault(fetch: Fetch, now: int) -> Decision:
    """Return what to do with the order when not upstream failed, but we: `internal_error`."""
    wait = clockwork.until_next_try(fetch.tries)
    return Decision("dead", "internal_error") if wait is None else Decision("again", "internal_error", now + wait)


def of_redis_away(now: int) -> Decision:
    """Return what to do with the order when our own books could not be reached: no try is burnt for that."""
    return Decision("park", "redis_away", now + clockwork.spread(2 * clockwork.SECOND))


def of_look(fetch: Fetch, now: int) -> tuple[int, str]:
    """Return when an unsettled order is looked at again, and the reason to give up when it is not any more."""
    if fetch.looks >= len(clockwork.LOOKS):
        return now, "unsettled"
    return now + clockwork.spread(clockwork.LOOKS[fetch.looks] * clockwork.MINUTE), ""


def _missing(fetch: Fetch, now: int) -> Decision:
    since = fetch.missing or now
    if now - since < clockwork.MISSING_GRACE:
        wait = clockwork.MISSING_AGAIN[min(fetch.tries, len(clockwork.MISSING_AGAIN) - 1)]
        return Decision("missing", "order_not_found", now + clockwork.spread(wait * clockwork.SECOND))
    # deleteOrder removes a Draft or Error order (upstream.md 1); every other status keeps a row.
    if fetch.known in {"Draft", "Error"}:
        return Decision("gone", "order_not_found")
    return Decision("dead", "order_missing")
