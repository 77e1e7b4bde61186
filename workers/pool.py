"""The pool: starts, names and watches the worker processes, and keeps the clock of the ledger going.

It knows its children by name: what a dead one held is due at once, not when its lease ends.

What a forked child of the pool does: dies with its pool, works one queue off, and ends with a code that says why.

What a pool says while Redis is away: one line when it goes and one when it comes back, however long it takes.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from typing import Final

from redis import Redis
from redis.exceptions import RedisError

from app import bootstrap, log
from app.errors import OtherSchema
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.redis import VERSION, refuse_other_schema
from app.ledger.retention import Retention
from app.ledger.rq_jobs import BACKFILL, LIVE
from app.settings import Settings
from app.upstream.transport import tls_context
from workers.background import Reconciler, Watchman
from workers.recovery import Estate, lane_of
from workers.worker import BAD_SETTINGS, Stopwatch, Work, start, work

_log = log.get()


class RedisWatch:
    """Remembers since when Redis has been away."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._away_since: float | None = None

    def lost(self, error: Exception) -> None:
        """Note that Redis did not answer; the next question is asked on a fresh connection."""
        # After a failover an old connection may lead to what is a replica now.
        self._redis.connection_pool.disconnect()
        if self._away_since is None:
            self._away_since = time.monotonic()
            _log.warning("redis.unavailable", role="worker", error=type(error).__name__)

    def found(self) -> None:
        """Note that Redis answered."""
        if self._away_since is not None:
            _log.warning("redis.recovered", role="worker", away_s=round(time.monotonic() - self._away_since, 1))
            self._away_since = None


TICK: Final = 1.0
"""Seconds between two looks at what is due."""

STOP_MARGIN: Final = 10.0
"""Seconds beyond UPSTREAM_TIMEOUT that a stopping pool waits for fetches under way; what is cut off is due at once."""

NEWER_DATA: Final = 4
"""Exit code when a newer version of ours has written to Redis: an old one that worked on would misread it."""

FAILED: Final = 1
"""Exit code after a fault of ours; a supervisor starts the pool again."""

RESTART_PAUSE: Final = 1.0
"""Seconds between two starts of a worker: one that dies at once must not spin."""


class Pool:
    """Worker processes of one machine, and the ticker.

    A worker that is `overdue` seconds at one job is killed: RQ's time limit did not end it.
    """

    def __init__(
        self,
        settings: Settings,
        redis: Redis,
        ledger: Ledger,
        *,
        work: Work = work,
        overdue: float = policy.JOB_OVERDUE,
    ) -> None:
        self._settings = settings
        self._redis = redis
        self._ledger = ledger
        self._work = work
        self._overdue = overdue
        limiters = [bootstrap.rate_limiter(settings, company, redis) for company in settings.companies]
        self._estate = Estate(redis, ledger, limiters)
        self._reconciler = Reconciler(settings, redis)
        self._watchman = Watchman(settings, redis)
        self._retention = Retention(redis, event_days=settings.event_days, order_days=settings.order_days)
        self._children: dict[str, ForkProcess] = {}
        self._watches: dict[str, Stopwatch] = {}
        self._born: dict[str, float] = {}
        self._watch = RedisWatch(redis)
        self._starts: list[tuple[float, str]] = []
        self._number = 0
        self._wake, self._waker = os.pipe()
        self._stopping = False
        self._exit_code = 0

    def run(self) -> int:
        """Work until SIGTERM or SIGINT; then let every worker finish its fetch. Return the exit code."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        self._wait_for_redis()
        lanes = [LIVE] * self._settings.workers + [BACKFILL] * self._settings.backfill_workers
        self._starts = [(0.0, lane) for lane in lanes]
        tls_context()
        # A collection in a worker would write to each object's header, and so copy every page it shares with the pool.
        gc.collect()
        gc.freeze()
        try:
            self._work_on()
        except Exception as error:
            # A fault of ours: end as a whole. Workers without a ticker, and a parent that waits for them, help nobody.
            _log.error("pool.failed", error=type(error).__name__, trace=log.trace_of(error))
            self._exit_code = FAILED
        finally:
            self._end()
        return self._exit_code

    def _work_on(self) -> None:
        next_tick = 0.0
        while not self._stopping:
            self._kill_overdue()
            try:
                self._reap()
                self._start_due()
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK
                    self._tick()
            except (RedisError, OSError) as error:
                self._watch.lost(error)
                self._rest(TICK)
                continue
            except OtherSchema as refusal:
                self._refuse(refusal)
                break
            self._watch.found()
            sentinels = [child.sentinel for child in self._children.values()]
            wait([self._wake, *sentinels], max(0.0, next_tick - time.monotonic()))

    def _stop(self, *_: object) -> None:
        self._stopping = True
        os.write(self._waker, b".")

    def _rest(self, seconds: float) -> None:
        """Wait, but not for one who was told to stop."""
        wait([self._wake], seconds)

    def _wait_for_redis(self) -> None:
        told = False
        while not self._stopping:
            try:
                refuse_other_schema(self._redis)
            except OtherSchema as refusal:
                self._refuse(refusal)
            except (RedisError, OSError):
                if not told:
                    _log.warning("service.waiting", what="redis")
                    told = True
                self._rest(TICK)
            else:
                return

    def _refuse(self, refusal: OtherSchema) -> None:
        _log.error("service.other_schema", held=refusal.held, ours=VERSION)
        self._exit_code = NEWER_DATA
        self._stopping = True

    def _start_due(self) -> None:
        now = time.monotonic()
        for due in [one for one in self._starts if one[0] <= now]:
            self._start(due[1])
            # Only now: a fork that fails (no memory, no process left) is tried again.
            self._starts.remove(due)

    def _start(self, lane: str) -> None:
        self._number += 1
        name = f"{self._estate.pool}-{lane}-{self._number}"
        watch = Stopwatch()
        self._children[name] = start(self._work, self._settings, name, lane, watch)
        self._watches[name] = watch
        self._born[name] = time.monotonic()
        _log.info("pool.worker_started", worker=name, queue=lane)

    def _kill_overdue(self) -> None:
        """End workers that a sink, or whatever it may be, holds beyond RQ's time limit: it cannot strike in C code."""
        for name, child in self._children.items():
            busy = self._watches[name].seconds()
            if busy > self._overdue and child.is_alive():
                child.kill()
                child.join(TICK)
                _log.error("worker.timed_out", worker=name, busy_s=round(busy))

    def _reap(self) -> None:
        for name, child in [item for item in self._children.items() if not item[1].is_alive()]:
            lane, exit_code = lane_of(name), child.exitcode
            # One that ended by itself gave up on Redis: what it held has not harmed it.
            held = self._estate.let_go(name, "killed" if (exit_code or 0) < 0 else "ended")
            del self._children[name]
            self._watches.pop(name).close()
            child.close()
            _log.error("pool.worker_died", worker=name, exit_code=exit_code, order_id=held.order_id if held else None)
            if exit_code == BAD_SETTINGS:
                self._exit_code = exit_code
                self._stopping = True
            self._starts.append((self._born.pop(name) + RESTART_PAUSE, lane))

    def _tick(self) -> None:
        self._estate.beat(self._children)
        self._estate.bury_dead_pools()
        dispatched = self._ledger.dispatch_due()
        if dispatched.looked:
            _log.info("dispatcher.enqueued", looked=dispatched.looked, enqueued=dispatched.enqueued)
        if dispatched.broken:
            _log.error("dispatcher.orders_broken", orders=dispatched.broken)
        self._retention.trim_each_minute()
        self._reconciler.tick()
        self._watchman.tick()

    def _end(self) -> None:
        self._reconciler.stop()
        for child in self._children.values():
            child.terminate()
        deadline = time.monotonic() + self._settings.upstream_timeout + STOP_MARGIN
        for child in self._children.values():
            child.join(max(0.0, deadline - time.monotonic()))
            if child.is_alive():
                child.kill()
                child.join()
        try:
            for name in self._children:
                # Also one that we cut off: that was the stop's doing, not the order's.
                self._estate.let_go(name, "ended")
            self._estate.leave()
        except OtherSchema:
            # Our entry stays: the pool of the newer version finds it, and lets go of what our workers held.
            pass
        except (RedisError, OSError) as error:
            self._watch.lost(error)
        _log.info("service.stopped", role="worker")


def run(settings: Settings) -> int:
    """Run a pool until it is told to stop; return the exit code: 0, BAD_SETTINGS or NEWER_DATA."""
    redis = bootstrap.worker_redis(settings)
    try:
        return Pool(settings, redis, bootstrap.ledger(settings, redis)).run()
    finally:
        redis.close()
