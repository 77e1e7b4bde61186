"""The pool: starts, watches and replaces the worker processes of one machine; runs the dispatcher each second."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from multiprocessing.connection import wait
from typing import Final

from redis.exceptions import RedisError
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE
from rq.utils import as_text

from app import bootstrap, log
from app.deployment import Deployment
from app.erased_file import ErasedFile
from app.errors import OldServer, OtherDeployment, OtherSchema
from app.heartbeat import Configuration, Heartbeat, LoopTime, decoded
from app.ids import OrderKey
from app.ledger import policy, rights, rq_jobs
from app.ledger.due_check import DueCheck
from app.ledger.ledger import Ledger
from app.ledger.orders import read_fields
from app.ledger.rate_limit import RateLimiter
from app.ledger.redis import (
    VERSION,
    Outage,
    Redis,
    code,
    is_unavailable,
    load_scripts,
    refuse_old_server,
    refuse_other_schema,
    server_time,
)
from app.ledger.retention import Retention
from app.ledger.work import WorkerEnd
from app.settings import Settings
from app.traces import OFF
from app.upstream.client import warm_up
from workers import jobs
from workers.background import AlertEvaluator, ReconcileRunner, SubscriptionRunner
from workers.worker import BAD_SETTINGS, WorkerProcess, adopt_descendants, fork, kill_leftovers, reap_leftovers

DISPATCH_EVERY: Final = 1.0
"""Seconds between two looks at what is due."""

RESTART_PAUSE: Final = 1.0
"""Seconds between two starts of a worker, so that one that dies at once does not spin."""

STOP_MARGIN: Final = 10.0
"""Seconds beyond UPSTREAM_TIMEOUT that a stopping pool waits for fetches under way; it then kills the workers."""

FAILED: Final = 1
"""Exit code after an internal error; a supervisor starts the pool again."""

OTHER_SCHEMA: Final = 4
"""Exit code when Redis holds data of another version: this one would misread it."""

OTHER_DEPLOYMENT: Final = 5
"""Exit code when another deployment uses this Redis under the same prefix."""

OLD_SERVER: Final = 3
"""Exit code when the server is older than Redis 6.2 or Valkey 7.2."""

HEARTBEAT_KEPT: Final = policy.DAY
"""How long (ms) the heartbeat of a silent pool is kept where this machine cannot tell that the pool is dead."""

_log = log.get()


class Pool:
    """The worker processes of one machine and the dispatcher."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self._settings = settings
        self._redis = redis
        self._ledger = bootstrap.ledger(settings, redis, bootstrap.sink_names(settings))
        self._tracer = bootstrap.tracer(settings) or OFF
        limiters = [bootstrap.rate_limiter(settings, company, redis) for company in settings.companies]
        self._recovery = WorkerRecovery(redis, self._ledger, limiters, bootstrap.configuration(settings))
        self._reconcile = ReconcileRunner(settings, redis)
        self._subscriptions = SubscriptionRunner(settings, redis)
        self._alerts = AlertEvaluator(settings, redis)
        self._retention = Retention(redis, event_days=settings.event_days, order_days=settings.order_days)
        self._due_check = DueCheck(redis)
        self._children: dict[str, WorkerProcess] = {}
        queues = [rq_jobs.LIVE] * settings.workers + [rq_jobs.BACKFILL] * settings.backfill_workers
        queues += [rq_jobs.sink_queue(sink.name) for sink in settings.declared_sinks for _ in range(sink.workers)]
        self._starts = [(0.0, queue) for queue in queues]
        self._number = 0
        self._next_dispatch = 0.0
        self._outage = Outage("worker", redis)
        self._failing: set[str] = set()
        self._missing_rights = ""
        self._loop_time = LoopTime(settings.deployment)
        self._wake, self._waker = os.pipe()
        self._stopping = False
        self._exit_code = 0

    def run(self) -> int:
        """Work until SIGTERM or SIGINT, then let every worker finish its fetch. Return the exit code."""
        adopt_descendants()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        if self._settings.declared_sinks and not self._has_good_sinks():
            return BAD_SETTINGS
        try:
            while not self._stopping:
                self._loop_time.set_now()
                self._kill_overdue()
                try:
                    self._work_on()
                except RedisError as error:
                    self._lost_redis(error)
                    # Not for the children: one that has ended stays in the list until Redis is back.
                    wait([self._wake], DISPATCH_EVERY)
                else:
                    self._outage.end()
                    sentinels = [child.process.sentinel for child in self._children.values()]
                    wait([self._wake, *sentinels], max(0.0, self._next_dispatch - time.monotonic()))
        except OtherSchema as refusal:
            _log.error("service.other_schema", held=refusal.held, ours=VERSION)
            self._exit_code = OTHER_SCHEMA
        except OldServer as refusal:
            _log.error("service.old_server", reason=str(refusal))
            self._exit_code = OLD_SERVER
        except OtherDeployment as refusal:
            _log.error("service.other_deployment", reason=str(refusal))
            self._exit_code = OTHER_DEPLOYMENT
        except Exception as error:
            # End as a whole: workers without a dispatcher, and a parent that waits for them, are of no use.
            _log.error("pool.failed", error=type(error).__name__, trace=log.trace_of(error))
            self._exit_code = FAILED
        finally:
            self._stop()
            # Python restores the default handlers as it ends: a second signal would be the exit code then.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        return self._exit_code

    def _has_good_sinks(self) -> bool:
        """Return whether a process of its own could import the sinks, or did not end before a stop.

        The pool itself imports none: a user's module may open what must not be shared with the workers.
        """
        child = fork("sinks", partial(jobs.try_sinks, self._settings))
        wait([child.sentinel, self._wake])
        child.kill()
        child.join()
        _kill_leftovers()
        return child.exitcode != BAD_SETTINGS

    def _request_stop(self, *_: object) -> None:
        self._stopping = True
        os.write(self._waker, b".")

    def _lost_redis(self, error: RedisError) -> None:
        """Log the begin of an outage once; the next call uses a fresh connection."""
        # After a failover an old connection may lead to what is now a replica.
        self._redis.connection_pool.disconnect()
        self._outage.begin(error)

    @contextmanager
    def _isolated(self, step: str) -> Iterator[None]:
        """Let no error of this step stop the others, and log it once until the step works again.

        Raises RedisError when Redis is unavailable or refuses everybody.
        """
        try:
            yield
        except (RedisError, OSError) as error:
            if is_unavailable(error):
                raise
            if step not in self._failing:
                self._failing.add(step)
                _log.error("pool.step_failed", what=step, error=code(error), trace=log.trace_of(error))
        else:
            self._failing.discard(step)

    def _work_on(self) -> None:
        """Do all that is due now; raises OtherSchema, and what Redis raises."""
        refuse_other_schema(self._redis)
        self._release_ended()
        if time.monotonic() >= self._next_dispatch:
            self._next_dispatch = time.monotonic() + DISPATCH_EVERY
            self._dispatch()
        self._start_due()

    def _start_due(self) -> None:
        due = [start for start in self._starts if start[0] <= time.monotonic()]
        if not due:
            return
        if self._number == 0:
            refuse_old_server(self._redis)
            self._warm_up()
        missing = rights.missing(self._redis, rights.ALL, rights.WORKERS)
        if missing and missing != self._missing_rights:
            _log.error("redis.refused", role="worker", error="NOPERM", cause=f"the Redis user may not: {missing}")
        self._missing_rights = missing
        # A worker must not share our connection.
        self._redis.connection_pool.disconnect()
        for start in due:
            _, queue = start
            self._number += 1
            name = self._recovery.worker_name(queue, self._number)
            try:
                self._children[name] = WorkerProcess(self._settings, name, queue, self._tracer)
            except OSError as error:
                # The system has no memory or no process left; the start stays due.
                _log.error("pool.worker_failed", worker=name, error=type(error).__name__)
                continue
            self._starts.remove(start)
            _log.info("pool.worker_started", worker=name, queue=queue)
        self._heartbeat()

    def _warm_up(self) -> None:
        """Build and import before the first fork what every worker needs, so that the workers share the memory."""
        jobs.prepare(self._settings, self._tracer)
        warm_up(self._settings.companies[0])
        load_scripts()
        import_module("_strptime")  # RQ imports it with its first job
        # A collection in a worker would write to each object's header, and so copy every page it shares with the pool.
        gc.collect()
        gc.freeze()

    def _kill_overdue(self) -> None:
        """Kill workers whose job has outlasted RQ's time limit, which cannot end C code."""
        for name, child in self._children.items():
            busy = child.busy_seconds()
            if busy > policy.JOB_OVERDUE and child.process.is_alive():
                child.process.kill()
                child.process.join(1.0)
                _log.error("worker.timed_out", worker=name, busy_s=round(busy))

    def _release_ended(self) -> None:
        """Release what ended workers held, and plan their successors."""
        ended = [one for one in self._children.items() if not one[1].process.is_alive()]
        for name, child in ended:
            exit_code = child.process.exitcode
            # A worker that ended by itself lost Redis, which is no crash of its order. If its job has not ended, a sink
            # called os._exit.
            is_crash = (exit_code or 0) < 0 or child.busy_seconds() > 0
            order_id = request_id = None
            with self._isolated("release"):  # else its lease ends
                if order := self._recovery.release(name, "killed" if is_crash else "ended"):
                    order_id = order.order_id
                    ((request_id,),) = read_fields(self._redis, [order], "request_id")
            about = {"worker": name, "order_id": order_id, "request_id": request_id and as_text(request_id)}
            del self._children[name]
            child.process.close()
            if exit_code == 0 and not is_crash:
                _log.info("pool.worker_ended", **about)
            else:
                _log.error("pool.worker_died", exit_code=exit_code, **about)
            if exit_code == BAD_SETTINGS:
                self._exit_code = exit_code
                self._request_stop()
            self._starts.append((child.started + RESTART_PAUSE, child.queue))
        if ended:
            _kill_leftovers()

    def _heartbeat(self) -> None:
        with self._isolated("heartbeat"):
            self._recovery.heartbeat(self._children)

    def _dispatch(self) -> None:
        """Do what a pool does each second; every pool does it, and none waits for another."""
        reap_leftovers()
        with self._isolated("refuse_other_deployment"):
            self._recovery.refuse_other_deployment()
        self._heartbeat()
        with self._isolated("recover_dead_pools"):
            self._recovery.recover_dead_pools()
        with self._isolated("dispatch"):
            dispatched = self._ledger.dispatch_due()
            if dispatched.due:
                _log.info("dispatcher.enqueued", due=dispatched.due, enqueued=dispatched.enqueued)
            if dispatched.broken:
                _log.error("dispatcher.orders_broken", orders=dispatched.broken)
        with self._isolated("due_check"):
            if found := self._due_check.step():
                _log.error("dispatcher.orders_found", orders=found)
        runners = (self._reconcile.tick, self._subscriptions.tick)
        for part in (self._retention.trim_each_minute, *runners, self._alerts.tick):
            with self._isolated(part.__qualname__):
                part()

    def _stop(self) -> None:
        """Let the workers finish, kill those that do not, and release what they held."""
        self._reconcile.child.stop()
        self._subscriptions.child.stop()
        for child in self._children.values():
            child.process.terminate()
        deadline = time.monotonic() + self._settings.upstream_timeout + STOP_MARGIN
        for child in self._children.values():
            child.process.join(max(0.0, deadline - time.monotonic()))
            if child.process.is_alive():
                child.process.kill()
                child.process.join()
        _kill_leftovers()
        try:
            for name in self._children:
                # Also one that we killed: that was the stop's doing, not the order's.
                self._recovery.release(name, "ended")
            self._recovery.remove_heartbeat()
        except OtherSchema:
            # Our heartbeat stays: the pool of the newer version finds it, and releases what our workers held.
            pass
        except RedisError as error:
            self._lost_redis(error)
        self._loop_time.close()
        _log.info("service.stopped", role="worker")


class WorkerRecovery:
    """What ended workers and dead pools leave behind is due at once, not when its lease ends.

    A pool writes a heartbeat with its identity and the names of its workers. The next pool on the same machine finds
    the heartbeat of a killed one, and releases what its workers held. Every method raises what Redis raises.
    """

    def __init__(
        self, redis: Redis, ledger: Ledger, limiters: Sequence[RateLimiter], configuration: Configuration
    ) -> None:
        self._redis = redis
        self._ledger = ledger
        self._limiters = limiters
        self._deployment = Deployment(redis)
        self._configuration = configuration
        self._since = 0
        me = Heartbeat.of_this_process((), 0, 0, configuration)
        self._pool = f"{me.machine[:8]}-{me.pid}-{me.started}"

    def worker_name(self, queue_name: str, number: int) -> str:
        """Return the name of this pool's worker `number`."""
        return f"{self._pool}-{queue_name}-{number}"

    def release(self, worker: str, how: WorkerEnd) -> OrderKey | None:
        """Make due what an ended worker held and the jobs it had been given but not started.

        Return the order it held, if any. Its permits are free at once: the next pool does not wait for their leases.
        """
        for limiter in self._limiters:
            limiter.release_worker(worker)
        given = list(self._redis.smembers(WORKER_EXECUTIONS_KEY_TEMPLATE.format(worker)))
        sinks = {rq_jobs.sink_id(one): one for one in self._deployment.sinks()}
        for queue_name in (rq_jobs.LIVE, rq_jobs.BACKFILL, *map(rq_jobs.sink_queue, sinks.values())):
            given += self._redis.lrange(rq_jobs.queue(queue_name, self._redis).intermediate_queue_key, 0, -1)
        ids = [as_text(one) for one in given]
        deliveries = (found for one in ids if (found := rq_jobs.delivery_of(one)) and found[1] in sinks)
        return self._ledger.release_worker(
            worker,
            how,
            filter(None, map(rq_jobs.order_of, ids)),
            [(order, sinks[sink_id]) for order, sink_id in deliveries],
        )

    def heartbeat(self, workers: Iterable[str]) -> None:
        """Write that this pool is alive, which workers it has, and its configuration."""
        now = server_time(self._redis)
        is_first, since = not self._since, self._since or now
        self._deployment.declare(self._pool, Heartbeat.of_this_process(workers, now, since, self._configuration))
        self._since = since  # not before: what the first heartbeat replaces is written by the first that succeeds
        if is_first:
            self._deployment.wake(self._pool, self._configuration)

    def refuse_other_deployment(self) -> None:
        """Raise OtherDeployment if this Redis is of another deployment."""
        self._deployment.refuse_other(self._configuration, self._pool, self._since)

    def remove_heartbeat(self) -> None:
        """Remove this pool from the list: its workers have ended and hold nothing."""
        self._redis.hdel(self._redis.names.pools, self._pool)

    def recover_dead_pools(self) -> None:
        """Release what the workers of killed pools held, where this machine can tell that the pool is dead."""
        for name, text in self._redis.hgetall(self._redis.names.pools).items():
            beat = decoded(text, Heartbeat)
            if beat is None:
                continue
            if server_time(self._redis) - beat.at > HEARTBEAT_KEPT:
                self._redis.hdel(self._redis.names.pools, name)
            elif beat.is_of_dead_process():
                for worker in beat.workers:
                    self.release(worker, "killed")
                self._redis.hdel(self._redis.names.pools, name)
                _log.warning("pool.recovered", pool=as_text(name), workers=len(beat.workers))


def _kill_leftovers() -> None:
    if killed := kill_leftovers():
        _log.warning("pool.leftovers_killed", processes=killed)


def run(settings: Settings) -> int:
    """Run a pool until a signal stops it; return the exit code: 0, or one of those above or BAD_SETTINGS.

    Raises SettingsError for an ERASED_FILE or SSL_CERT_FILE that cannot be read, and as `bootstrap.tracer` does.
    """
    ErasedFile(settings.erased_file).read()
    bootstrap.http(settings).close()
    with bootstrap.worker_redis(settings) as redis:
        return Pool(settings, redis).run()
