"""One worker process: a forked child of the pool in which RQ's SimpleWorker serves one queue and runs our job only.

The parent sees how long a worker has been at its job in shared memory, also while Redis is unavailable or C code hangs.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from time import monotonic
from types import FrameType
from typing import Any, Final

from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer

from app import bootstrap, log
from app.errors import SettingsError
from app.ledger.rq_jobs import FETCH_ORDER, queue
from app.settings import Settings
from workers import jobs
from workers.recovery import die_with

BAD_SETTINGS: Final = 2
"""Exit code of a child whose settings are wrong, and then of its pool: a restart cannot help."""

WORKER_TTL: Final = 30
"""Seconds between the heartbeats that RQ writes for an idle worker; its default of 420 hides a dead one."""

_log = log.get()


class Stopwatch:
    """How long a worker has been at its job: the child writes, the parent reads. Create it before the fork."""

    def __init__(self) -> None:
        self._started = memoryview(mmap.mmap(-1, 8)).cast("d")

    def start(self) -> None:
        self._started[0] = monotonic()

    def stop(self) -> None:
        self._started[0] = 0.0

    def seconds(self) -> float:
        """Return the seconds since the current job started, 0 without one."""
        started = self._started[0]
        return monotonic() - started if started else 0.0


Work = Callable[[Settings, str, str, Stopwatch], None]
"""What a worker does until SIGTERM: settings, its name, its queue, and the stopwatch that its pool reads."""


class FetchJob(Job):
    """A job that runs `fetch_order` or nothing: the JSON of a job may name any function."""

    # RQ asks for the name before it performs a job; where the data cannot be read, that would fail the job.
    func_name = property(lambda self: FETCH_ORDER)
    func = property(lambda self: jobs.fetch_order)
    success_callback = failure_callback = stopped_callback = property(lambda self: None)

    def perform(self) -> Any:
        """Run the job; a job of another function, or with unreadable data, ends without running anything."""
        try:
            function = str(self.serializer.loads(self.data)[0])
        except Exception as error:
            function = type(error).__name__
        if function != FETCH_ORDER:
            _log.error("job.refused", function=function[:100], job_id=self.id)
            return None
        return super().perform()


class FetchWorker(SimpleWorker):
    """RQ's worker without a fork for each job, with a stopwatch around each job."""

    stopwatch: Stopwatch

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run a job, with RQ's own bookkeeping, under the stopwatch."""
        self.stopwatch.start()
        try:
            super().execute_job(job, queue)
        finally:
            self.stopwatch.stop()

    def subscribe(self) -> None:
        """Take no commands over Redis: they would cost each worker a thread and a second connection."""

    def _install_signal_handlers(self) -> None:
        """Stop on SIGTERM, which the pool sends; a Ctrl-C reaches the whole process group and must not count twice."""
        signal.signal(signal.SIGTERM, self.request_stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """Ignore a second signal: a fetch under way ends by itself, and the pool kills what does not."""


def work(settings: Settings, name: str, queue_name: str, stopwatch: Stopwatch) -> None:
    """Fetch and deliver orders until SIGTERM; raises SettingsError for a sink that cannot be imported."""
    # Before the first job: the connections are warm, and a bad sink stops the start. After the fork: a user's module
    # may open what must not be shared.
    jobs.prepare(settings)
    run_worker(settings, name, queue_name, stopwatch)


def run_worker(
    settings: Settings, name: str, queue_name: str, stopwatch: Stopwatch, kind: type[FetchWorker] = FetchWorker
) -> None:
    """Run RQ's worker loop on a queue until SIGTERM, in a process of its own."""
    redis = bootstrap.for_rq(settings.redis_url.get_secret_value())
    worker = kind(
        [queue(queue_name, redis)],
        name=name,
        connection=redis,
        serializer=JSONSerializer,
        job_class=FetchJob,
        worker_ttl=WORKER_TTL,
        log_job_description=False,
    )
    worker.stopwatch = stopwatch
    worker.log_result_lifespan = False
    worker.max_connection_wait_time = 5
    logging.getLogger("rq.worker").addFilter(_is_not_about_redis)
    worker.work(logging_level=None)


def fork(name: str, work: Callable[[], None]) -> ForkProcess:
    """Return a new child of this process that does `work`; raises OSError when the system has no room for one."""
    child = get_context("fork").Process(target=partial(_run, os.getpid(), name, work), name=name, daemon=False)
    # A SIGTERM for the child waits until it has replaced our handler by its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return child


def _run(parent: int, name: str, work: Callable[[], None]) -> None:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        work()
    except SettingsError as error:
        _log.error("service.bad_settings", problems=str(error).splitlines())
        raise SystemExit(BAD_SETTINGS) from None
    except Exception as error:
        # Else multiprocessing prints a traceback with the error's text beside the log.
        _log.error("pool.worker_failed", worker=name, error=type(error).__name__, trace=log.trace_of(error))
        raise SystemExit(1) from None


def _is_not_about_redis(record: logging.LogRecord) -> bool:
    """Drop what every worker logs every few seconds while Redis is unavailable: the pool logs it once."""
    return "could not connect to Redis instance" not in str(record.msg)
