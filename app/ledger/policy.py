"""Waits and limits with their reasons, and what an error of upstream means for its order. Times in milliseconds."""

from __future__ import annotations

import random
from typing import Final

import msgspec

from app.errors import Denied, OrderNotFound, Throttled, Unavailable, UpstreamError
from app.ledger.work import Failure, Fetch, PermitOutcome, Released

SECOND: Final = 1000
MINUTE: Final = 60 * SECOND
DAY: Final = 24 * 60 * MINUTE

GRACE: Final = 120 * SECOND
"""A job that was enqueued and not started by then counts as lost; longer than any queue of a healthy day."""

LONGEST_WAIT: Final = 60 * MINUTE
"""The doubling of GRACE for a job enqueued again and again ends here."""

FARTHEST: Final = 180 * MINUTE
"""No wait of ours is longer (2.4 h after the last attempts, 1.25 h between rechecks, 1 h of Retry-After): a later time
was taken from a Redis server whose clock was ahead."""

SAMPLE: Final = 200
"""Orders at either end of a clock that stand for the whole, where a look at all would cost too much."""

LEASE_MARGIN: Final = 40 * SECOND
"""Beyond UPSTREAM_TIMEOUT: a fetch cannot outlive its lease (60 s with the default of 20 s), so it is never renewed."""

LONGEST_LEASE: Final = 100 * SECOND + LEASE_MARGIN
"""With the longest UPSTREAM_TIMEOUT that the settings take."""

JOB_TIMEOUT: Final = 120
"""Seconds after which RQ interrupts a job: one fetch, or one delivery."""

JOB_OVERDUE: Final = JOB_TIMEOUT + 30
"""Seconds after which the pool kills a worker that RQ's interrupt did not reach: a sink swallowed it, or is C code."""

DELIVERY_LEASE: Final = (JOB_OVERDUE + 10) * SECOND
"""A delivery ends with its job, at the latest with its worker; the rest is for a busy machine."""

CRASHES_ALLOWED: Final = 3
"""Fetches of one settlement, or deliveries of one revision, that started and never ended; then `kills_worker`."""

REDIS_WAIT: Final = 20 * SECOND
"""How long a worker that holds no answer waits for Redis to come back before it ends and is started anew."""

NOT_FOUND_GRACE: Final = 120 * SECOND
"""How long a 404 may mean "not yet": the event is sent on commit, so minutes are generous (upstream.md 0)."""

NOT_FOUND_WAITS: Final = (2, 5, 10, 20, 30, 30, 30)
"""Seconds between fetches of an order that upstream does not have yet."""

RECHECK_WAITS: Final = (2, 10, 30, 75)
"""Minutes until an unsettled order is fetched again: upstream sweeps an order stuck in Processing to Error after an
hour, without an event (upstream.md 4)."""

RETRY_WAITS: Final = (5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600) + (7200,) * 12
"""Seconds before each further attempt, 22 over about 26 h: an upstream outage of a day is survived."""

DELIVERY_WAITS: Final = RETRY_WAITS + (7200,) * 23
"""The same for a delivery: 45 over about 72 h, so that a destination may be away over a weekend."""

CLIENT_ERROR_ATTEMPTS: Final = 4
"""Further attempts for an answer that another attempt seldom changes (400, 401, 403, an unreadable body)."""

POSTPONED_SHORTEST: Final = 5 * SECOND
POSTPONED_LONGEST: Final = 2 * 60 * MINUTE
"""The bounds of one wait that a sink asks for: no loop without a pause, and within FARTHEST."""

POSTPONED_FOR: Final = 3 * DAY
"""How long a sink may ask for another time for one revision, such as over a weekend."""

POSTPONED_TOO_LONG: Final = "postponed_too_long"
"""Reason code of its dead letter after that."""

UNCOUNTED_LONGEST: Final = 30 * MINUTE
"""The longest wait while an order fails and no other is answered. Fewer than BREAKER_FAILURES orders do so."""

UNCOUNTED_FOR: Final = sum(RETRY_WAITS) * SECOND
"""How long such an order is attempted. Then somebody must look, and it is requeued when upstream answers another."""

NO_ORDER_ANSWERED: Final = "no_order_answered"
"""Reason code of its dead letter."""

PERMIT_WAIT: Final = 1000
"""How long a job waits for a permit before it ends and its order waits instead: no company blocks another. Two getOrder
calls seldom take longer: with 250 two pools of eight workers fetched at 0.6 of what five calls of 250 ms at once allow,
as orders that had waited in vain were put off for seconds."""

LONGEST_DEFERRAL: Final = 30 * SECOND
"""The longest an order waits beyond the moment at which its key may be used again, however often it was full."""

NO_COMPANY_WAIT: Final = 5 * MINUTE
"""The longest until the next attempt for an order of a company that no running pool knows."""

LONGEST_STEP_ASIDE: Final = 2 * SECOND
"""The longest that a worker rests after a job for other pools: their workers need milliseconds to take it."""

THROTTLED_WAIT: Final = 5 * SECOND
"""For all workers of a key after a 429 without Retry-After (neither side documents one)."""

LONGEST_RETRY: Final = 60 * MINUTE
"""A Retry-After is cut to this where it is read (app/upstream/client.py)."""

BREAKER_FIRST: Final = 15 * SECOND
BREAKER_LONGEST: Final = 5 * MINUTE
BREAKER_FAILURES: Final = 5
"""Orders of a company that fail with no other answered in between, whatever the failure: its breaker opens. One order
or two that always fail must not close the way for the others. Also the attempts in a row whose destination was away,
after which the breaker of a sink opens."""


class Decision(msgspec.Struct, frozen=True):
    """How a fetch failed, and the wait in ms until the next one.

    `unanswered`: no other order was answered since this one failed first, so it is not known to be its own fault.
    """

    outcome: Failure
    reason: str
    wait_ms: int = 0
    unanswered: bool = False


def jittered(milliseconds: float) -> int:
    """Return the time ±20 %, so that what failed together does not come back together."""
    return round(milliseconds * random.uniform(0.8, 1.2))  # noqa: S311  # jitter, no secret


def retry_wait(attempts: int) -> int | None:
    """Return the wait in ms after `attempts` earlier failures, None when no attempt is left."""
    return jittered(RETRY_WAITS[attempts] * SECOND) if attempts < len(RETRY_WAITS) else None


def delivery_wait(attempts: int, after: float | None = None) -> int | None:
    """Return the wait in ms after `attempts` earlier failures of a delivery, None when no attempt is left.

    It is not shorter than `after`, the seconds that a destination asked for, at most POSTPONED_LONGEST.
    """
    if attempts >= len(DELIVERY_WAITS):
        return None
    return max(jittered(DELIVERY_WAITS[attempts] * SECOND), postponed_wait(after) if after else 0)


def postponed_wait(seconds: float) -> int:
    """Return the wait in ms for a delivery whose sink asks for another time, after so many seconds."""
    return round(min(max(seconds * SECOND, POSTPONED_SHORTEST), POSTPONED_LONGEST))


def deferral_wait(deferrals: int) -> int:
    """Return a wait in ms after `deferrals` earlier ones in a row.

    A random time up to a limit that doubles: a long backlog does not spin, and some order is due at any moment. A wait
    of the whole limit delayed one order out of 3,000 by two minutes (measured by tests.chaos).
    """
    longest = min(2**deferrals * SECOND, LONGEST_DEFERRAL)
    return round(random.uniform(0.1 * SECOND, longest))  # noqa: S311  # jitter, no secret


def denied_wait(denied: Denied, fetch: Fetch) -> int:
    """Return a wait in ms for an order whose fetch got no permit.

    After a failure of its own the order waits longer than the others, so that the probe is made for another one.
    """
    is_suspect = denied.reason == "breaker_open" and fetch.failing_since > 0
    return denied.wait_ms + (jittered(LONGEST_DEFERRAL) if is_suspect else deferral_wait(fetch.deferrals))


def no_company_wait(deferrals: int) -> int:
    """Return a wait in ms for an order whose company no running pool knows, after `deferrals` earlier ones."""
    return min(10 * SECOND << min(deferrals, 20), NO_COMPANY_WAIT)


def step_aside(returned: int) -> int:
    """Return how long in ms a worker rests after a job for other pools, when the `returned` before it were such too."""
    return min(50 << min(returned, 20), LONGEST_STEP_ASIDE)


def of_key(error: UpstreamError, missing_ms: int = 0) -> PermitOutcome:
    """Return what the error means for the calls of its company; `missing_ms`: since the order's first 404."""
    if isinstance(error, Throttled):
        return "unknown"
    return "missing" if isinstance(error, OrderNotFound) and missing_ms < NOT_FOUND_GRACE else "failed"


def of_order(error: UpstreamError, fetch: Fetch, released: Released) -> Decision:
    """Return what to do with the order after the release of its permit.

    Each failure may be the fault of the order or of everything: a gateway speaks 400, 403, or 200 with a page, and a
    database that was restored has no order. It uses an attempt, and a 404 is final, only if a call for another order
    was answered that began after this order failed first.
    """
    if isinstance(error, Throttled):
        return Decision("deferred", error.reason, released.closed_ms + deferral_wait(fetch.deferrals))
    if released.closed_ms:
        # Later than the others, as in `denied_wait`.
        return Decision("uncounted", error.reason, released.closed_ms + jittered(LONGEST_DEFERRAL))
    is_missing = isinstance(error, OrderNotFound)
    if is_missing and fetch.missing_ms < NOT_FOUND_GRACE:
        wait = NOT_FOUND_WAITS[min(fetch.attempts, len(NOT_FOUND_WAITS) - 1)]
        return Decision("not_found", error.reason, jittered(wait * SECOND))
    retry_after = round((error.retry_after or 0) * SECOND)
    if not 0 < fetch.failing_since < released.answered_at:
        if fetch.failing_ms >= UNCOUNTED_FOR:
            return Decision("dead", NO_ORDER_ANSWERED, unanswered=True)
        wait = min(max(fetch.failing_ms, RETRY_WAITS[0] * SECOND), UNCOUNTED_LONGEST)
        return Decision("uncounted", error.reason, max(jittered(wait), retry_after))
    if is_missing:
        # deleteOrder removes a Draft or Error order (upstream.md 1); every other status keeps a row.
        is_deleted = fetch.known_status in {"Draft", "Error"}
        return Decision("deleted_upstream", error.reason) if is_deleted else Decision("dead", "order_missing")
    outcome: Failure = "retry"
    made, most = fetch.attempts, len(RETRY_WAITS)
    if not isinstance(error, Unavailable):
        outcome, made, most = "client_error", fetch.client_errors, CLIENT_ERROR_ATTEMPTS
    # The first failure, which is never counted, was followed by the first wait.
    if made + 1 >= most:
        return Decision("dead", error.reason)
    return Decision(outcome, error.reason, max(jittered(RETRY_WAITS[made + 1] * SECOND), retry_after))


def of_internal_error(fetch: Fetch) -> Decision:
    """Return what to do with the order when this service failed, not upstream."""
    wait = retry_wait(fetch.attempts)
    return Decision("dead", "internal_error") if wait is None else Decision("retry", "internal_error", wait)


def of_redis_unavailable() -> Decision:
    """Return what to do with the order when Redis could not be reached before the getOrder: no attempt is used."""
    return Decision("deferred", "redis_unavailable", jittered(2 * SECOND))


def of_unsettled(fetch: Fetch) -> tuple[int, str]:
    """Return the wait in ms until an unsettled order is fetched again, and the reason code once it is dead."""
    if fetch.rechecks >= len(RECHECK_WAITS):
        return 0, "unsettled"
    return jittered(RECHECK_WAITS[fetch.rechecks] * MINUTE), ""
