"""One worker process: a forked child of the pool in which RQ's SimpleWorker serves its queues and runs our jobs only.

What RQ does by itself and we rely on is in tests/integration/test_rq_contract.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from mmap import mmap
from multiprocessing import active_children, get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any, ClassVar, Final

from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import NoSuchJobError, StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import WorkerStatus

from app import bootstrap, log
from app.errors import SettingsError
from app.ids import OrderKey
from app.ledger.redis import Redis, is_unavailable
from app.ledger.rq_jobs import BACKFILL, DELIVER_ORDER, FETCH_ORDER, LIVE, delivery_of, order_of, sink_id, sink_queue
from app.settings import Settings
from app.traces import Tracer
from workers import jobs

BAD_SETTINGS: Final = 2
"""Exit code of a child whose settings are wrong, and then of its pool: a restart cannot help."""

WORKER_TTL: Final = 30
"""Seconds between the heartbeats that RQ writes for an idle worker; its default of 420 hides a dead one."""

HEARTBEAT_EVERY: Final = 10.0
"""Seconds between the heartbeats that RQ writes for a worker beside those of its jobs."""

SUSPENSION_EVERY: Final = 1.0
"""Seconds between two looks whether `rq suspend` was given."""

LATER_QUEUES_EVERY: Final = 1
"""Seconds between two looks at the later queues of an idle worker that has several."""

_FIELDS: Final = frozenset(
    b"data origin status description timeout result_ttl failure_ttl created_at enqueued_at".split()  # our scripts
    + b"started_at ended_at last_heartbeat worker_name".split()  # RQ's worker
)
"""The fields of a job's hash that may have a value."""

_log = log.get()


class OrderJob(Job):
    """A job that runs the function of its class or nothing.

    Its hash may name any function, callbacks, webhooks, dependents, repeats or retries. RQ gets only the fields that
    our scripts write, so nothing else is ever run, imported or called.
    """

    function: ClassVar[str]
    refusal = ""
    """What is not ours: the name of a function, or of a field of the hash."""

    # RQ asks for the name before it performs a job; where the data cannot be read, that would fail the job.
    func_name = property(lambda self: self.function)

    @classmethod
    def has_id(cls, job_id: str, arguments: Sequence[str]) -> bool:
        """Return whether the id of a job of ours names these arguments."""
        raise NotImplementedError

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """Take the fields of our jobs from the hash; anything else refuses the job."""
        ours = {name: value for name, value in raw_data.items() if name in _FIELDS}
        unknown = sorted(name for name, value in raw_data.items() if value and name not in _FIELDS)
        foreign = [name.decode(errors="replace") for name in unknown]
        try:
            super().restore(ours)
        except NoSuchJobError:
            raise
        except Exception as error:  # it would end the worker, which has taken the job
            super().restore({b"data": b"", b"origin": raw_data.get(b"origin", b"")})
            foreign.append(type(error).__name__)
        self.refusal = foreign[0] if foreign else self._foreign_call()

    def _foreign_call(self) -> str:
        try:
            call = self.serializer.loads(self.data)
            if (function := call[0]) != self.function:
                return str(function)
            _, instance, arguments, named = call
            is_ours = (instance, named) == (None, {}) and self.has_id(self.id, arguments)
        except Exception as error:
            return type(error).__name__
        return "" if is_ours else f"{function} with other arguments"

    def perform(self) -> Any:
        """Run the job; a refused one ends without running anything, and the dispatcher enqueues its order again."""
        if self.refusal:
            _log.error("job.refused", function=self.refusal[:100], job_id=self.id)
            return None
        return super().perform()

    def cleanup(self, ttl: int | None = None, pipeline: Pipeline | None = None, remove_from_queue: bool = True) -> None:
        """Delete a job that has ended; RQ first reads which lists may have it, and ours is in none of them."""
        (self.connection if pipeline is None else pipeline).delete(self.key)


class FetchJob(OrderJob):
    """A job of live or backfill."""

    function = FETCH_ORDER
    func = property(lambda self: jobs.fetch_order)

    @classmethod
    def has_id(cls, job_id: str, arguments: Sequence[str]) -> bool:
        return list(order_of(job_id) or ()) == [*arguments]


class DeliveryJob(OrderJob):
    """A job of a sink."""

    function = DELIVER_ORDER
    func = property(lambda self: jobs.deliver_order)

    @classmethod
    def has_id(cls, job_id: str, arguments: Sequence[str]) -> bool:
        *order, sink = arguments
        return delivery_of(job_id) == (OrderKey(*order), sink_id(sink))


class OrderQueue(Queue):
    """RQ's queue; a worker that loses its connection while it takes a job ends."""

    @classmethod
    def dequeue_any(cls, queues: Iterable[Queue], timeout: int | None, *arguments: Any, **named: Any) -> Any:
        """Return the next job and its queue, from a later queue while the first is empty.

        Raises StopRequested when Redis is away or refuses, which the pool logs.

        RQ would ask again. But Redis may have moved a job to the intermediate queue before the connection broke, and
        its order would wait for GRACE. The pool makes the orders there due when a worker ends.
        """
        try:
            # One queue a call: from several at once RQ takes a job without noting it in the intermediate queue.
            first, *later = queues
            if later:
                timeout = timeout and LATER_QUEUES_EVERY  # None: RQ does not want to wait
                for queue in (first, *later):
                    if found := super().dequeue_any([queue], None, *arguments, **named):
                        return found
            return super().dequeue_any([first], timeout, *arguments, **named)
        except RedisError as error:
            if is_unavailable(error):
                raise StopRequested from error
            raise


class OrderWorker(SimpleWorker):
    """RQ's worker without a fork for each job, and with four round trips to Redis for each, where RQ makes 27.

    What RQ reads and writes for results, retries, repeats and dependents is left out, as no job of ours has any. Its
    notes about a job need no transaction: each is harmless without those that follow.
    """

    queue_class = OrderQueue

    def __init__(
        self,
        name: str,
        queues: Sequence[str],
        redis: Redis,
        busy_since: memoryview[float],
        kind: type[OrderJob] = FetchJob,
    ) -> None:
        super().__init__(
            [redis.names.rq_prefix + queue for queue in queues],
            name=name,
            connection=redis,
            job_class=kind,
            serializer=JSONSerializer,
            worker_ttl=WORKER_TTL,
        )
        self._busy_since = busy_since
        self._next_heartbeat = 0.0
        self._next_look = 0.0

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run a job, with RQ's own bookkeeping, and show the pool since when."""
        self._busy_since[0] = monotonic()
        try:
            super().execute_job(job, queue)
        finally:
            self._busy_since[0] = 0.0

    def prepare_execution(self, job: Job) -> Execution:
        """Note that a job starts, in one round trip: first in the worker's executions, where its pool looks for it."""
        ttl = self.get_heartbeat_ttl(job)
        with self.connection.pipeline(transaction=False) as pipeline:
            execution = Execution.create(job, ttl, pipeline, self.name)
            self.executions[execution.id] = execution
            self.set_state(WorkerStatus.BUSY, pipeline)
            self.heartbeat(ttl, pipeline)
            job.prepare_for_execution(self.name, pipeline)
            for queue in self.queues:
                pipeline.lrem(queue.intermediate_queue_key, 1, job.id)
            pipeline.execute()
        return execution

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        """Do nothing: `prepare_execution` has done it."""

    def handle_execution_ended(self, job: Job, queue: Queue, heartbeat_ttl: int) -> None:
        """Note when a job has ended; its hash is deleted next."""
        job.ended_at = now()

    def handle_job_success(self, job: Job, queue: Queue, started_job_registry: object, execution: Execution) -> None:
        """Delete a job and its execution, and count it, in one round trip."""
        with self.connection.pipeline(transaction=False) as pipeline:
            self.increment_successful_job_count(pipeline)
            self.increment_total_working_time(job.ended_at - job.started_at, pipeline)  # type: ignore[operator]  # both are set
            job.cleanup(0, pipeline)
            self.cleanup_execution(job, pipeline, execution)
            self.set_state(WorkerStatus.IDLE, pipeline)
            pipeline.execute()

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        """Write the state of the worker where it has changed: RQ writes `idle` after a job and before the next."""
        if pipeline is not None or state != self.get_state():
            super().set_state(state, pipeline)

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """Write that the worker lives: with what is written anyway, else each HEARTBEAT_EVERY."""
        if pipeline is not None or monotonic() >= self._next_heartbeat:
            super().heartbeat(timeout, pipeline)
            self._next_heartbeat = monotonic() + HEARTBEAT_EVERY

    def check_for_suspension(self, burst: bool) -> None:
        """Wait while `rq suspend` holds."""
        if monotonic() >= self._next_look:
            super().check_for_suspension(burst)
            self._next_look = monotonic() + SUSPENSION_EVERY

    def subscribe(self) -> None:
        """Take no commands over Redis: they would cost each worker a thread and a second connection."""

    def _install_signal_handlers(self) -> None:
        """Stop on SIGTERM, which the pool sends; a Ctrl-C reaches the whole process group and must not count twice."""
        signal.signal(signal.SIGTERM, self.request_stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """Ignore a second signal: a fetch under way ends by itself, and the pool kills what does not."""


class WorkerProcess:
    """A worker as its pool sees it; `started` is a time of time.monotonic."""

    def __init__(self, settings: Settings, name: str, queue_name: str, tracer: Tracer) -> None:
        """Start the worker; raises OSError when the system has no room for it."""
        # Both processes see it: the time.monotonic at which the job started, 0 without one. The pool reads it also
        # while Redis is unavailable or C code hangs.
        self._busy_since = memoryview(mmap(-1, 8)).cast("d")
        self.queue = queue_name
        self.started = monotonic()
        self.process = fork(name, partial(_work, settings, name, queue_name, self._busy_since, tracer))

    def busy_seconds(self) -> float:
        """Return the seconds since the current job started, 0 without one."""
        since = self._busy_since[0]
        return monotonic() - since if since else 0.0


def _work(settings: Settings, name: str, queue_name: str, busy_since: memoryview[float], tracer: Tracer) -> None:
    """Fetch orders, or deliver them to the sink of the queue, until SIGTERM, or until Redis is lost while no job runs.

    Raises SettingsError for a sink that cannot be imported.
    """
    kind: type[OrderJob] = FetchJob
    for sink in settings.declared_sinks:
        if sink_queue(sink.name) == queue_name:
            kind = DeliveryJob
            # Before the first job: a bad sink stops the start. After the fork: a user's module may open what must not
            # be shared.
            jobs.import_sinks(settings, sink.name, tracer=tracer)
    redis = bootstrap.for_rq(settings)
    # The pool logs an outage once; RQ raises what it meets when it signs off.
    with closing(tracer), suppress(RedisError):
        # No queue is without workers: its jobs would wait for ever.
        helps = queue_name == LIVE and not settings.backfill_workers
        queues = [LIVE, BACKFILL] if helps else [queue_name]
        OrderWorker(name, queues, redis, busy_since, kind).work(logging_level=None)


def fork(name: str, work: Callable[[], None]) -> ForkProcess:
    """Return a new child of this process that does `work`; raises OSError when the system has no room for one."""
    child = get_context("fork").Process(target=_run, args=(os.getpid(), name, work))
    # A SIGTERM for the child waits until it has replaced our handler by its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return child


def adopt_descendants() -> None:
    """Become the parent of the processes that ended workers leave behind, instead of init (Linux).

    Also of those that detach themselves from a worker by a second fork.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def reap_leftovers() -> list[int]:
    """Let adopted processes that have ended go; return the pids of those that run (Linux)."""
    ours = {child.pid for child in active_children()}
    listed = ""
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread has just ended
            listed += path.read_text()
    # Those that run are (0, 0).
    return [pid for pid in map(int, listed.split()) if pid not in ours and os.waitpid(pid, os.WNOHANG) == (0, 0)]


def kill_leftovers() -> int:
    """Kill all adopted processes, also those that appear when their parents end; return how many, within a second."""
    killed: set[int] = set()
    deadline = monotonic() + 1.0
    while (pids := reap_leftovers()) and monotonic() < deadline:
        for pid in pids:
            with suppress(PermissionError):  # it has become another user
                os.kill(pid, signal.SIGKILL)
        killed.update(pids)
        sleep(0.01)
    return len(killed)


def _run(parent: int, name: str, work: Callable[[], None]) -> None:
    if sys.platform == "linux":  # the kernel kills this process when its parent ends, also by SIGKILL
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before prctl
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        work()
    except SettingsError as error:
        _log.error("service.bad_settings", role="worker", problems=str(error).splitlines())
        raise SystemExit(BAD_SETTINGS) from None
    except Exception as error:
        # Else multiprocessing prints a traceback with the error's text beside the log.
        _log.error("pool.worker_failed", worker=name, error=type(error).__name__, trace=log.trace_of(error))
        raise SystemExit(1) from None
