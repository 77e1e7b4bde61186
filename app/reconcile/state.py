"""What reconciling one company remembers in Redis: how far its list was read, and when the next run is due.

Row versions may commit out of order, so a run never starts from the highest one seen. It starts from a checkpoint that
is at least LAG old. Rows that committed since with a lower version are read again, which costs nothing, since pending
and fetched orders are not discrepancies.

Row versions are numbers of a foreign database, which may be restored or copied: then they start lower again, and
nothing is listed after the old checkpoint. So a checkpoint lies before the last OVERLAP rows, and the next run must see
some of their orders again, the anchors. One row with an absurd version is one anchor of many, and moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal

import msgspec
from redis.exceptions import LockError

from app.ledger import policy
from app.ledger.redis import Redis

LAG: Final = 10 * policy.MINUTE
"""Longer than any transaction of upstream: the gateway ends an operation after 8 minutes (upstream.md 5)."""

OVERLAP: Final = 20
"""Rows with the highest versions, which the next run reads again; a shorter list is always read from the start."""

ANCHORS_SEEN: Final = 2
"""So many must be listed again: one may carry an absurd version, others may be of Draft orders deleted since."""

FIRST_AFTER: Final = 60 * policy.SECOND
"""From the first look at a company (or after a flush of Redis) to its first run: the settings may still be wrong."""

AGAIN_AFTER: Final = 60 * policy.SECOND
"""After a run that died, or that used up its share."""

TRIGGER_EVERY: Final = 5 * policy.MINUTE
"""Rejected events cause at most one run in this time: they are as likely an attack as a wrong CLIENT_STATE."""

Cause = Literal["scheduled", "rejected_events"]


class DueRun(msgspec.Struct, frozen=True):
    """A run; `triggers` as counted before it starts: rejected events that come meanwhile cause another run."""

    cause: Cause
    triggers: int


class Checkpoint:
    """The checkpoints, the watched orders and those that differ for good of one company; `now` is ms since 1970."""

    def __init__(self, redis: Redis, company_id: str) -> None:
        self._redis = redis
        names = redis.names
        self._versions = names.reconcile_checkpoints(company_id)
        self._anchors = names.reconcile_anchors(company_id)
        self._watch = names.reconcile_watch(company_id)
        self._differing = names.reconcile_differing(company_id)

    def start(self, now: int) -> int:
        """Return the row version to read from, 0 for the whole list."""
        return max(self._old(now), default=0)

    def anchors(self) -> set[str]:
        """Return the ids of the orders of which a run that reads from `start` on must see some again."""
        found: Any = self._redis.smembers(self._anchors)
        return {order_id.decode() for order_id in found}

    def save(self, highest: Mapping[str, int], listed_at: int, now: int) -> None:
        """Record that every order up to these rows, order id -> version, as listed at `listed_at`, is as upstream's.

        They are the OVERLAP highest so far. Call it after the discrepancies of the page were queued: then a run that
        dies is only repeated.
        """
        with self._redis.pipeline(transaction=True) as pipe:
            # The earlier time of a version counts: it makes the checkpoint old enough.
            pipe.zadd(self._versions, {str(min(highest.values()) - 1): listed_at}, lt=True)
            pipe.delete(self._anchors)
            pipe.sadd(self._anchors, *highest)
            pipe.execute()
        if superseded := sorted(self._old(now))[:-1]:
            self._redis.zrem(self._versions, *(str(one) for one in superseded))

    def forget(self) -> None:
        """Delete the checkpoints: the row versions have started lower again."""
        self._redis.delete(self._versions, self._anchors)

    def report_for_good(self, rows: Mapping[str, str], keep: int) -> set[str]:
        """Note orders that differ for good, order id -> digest of the row; return those new since the last report.

        They are remembered for `keep` ms after the last new one.
        """
        if not rows:
            return set()
        known: Any = self._redis.hmget(self._differing, list(rows))
        new = {order_id for order_id, old in zip(rows, known, strict=True) if old != rows[order_id].encode()}
        if new:
            self._redis.hset(self._differing, mapping={order_id: rows[order_id] for order_id in new})
            self._redis.pexpire(self._differing, keep)
        return new

    def watched(self) -> dict[str, int]:
        """Return order id -> ms when it was first seen unsettled."""
        found: Any = self._redis.zrange(self._watch, 0, -1, withscores=True)
        return {order_id.decode(): int(since) for order_id, since in found}

    def watch(self, order_ids: Iterable[str], now: int) -> None:
        """Compare these orders again in later runs; those watched already keep their time."""
        if members := dict.fromkeys(order_ids, now):
            self._redis.zadd(self._watch, members, nx=True)

    def unwatch(self, order_ids: Iterable[str]) -> None:
        """Stop watching these orders."""
        if members := list(order_ids):
            self._redis.zrem(self._watch, *members)

    def _old(self, now: int) -> list[int]:
        found: Any = self._redis.zrangebyscore(self._versions, "-inf", now - LAG)
        return [int(version) for version in found]


class Schedule:
    """When one company is reconciled; `now` is ms since 1970, `lease` the ms that a run may last.

    A lease lets one machine work at a time. When a run dies its lease ends, and the run is due again. `every` is the
    longest wait for the next run, in ms: what was planned with a longer one, or by a clock that was ahead, is due then.
    """

    def __init__(self, redis: Redis, company_id: str, lease: int, every: int) -> None:
        self._redis = redis
        self._every = every
        self._key = self._redis.names.reconcile(company_id)
        self._lease_key = self._redis.names.reconcile_lease(company_id)
        self._lease = lease

    def due(self, now: int) -> DueRun | None:
        """Return the run that is due, None if none is."""
        names = ("next_run_at", "triggers", "triggers_handled", "next_trigger_at", "not_before")
        found: Any = self._redis.hmget(self._key, names)
        next_run_at, triggers, handled, next_trigger_at, not_before = (int(value or 0) for value in found)
        if not next_run_at:
            next_run_at = now + FIRST_AFTER
            self._redis.hsetnx(self._key, "next_run_at", str(next_run_at))
        elif next_run_at - now > self._every:
            next_run_at = now + self._every
            self._redis.hset(self._key, "next_run_at", str(next_run_at))
        if now < not_before <= now + AGAIN_AFTER:
            return None
        if triggers != handled and not now < next_trigger_at <= now + TRIGGER_EVERY:
            return DueRun("rejected_events", triggers)
        return DueRun("scheduled", triggers) if now >= next_run_at else None

    @contextmanager
    def acquire(self, now: int) -> Iterator[DueRun | None]:
        """Yield the run that is due, under the lease; None if none is, or another machine has the lease."""
        lock = self._redis.lock(self._lease_key, timeout=self._lease / 1000, blocking=False, thread_local=False)
        if not lock.acquire():
            yield None
            return
        try:
            run = self.due(now)
            if run is not None:
                # Before the work: a run that kills its process must not start again each second.
                self._redis.hset(self._key, "next_run_at", str(now + AGAIN_AFTER))
            if run is not None and run.cause == "rejected_events":
                self._redis.hset(self._key, "next_trigger_at", str(now + TRIGGER_EVERY))
            yield run
        finally:
            with suppress(LockError):  # it has ended, or Redis was flushed: nothing is left to release
                lock.release()

    def complete(self, run: DueRun, next_run_at: int) -> None:
        """Record that the whole list was read."""
        self._redis.hset(self._key, mapping={"next_run_at": next_run_at, "triggers_handled": run.triggers})

    def retry(self, at: int) -> None:
        """Record that the run failed; it is due again at `at`, or earlier if events are rejected."""
        self._redis.hset(self._key, "next_run_at", str(at))

    def postpone(self, until: int) -> None:
        """Record that the run ended early; none starts before `until`, whatever the cause."""
        self._redis.hset(self._key, mapping={"next_run_at": until, "not_before": until})


def next_runs(redis: Redis, company_ids: Iterable[str]) -> dict[str, int]:
    """Return when the list of each company is read next, in ms since 1970; 0 where no run is planned."""
    ids = list(company_ids)
    with redis.pipeline(transaction=False) as pipe:
        for company_id in ids:
            pipe.hget(redis.names.reconcile(company_id), "next_run_at")
        found: list[Any] = pipe.execute()
    return {company_id: int(at or 0) for company_id, at in zip(ids, found, strict=True)}
