"""How far one company's list of orders has been read, and which unsettled orders are to be looked at again.

Row versions may commit out of order, so reading never starts from the highest one seen, but from a mark: the highest
that was on a page at least LAG ago. What has committed since with a lower one is read again; reading twice costs
nothing, since what is owed or home is no gap.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from redis import Redis

from app.store import clockwork, keys

LAG: Final = 10 * clockwork.MINUTE
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
