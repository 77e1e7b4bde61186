"""How far one company's list of orders has been read, and which unsettled orders are to be looked at again.

Row versions may commit out of order, so reading never starts from the highest one seen, but from a mark: the highest
that was on a page at least LAG ago. What has committed since with a lower one is read again; reading twice costs
nothing, since what is owed or home is no gap.

Whose turn it is to be reconciled, and why: by the clock, or because events with a wrong clientState came.

Machines agree through Redis: a lease lets one of them work at a time, and who gets it after another has finished
finds that nothing is due any more. A run that dies gives its lease up when it expires, and is due again by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal

import msgspec
from redis import Redis
from redis.exceptions import LockError

from app.ledger import keys, policy

LAG: Final = 10 * policy.MINUTE
"""Longer than any transaction of upstream runs: the gateway ends an operation after 8 minutes (upstream.md 5)."""


class Cursor:
    """The marks and the watched orders of one company; `now` is ms since 1970."""

    def __init__(self, redis: Redis, company_id: str) -> None:
        self._redis = redis
        self._marks = keys.reconcile_marks(company_id)
        self._watch = keys.reconcile_watch(company_id)

    def start(self, now: int) -> int:
        """Return the row version to read from, 0 for all: where nothing is known, everything comes home."""
        return max(self._old_marks(now), default=0)

    def mark(self, row_version: int, listed_at: int, now: int) -> None:
        """Remember that everything up to `row_version`, as listed at `listed_at`, is owed or home.

        Call after the gaps of that page were queued, never before: a run that dies is then only repeated.
        """
        # Seen twice, the earlier time counts: it is what makes the mark old enough.
        self._redis.zadd(self._marks, {str(row_version): listed_at}, lt=True)
        old = self._old_marks(now)
        if superseded := sorted(old)[:-1]:
            self._redis.zrem(self._marks, *(str(one) for one in superseded))

    def watched(self) -> dict[str, int]:
        """Return order id -> ms when it was first seen unsettled."""
        found: Any = self._redis.zrange(self._watch, 0, -1, withscores=True)
        return {order_id.decode(): int(since) for order_id, since in found}

    def watch(self, order_ids: Iterable[str], now: int) -> None:
        """Look at these orders again in later runs; those watched already keep their time."""
        if members := dict.fromkeys(order_ids, now):
            self._redis.zadd(self._watch, members, nx=True)

    def unwatch(self, order_ids: Iterable[str]) -> None:
        """Look at these orders no more."""
        if members := list(order_ids):
            self._redis.zrem(self._watch, *members)

    def _old_marks(self, now: int) -> list[int]:
        found: Any = self._redis.zrangebyscore(self._marks, "-inf", now - LAG)
        return [int(mark) for mark in found]


FIRST_AFTER: Final = 60 * policy.SECOND
"""From the first sight of a company (or of a flushed Redis) to its first run: the settings may still be tried out."""

AGAIN_AFTER: Final = 60 * policy.SECOND
"""After a run that died, or that used up its share."""

ASKED_EVERY: Final = 5 * policy.MINUTE
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
