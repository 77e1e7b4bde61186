"""The pool: starts and watches the worker processes of one machine, and runs the dispatcher each second."""

from __future__ import annotations

import gc
import os
import signal
import time
from functools import partial
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from typing import Final

import msgspec
from redis import Redis
from redis.exceptions import RedisError

from app import bootstrap, log
from app.errors import OtherSchema
from app.ledger import policy
from app.ledger.due_check import DueCheck
from app.ledger.ledger import Ledger
from app.ledger.redis import VERSION, refuse_other_schema
from app.ledger.retention import Retention
from app.ledger.rq_jobs import BACKFILL, LIVE
from app.settings import Settings
from app.upstream.client import warm_up
from workers import jobs
from workers.background import AlertEvaluator, ReconcileRunner
from workers.recovery import WorkerRecovery
from workers.worker import BAD_SETTINGS, Stopwatch, Work, fork, work

DISPATCH_EVERY: Final = 1.0
"""Seconds between two looks at what is due."""

RESTART_PAUSE: Final = 1.0
"""Seconds between two starts of a worker, so that one that dies at once does not spin."""

STOP_MARGIN: Final = 10.0
"""Seconds beyond UPSTREAM_TIMEOUT that a stopping pool waits for fetches under way; it then kills the workers."""

FAILED: Final = 1
"""Exit code after an internal error; a supervisor starts the pool again."""

NEWER_DATA: Final = 4
"""Exit code when a newer version has written to Redis: this one would misread the data."""

_log = log.get()


class Child(msgspec.Struct, frozen=True):
    """A worker process; `started` is a time of time.monotonic."""

    process: ForkProcess
    queue: str
    stopwatch: Stopwatch
    started: float


class RedisWatch:
    """Since when Redis has been unavailable; logs the begin and the end of each outage once."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._since: float | None = None

    def lost(self, error: Exception) -> None:
        """Note that Redis did not answer; the next call uses a fresh connection."""
        # After a failover an old connection may lead to what is now a replica.
        self._redis.connection_pool.disconnect()
        if self._since is None:
            self._since = time.monotonic()
            _log.warning("redis.unavailable", role="worker", error=type(error).__name__)

    def found(self) -> None:
        """Note that Redis answered."""
        if self._since is not None:
            _log.warning("redis.recovered", role="worker", away_s=round(time.monotonic() - self._since, 1))
            self._since = None


class Pool:
    """The worker processes of one machine and the dispatcher; `overdue` seconds at one job kill a worker."""

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
        self._recovery = WorkerRecovery(redis, ledger, limiters)
        self._reconcile = ReconcileRunner(settings, redis)
        self._alerts = AlertEvaluator(settings, redis)
        self._retention = Retention(redis, event_days=settings.event_days, order_days=settings.order_days)
        self._due_check = DueCheck(redis)
        self._redis_watch = RedisWatch(redis)
        self._children: dict[str, Child] = {}
        queues = [LIVE] * settings.workers + [BACKFILL] * settings.backfill_workers
        self._starts = [(0.0, queue) for queue in queues]
        self._number = 0
        self._next_dispatch = 0.0
        self._wake, self._waker = os.pipe()
        self._stopping = False
        self._exit_code = 0

    def run(self) -> int:
        """Work until SIGTERM or SIGINT, then let every worker finish its fetch. Return the exit code."""
        signal.signal(signal.SIGTERM, self._request_stop)
        signal.signal(signal.SIGINT, self._request_stop)
        try:
            while not self._stopping:
                self._kill_overdue()
                try:
                    self._work_on()
                except (RedisError, OSError) as error:
                    self._redis_watch.lost(error)
                    # Not for the children: one that has ended stays in the list until Redis is back.
                    wait([self._wake], DISPATCH_EVERY)
                else:
                    self._redis_watch.found()
                    sentinels = [child.process.sentinel for child in self._children.values()]
                    wait([self._wake, *sentinels], max(0.0, self._next_dispatch - time.monotonic()))
        except OtherSchema as refusal:
            _log.error("service.other_schema", held=refusal.held, ours=VERSION)
            self._exit_code = NEWER_DATA
        except Exception as error:
            # End as a whole: workers without a dispatcher, and a parent that waits for them, are of no use.
            _log.error("pool.failed", error=type(error).__name__, trace=log.trace_of(error))
            self._exit_code = FAILED
        finally:
            self._stop()
        return self._exit_code

    def _request_stop(self, *_: object) -> None:
        self._stopping = True
        os.write(self._waker, b".")

    def _work_on(self) -> None:
        """Do all that is due now; raises OtherSchema, and what Redis raises."""
        refuse_other_schema(self._redis)
        self._release_ended()
        if time.monotonic() >= self._next_dispatch:
            self._next_dispatch = time.monotonic() + DISPATCH_EVERY
            self._dispatch()
        self._start_due()

    def _start_due(self) -> None:
        now = time.monotonic()
        due = [queue for at, queue in self._starts if at <= now]
        if not due:
            return
        if self._number == 0:
            self._warm_up()
        # A worker must not share our connection.
        self._redis.connection_pool.disconnect()
        self._starts = [start for start in self._starts if start[0] > now]
        for queue in due:
            self._start(queue)
        self._recovery.heartbeat(self._children)

    def _warm_up(self) -> None:
        """Build and import before the first fork what every worker needs, so that the workers share the memory."""
        jobs.prepare_clients(self._settings)
        warm_up(self._settings.companies[0])
        import_module("_strptime")  # RQ imports it with its first job
        # A collection in a worker would write to each object's header, and so copy every page it shares with the pool.
        gc.collect()
        gc.freeze()

    def _start(self, queue: str) -> None:
        self._number += 1
        name = self._recovery.worker_name(queue, self._number)
        stopwatch = Stopwatch()
        try:
            process = fork(name, partial(self._work, self._settings, name, queue, stopwatch))
        except OSError as error:
            # The system has no memory or no process left.
            _log.error("pool.worker_failed", worker=name, error=type(error).__name__)
            self._starts.append((time.monotonic() + RESTART_PAUSE, queue))
            return
        self._children[name] = Child(process, queue, stopwatch, time.monotonic())
        _log.info("pool.worker_started", worker=name, queue=queue)

    def _kill_overdue(self) -> None:
        """Kill workers whose job has outlasted RQ's time limit, which cannot end C code."""
        for name, child in self._children.items():
            busy = child.stopwatch.seconds()
            if busy > self._overdue and child.process.is_alive():
                child.process.kill()
                child.process.join(1.0)
                _log.error("worker.timed_out", worker=name, busy_s=round(busy))

    def _release_ended(self) -> None:
        """Release what ended workers held, and plan their successors."""
        for name, child in [one for one in self._children.items() if not one[1].process.is_alive()]:
            exit_code = child.process.exitcode
            # A worker that ended by itself lost Redis: that is no crash of its order.
            order = self._recovery.release(name, "killed" if (exit_code or 0) < 0 else "ended")
            del self._children[name]
            child.process.close()
            _log.error("pool.worker_died", worker=name, exit_code=exit_code, order_id=order.order_id if order else None)
            if exit_code == BAD_SETTINGS:
                self._exit_code = exit_code
                self._request_stop()
            self._starts.append((child.started + RESTART_PAUSE, child.queue))

    def _dispatch(self) -> None:
        """Do what a pool does each second; every pool does it, and none waits for another."""
        self._recovery.heartbeat(self._children)
        self._recovery.recover_dead_pools()
        dispatched = self._ledger.dispatch_due()
        if dispatched.due:
            _log.info("dispatcher.enqueued", due=dispatched.due, enqueued=dispatched.enqueued)
        if dispatched.broken:
            _log.error("dispatcher.orders_broken", orders=dispatched.broken)
        if found := self._due_check.step():
            _log.error("dispatcher.orders_found", orders=found)
        self._retention.trim_each_minute()
        self._reconcile.tick()
        self._alerts.tick()

    def _stop(self) -> None:
        """Let the workers finish, kill those that do not, and release what they held."""
        self._reconcile.stop()
        for child in self._children.values():
            child.process.terminate()
        deadline = time.monotonic() + self._settings.upstream_timeout + STOP_MARGIN
        for child in self._children.values():
            child.process.join(max(0.0, deadline - time.monotonic()))
            if child.process.is_alive():
                child.process.kill()
                child.process.join()
        try:
            for name in self._children:
                # Also one that we killed: that was the stop's doing, not the order's.
                self._recovery.release(name, "ended")
            self._recovery.remove_heartbeat()
        except OtherSchema:
            # Our heartbeat stays: the pool of the newer version finds it, and releases what our workers held.
            pass
        except (RedisError, OSError) as error:
            self._redis_watch.lost(error)
        _log.info("service.stopped", role="worker")


def run(settings: Settings) -> int:
    """Run a pool until a signal stops it; return the exit code: 0, BAD_SETTINGS, FAILED or NEWER_DATA."""
    redis = bootstrap.worker_redis(settings)
    try:
        return Pool(settings, redis, bootstrap.ledger(settings, redis)).run()
    finally:
        redis.close()
