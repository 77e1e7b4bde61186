"""The pool: starts, names and watches the worker processes, and keeps the clock of the ledger going.

It knows its children by name: what a dead one held is due at once, not when its lease ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from typing import Final

import msgspec
from redis import Redis
from redis.exceptions import RedisError
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE
from rq.utils import as_text

from app import bootstrap, log
from app.errors import SettingsError
from app.settings import Settings
from app.store import clockwork, keys
from app.store.jobs import BACKFILL, LIVE, queue
from app.store.keys import OrderKey
from app.store.ledger import Ledger
from workers import jobs, process, worker

TICK: Final = 1.0
"""Seconds between two looks at what is due."""

STOP_MARGIN: Final = 10.0
"""Seconds beyond UPSTREAM_TIMEOUT that a stopping pool waits for fetches under way; what is cut off is due at once."""

CENSUS_KEPT: Final = 24 * 60 * clockwork.MINUTE
"""How long the census of a silent pool is kept: where no one can tell that it is dead, its leases have long ended."""

BAD_SETTINGS: Final = 2
"""Exit code of a child whose settings are wrong, and then of the pool: starting it again cannot help."""

RESTART_PAUSE: Final = 1.0
"""Seconds between two starts of a worker: one that dies at once must not spin."""

_log = log.get()


class Census(msgspec.Struct, frozen=True):
    """What a pool says of itself in Redis: enough for the next one to know that it is dead, and whom it left."""

    machine: str
    pid: int
    started: str
    workers: list[str]
    beat: int


class Pool:
    """Worker processes of one machine, and the ticker."""

    def __init__(self, settings: Settings, redis: Redis, ledger: Ledger) -> None:
        self._settings = settings
        self._redis = redis
        self._ledger = ledger
        self._me = process.identity()
        self._name = f"{self._me.machine[:8]}-{self._me.pid}-{self._me.started}"
        self._fork = multiprocessing.get_context("fork")
        self._children: dict[str, ForkProcess] = {}
        self._born: dict[str, float] = {}
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
        next_tick = 0.0
        while not self._stopping:
            try:
                self._reap()
                self._start_due()
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK
                    self._tick()
            except (RedisError, OSError) as error:
                _log.warning("pool.redis_away", error=type(error).__name__)
                self._rest(TICK)
                continue
            sentinels = [child.sentinel for child in self._children.values()]
            wait([self._wake, *sentinels], max(0.0, next_tick - time.monotonic()))
        self._end()
        return self._exit_code

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
                self._redis.ping()
            except (RedisError, OSError):
                if not told:
                    _log.warning("service.waiting", what="redis")
                    told = True
                self._rest(TICK)
            else:
                return

    def _start_due(self) -> None:
        now = time.monotonic()
        for start in [start for start in self._starts if start[0] <= now]:
            self._start(start[1])
            # Only now: a fork that fails (no memory, no process left) is tried again.
            self._starts.remove(start)

    def _start(self, lane: str) -> None:
        self._number += 1
        name = f"{self._name}-{lane}-{self._number}"
        child = self._fork.Process(
            target=_child, args=(self._settings, name, lane, os.getpid()), name=name, daemon=False
        )
        # A SIGTERM for the child must not meet our own handler in it: it waits until the child has put on its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            child.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        self._children[name] = child
        self._born[name] = time.monotonic()
        _log.info("pool.worker_started", worker=name, lane=lane)

    def _reap(self) -> None:
        for name, child in [item for item in self._children.items() if not item[1].is_alive()]:
            lane = name.rsplit("-", 2)[1]
            held = self._let_go(name, lane)
            exit_code = child.exitcode
            del self._children[name]
            child.close()
            _log.error("pool.worker_died", worker=name, exit_code=exit_code, order_id=held.order_id if held else None)
            if exit_code == BAD_SETTINGS:
                self._exit_code = BAD_SETTINGS
                self._stopping = True
            self._starts.append((self._born.pop(name) + RESTART_PAUSE, lane))

    def _let_go(self, name: str, lane: str) -> OrderKey | None:
        """Make due what a dead worker held, and what RQ had given it but it had not begun."""
        now = bootstrap.clock()
        held = self._ledger.abandon(name, now)
        in_between = queue(lane, self._redis).intermediate_queue_key
        lost = [as_text(job_id) for job_id in self._redis.lrange(in_between, 0, -1)]
        lost += [as_text(one) for one in self._redis.smembers(WORKER_EXECUTIONS_KEY_TEMPLATE.format(name))]
        self._ledger.nudge(_orders(lost), now)
        return held

    def _tick(self) -> None:
        self._bury_dead_pools()
        looked, pushed = self._ledger.tick(bootstrap.clock())
        if looked:
            _log.info("pool.ticked", looked=looked, pushed=pushed)
        census = Census(self._me.machine, self._me.pid, self._me.started, list(self._children), bootstrap.clock())
        self._redis.hset(keys.POOLS, self._name, msgspec.json.encode(census))

    def _bury_dead_pools(self) -> None:
        """Let go of what the workers of a killed pool held, where this machine can tell that it is dead."""
        for name, text in self._redis.hgetall(keys.POOLS).items():
            census = msgspec.json.decode(text, type=Census)
            if bootstrap.clock() - census.beat > CENSUS_KEPT:
                self._redis.hdel(keys.POOLS, name)
            elif process.Identity(census.machine, census.pid, census.started).is_dead():
                for one in census.workers:
                    self._let_go(one, one.rsplit("-", 2)[1])
                self._redis.hdel(keys.POOLS, name)
                _log.warning("pool.orphans", pool=as_text(name), workers=len(census.workers))

    def _end(self) -> None:
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
                self._let_go(name, name.rsplit("-", 2)[1])
            self._redis.hdel(keys.POOLS, self._name)
        except (RedisError, OSError) as error:
            _log.warning("pool.redis_away", error=type(error).__name__)
        _log.info("service.stopped", role="worker")


def run(settings: Settings) -> int:
    """Run a pool until it is told to stop; return the exit code: 0, or BAD_SETTINGS."""
    redis = bootstrap.worker_redis(settings)
    try:
        return Pool(settings, redis, bootstrap.ledger(settings, redis)).run()
    finally:
        redis.close()


def _child(settings: Settings, name: str, lane: str, parent: int) -> None:
    process.die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        # Before the first job: warm connections, and a sink that cannot be imported stops the start. Not before the
        # fork: a user's module may open what must not be shared.
        jobs.prepare(settings)
        worker.run(settings, name, lane)
    except SettingsError as error:
        _log.error("service.bad_settings", problems=str(error).splitlines())
        raise SystemExit(BAD_SETTINGS) from None
    except Exception as error:
        # Else multiprocessing prints a traceback with the error's text beside the log.
        _log.error("pool.worker_failed", worker=name, error=type(error).__name__, trace=log.trace_of(error))
        raise SystemExit(1) from None


def _orders(job_ids: Iterable[str]) -> list[OrderKey]:
    """Return the orders that job ids name: `f-<company>-<order>-<wanted>...`."""
    return [OrderKey(one[2:38], one[39:75]) for one in job_ids if one.startswith("f-") and len(one) > 76]
