"""Whose turn it is to be reconciled, and why: by the clock, or because events with a wrong clientState came.

Machines agree through Redis: a lease lets one of them work at a time, and who gets it after another has finished
finds that nothing is due any more. A run that dies gives its lease up when it expires, and is due again by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal

import msgspec
from redis import Redis
from redis.exceptions import LockError

from app.store import clockwork, keys

FIRST_AFTER: Final = 60 * clockwork.SECOND
"""From the first sight of a company (or of a flushed Redis) to its first run: the settings may still be tried out."""

AGAIN_AFTER: Final = 60 * clockwork.SECOND
"""After a run that died, or that used up its share."""

ASKED_EVERY: Final = 5 * clockwork.MINUTE
"""At most one run in that time is caused by rejected events: they are as likely an attack as our own mistake."""

Cause = Literal["timed", "asked"]


class Turn(msgspec.Struct, frozen=True):
    """One run; `asks` as they were counted before it began: those that come meanwhile want another."""

    cause: Cause
    asks: int


class Turns:
    """The times of one company; `now` is ms since 1970, `lease` ms that a run may last."""

    def __init__(self, redis: Redis, company_id: str, lease: int) -> None:
        self._redis = redis
        self._key = keys.reconcile(company_id)
        self._lease_key = keys.reconcile_lease(company_id)
        self._lease = lease

    def due(self, now: int) -> Turn | None:
        """Return the run that is due, None if none is."""
        found: Any = self._redis.hmget(self._key, "next", "asks", "heeded", "ask_after", "not_before")
        next_, asks, heeded, ask_after, not_before = (int(value or 0) for value in found)
        if not next_:
            next_ = now + FIRST_AFTER
            self._redis.hsetnx(self._key, "next", str(next_))
        if now < not_before:
            return None
        if asks != heeded and now >= ask_after:
            return Turn("asked", asks)
        return Turn("timed", asks) if now >= next_ else None

    @contextmanager
    def taken(self, now: int) -> Iterator[Turn | None]:
        """Yield the run that is due, under the lease; None if none is, or another machine is at it."""
        lock = self._redis.lock(self._lease_key, timeout=self._lease / 1000, blocking=False, thread_local=False)
        if not lock.acquire():
            yield None
            return
        try:
            turn = self.due(now)
            if turn is not None:
                self._begin(turn, now)
            yield turn
        finally:
            with suppress(LockError):  # it has expired, or Redis was flushed: there is nothing left to give back
                lock.release()

    def complete(self, turn: Turn, following: int) -> None:
        """Record that the whole list was read; `following` is when the next run is due by the clock."""
        self._redis.hset(self._key, mapping={"next": following, "heeded": turn.asks})

    def again(self, at: int) -> None:
        """Record that the run failed, and is to be tried again at `at`."""
        self._redis.hset(self._key, "next", str(at))

    def postpone(self, until: int) -> None:
        """Record that the run ended early, and let none begin before `until`, whatever asks for it."""
        self._redis.hset(self._key, mapping={"next": until, "not_before": until})

    def _begin(self, turn: Turn, now: int) -> None:
        # Before the work: a run that kills its process must not begin anew each second.
        self._redis.hset(self._key, "next", str(now + AGAIN_AFTER))
        if turn.cause == "asked":
            self._redis.hset(self._key, "ask_after", str(now + ASKED_EVERY))
