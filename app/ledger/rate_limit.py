"""What one API key allows, shared by all workers: slots, a sliding window, Retry-After and a breaker.

The limits hold per Entra app behind the key: 5 requests at once, 6,000 in a sliding 5 minutes (upstream.md 5).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Final, Literal

import msgspec
from redis import Redis

from app.ledger import keys, policy
from app.ledger.redis import source
from app.ledger.work import Outcome

WINDOW: Final = 301 * policy.SECOND
"""One second more than upstream's window: a request is counted there a little later than here."""

LONGEST_RETRY: Final = 60 * policy.MINUTE
"""A Retry-After is cut to this where it is read (app/upstream/client.py)."""


class Slot(msgspec.Struct, frozen=True):
    """The right to make one request now."""

    token: str


class NotNow(msgspec.Struct, frozen=True):
    """No request now; `until` is ms since 1970, `reason` one of throttled, breaker_open, window_full, slots_full."""

    until: int
    reason: str


class Limits(msgspec.Struct, frozen=True):
    """`slot_lease`: ms after which a slot whose worker died is free again."""

    concurrency: int
    backfill_concurrency: int
    requests_per_window: int
    slot_lease: int


class Budget:
    """The budget of one API key. The key itself is not stored: its id is a digest.

    Slots, window and Retry-After belong to the key; the breaker to the key and one `company` (its path), since a
    company whose name is wrong must not close the way for the others of the same key.
    """

    def __init__(self, redis: Redis, api_key: str, company: str, limits: Limits) -> None:
        key_id = _digest(api_key)
        self._redis = redis
        self._limits = limits
        self._budget, self._slots, self._window, self._freed = (
            keys.budget(key_id),
            keys.slots(key_id),
            keys.window(key_id),
            keys.freed(key_id),
        )
        self._breaker = breaker_key(api_key, company)
        self._take = redis.register_script(source("take"))
        self._give = redis.register_script(source("give"))
        self._reclaim = redis.register_script(source("reclaim"))

    def take(self, lane: Literal["live", "backfill"], clock: Callable[[], int], worker: str = "") -> Slot | NotNow:
        """Return a slot, waiting for one at most SLOT_PATIENCE while slots change hands; `worker` is who holds it.

        Where all slots hang, nobody waits: a job of a hanging company costs milliseconds, not its patience.
        """
        token = f"{'b' if lane == 'backfill' else 'l'}-{worker}-{os.urandom(8).hex()}"
        limits = self._limits
        began = clock()
        while True:
            now = clock()
            answer = self._take(
                keys=[self._budget, self._slots, self._window, self._breaker],
                args=[
                    now,
                    token,
                    limits.slot_lease,
                    limits.concurrency,
                    limits.backfill_concurrency,
                    limits.requests_per_window,
                    WINDOW,
                    LONGEST_RETRY,
                    policy.BREAKER_LONGEST,
                ],
            )
            if answer[0] == b"go":
                return Slot(token)
            if answer[0] == b"closed":
                return NotNow(int(answer[1]), answer[2].decode())
            waited = now - began
            # Below zero the clock was set back: patience is not to last until it is there again.
            if not 0 <= waited < policy.SLOT_PATIENCE or answer[1] > policy.SLOT_PATIENCE:
                return NotNow(now + policy.SECOND, "slots_full")
            self._redis.blpop([self._freed], timeout=(policy.SLOT_PATIENCE - waited) / 1000)

    def give(self, slot: Slot, how: Outcome, now: int, *, retry_after: float | None = None) -> tuple[int, bool]:
        """Give the slot back; return until when (ms, 0 = no limit) the key is closed, and whether this opened it.

        `retry_after` is in seconds and holds for all workers of the key.
        """
        until, opened = self._give(
            keys=[self._budget, self._slots, self._freed, self._breaker],
            args=[
                now,
                slot.token,
                how,
                0 if retry_after is None else now + round(retry_after * 1000),
                policy.BREAKER_FAILURES,
                policy.BREAKER_FIRST,
                policy.BREAKER_LONGEST,
                self._limits.concurrency,
            ],
        )
        return until, bool(opened)

    def reclaim(self, worker: str, now: int) -> int:
        """Free the slots that an ended worker held; return how many."""
        held = self._reclaim(
            keys=[self._budget, self._slots, self._freed, self._breaker],
            args=[now, worker, self._limits.concurrency],
        )
        return int(held)


def spent(redis: Redis, api_key: str, now: int) -> int:
    """Return how many requests of the window that ends `now` (ms) were made with an API key."""
    made: Any = redis.zcount(keys.window(_digest(api_key)), now - WINDOW, "+inf")
    return int(made)


def breaker_key(api_key: str, company: str) -> str:
    """Return the key of the breaker of one company's calls (its path) with one API key."""
    return keys.breaker(_digest(f"{api_key}\0{company}"))


def _digest(secret: str) -> str:
    return blake2b(secret.encode(), digest_size=8, person=b"ota-budget").hexdigest()
