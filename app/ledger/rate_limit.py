"""What one API key allows, shared by all workers: permits, a sliding window, Retry-After and a breaker.

The limits hold per Entra app behind the key: 5 requests at once, 6,000 in a sliding 5 minutes (upstream.md 5).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from hashlib import blake2b
from types import TracebackType
from typing import Any, Final, Literal, Self

import msgspec
from redis.exceptions import RedisError

from app import log
from app.errors import ConnectionFault, Denied, UpstreamError
from app.ledger import policy
from app.ledger.redis import Redis, Script, retry_until
from app.ledger.work import PermitAnswer, PermitOutcome, Released

_log = log.get()

WINDOW: Final = 301 * policy.SECOND
"""One second more than upstream's window: a request is counted there a little later than here."""


class Limits(msgspec.Struct, frozen=True):
    """`permit_lease`: ms after which the permit of a worker that died is free again."""

    concurrency: int
    backfill_concurrency: int
    requests_per_window: int
    permit_lease: int


class Permit:
    """The right to make one request now; leaving its `with` block releases it, with what ended the block."""

    def __init__(self, release: Callable[[BaseException | None, int], Released]) -> None:
        self._release = release
        self._is_released = False

    def failed(self, error: UpstreamError, missing_ms: int = 0) -> Released:
        """Release it after a request that failed; `missing_ms`: since the first 404 of its order, 0 without one.

        Raises what redis-py raises.
        """
        self._is_released = True
        return self._release(error, missing_ms)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_released:
            return
        # The block's own error is what counts; the lease ends by itself.
        with suppress(RedisError) if error else nullcontext():
            self._release(error, 0)


class RateLimiter:
    """The limits of one API key. The key itself is not stored: its id is a digest.

    Permits, window and Retry-After belong to the key; the breaker to the key and one `company` (its path), since a
    company whose name is wrong must not close the way for the others of the same key. Calls of a `route`, which are not
    about one order, have a breaker of their own, which a connection fault opens at once. `slug` names the company in
    the log; `clock` (ms since 1970) replaces the time of the Redis server in tests.
    """

    def __init__(
        self,
        redis: Redis,
        api_key: str,
        company: str,
        limits: Limits,
        *,
        slug: str = "",
        route: str = "",
        clock: Callable[[], int] | None = None,
    ) -> None:
        self._redis = redis
        self._slug = slug
        self._call = route or "get_order"
        self._route = route
        self._limits: dict[str, Any] = {
            "key": key_id(api_key),
            "breaker": breaker_id(api_key, company, route),
            "lease": limits.permit_lease,
            "concurrency": limits.concurrency,
            "backfill_concurrency": limits.backfill_concurrency,
            "requests": limits.requests_per_window,
            "window": WINDOW,
            "longest_retry": policy.LONGEST_RETRY,
            "longest_open": policy.BREAKER_LONGEST,
            "wait": policy.PERMIT_WAIT,
        }
        self._acquire = Script(redis, "acquire_permit", clock)
        self._release = Script(redis, "release_permit", clock)

    def request(self, worker: str) -> dict[str, Any]:
        """Return what `Ledger.start_fetch` needs to ask for a permit that `worker` holds; one for each fetch."""
        return {"limits": self._limits, "holder": f"{worker}-{os.urandom(8).hex()}"}

    def permit(
        self,
        queue: Literal["live", "backfill"],
        worker: str = "",
        *,
        order: str = "",
        deadline: float = 0.0,
        asked: PermitAnswer | None = None,
    ) -> Permit:
        """Return a permit for a call about `order`, waiting for one at most PERMIT_WAIT while permits change hands.

        `worker` is its holder; `asked` is the answer if the start of the fetch has asked. While all permits hang, no
        call waits: a job of a hanging company takes milliseconds. Its release is retried until `deadline`
        (time.monotonic) while Redis is unavailable. Raises Denied.
        """
        answer = asked or self._ask(f"{queue[0]}-{self.request(worker)['holder']}", self._limits["wait"])
        if answer.outcome == "full" and answer.wait_ms:
            # Another worker hands its permit over, and it is ours when this returns.
            handed: Any = self._redis.blpop([self._redis.names.granted(answer.token)], timeout=answer.wait_ms / 1000)
            is_ours = handed is not None and handed[1] == b"granted"
            answer = PermitAnswer("granted", answer.token) if is_ours else self._ask(answer.token, 0)
        if answer.outcome == "closed":
            raise Denied(answer.wait_ms, answer.reason)
        if answer.outcome == "full":
            raise Denied(policy.SECOND, "permits_full")
        return Permit(partial(self._release_permit, answer.token, order, deadline))

    def _ask(self, token: str, wait_ms: int) -> PermitAnswer:
        packed = self._acquire(limits=self._limits, permit=token, wait=wait_ms)
        return msgspec.msgpack.decode(packed, type=PermitAnswer)

    def _release_permit(
        self, token: str, order: str, deadline: float, error: BaseException | None, missing_ms: int
    ) -> Released:
        """Release a permit as good, or with what an error means; a 429's wait holds for all workers of the key."""
        outcome: PermitOutcome = "failed" if error else "good"
        reason, status, retry_ms, failures = "internal_error", None, 0, policy.BREAKER_FAILURES
        if isinstance(error, UpstreamError):
            outcome, reason, status = policy.of_key(error, missing_ms), error.reason, error.http_status
            wait = policy.THROTTLED_WAIT if status == 429 else 0
            retry_ms = wait if error.retry_after is None else round(error.retry_after * 1000)
            failures = 1 if self._route and isinstance(error, ConnectionFault) else failures
        call = partial(
            self._call_release,
            permit=token,
            order=order,
            outcome=outcome,
            retry_after=retry_ms,
            failures=failures,
            reason=reason,
            http=status or 0,
        )
        released = retry_until(self._redis, deadline, call)
        if released.opened:
            open_s = round(released.closed_ms / 1000)
            _log.error(
                "upstream.breaker_opened",
                company=self._slug,
                what=self._call,
                reason=reason,
                http_status=status,
                open_s=open_s,
            )
        return released

    def release_worker(self, worker: str) -> None:
        """Release the permits that an ended worker held."""
        self._call_release(worker=worker)

    def _call_release(self, **known: Any) -> Released:
        """Call the script with what is known; by default nothing is."""
        nothing = {"permit": "", "worker": "", "order": "", "outcome": "unknown", "reason": "", "http": 0}
        closed_ms, opened, answered_at = self._release(
            limits=self._limits,
            call=self._call,
            first_open=policy.BREAKER_FIRST,
            longest_open=policy.BREAKER_LONGEST,
            **(nothing | {"retry_after": 0, "failures": 0} | known),
        )
        return Released(int(closed_ms), bool(opened), int(answered_at))


def spent(redis: Redis, key: str, now: int) -> int:
    """Return how many requests of the window that ends `now` (ms) were made with the API key of this id."""
    made: Any = redis.zcount(redis.names.window(key), now - WINDOW, "+inf")
    return int(made)


def key_id(api_key: str) -> str:
    """Return the id of an API key, which does not reveal it."""
    return _digest(api_key)


def breaker_id(api_key: str, company: str, route: str = "") -> str:
    """Return the id of the breaker of one company's calls (its path) with one API key; it reveals neither."""
    return _digest("\0".join((api_key, company, route)))


def _digest(secret: str) -> str:
    return blake2b(secret.encode(), digest_size=8, person=b"ota-limiter").hexdigest()
