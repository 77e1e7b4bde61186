"""One worker process: RQ's SimpleWorker, warm, on one queue, and deaf to any function but ours.

How long a worker has been at its job, in memory that its pool reads: also while Redis is away, or C code hangs.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import struct
from collections.abc import Callable
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

_SECONDS: Final = struct.Struct("d")


class Stopwatch:
    """Made before the fork; the child starts and stops it, the parent reads it."""

    def __init__(self) -> None:
        self._since = mmap.mmap(-1, _SECONDS.size)

    def start(self) -> None:
        """Begin a job now."""
        _SECONDS.pack_into(self._since, 0, monotonic())

    def stop(self) -> None:
        """End the job."""
        _SECONDS.pack_into(self._since, 0, 0.0)

    def seconds(self) -> float:
        """Return how long the present job has taken, 0 without one."""
        (since,) = _SECONDS.unpack_from(self._since)
        return monotonic() - since if since else 0.0

    def close(self) -> None:
        """Give the memory back."""
        self._since.close()


WORKER_TTL: Final = 30
"""Seconds between signs of life of an idle worker; RQ's default of 420 hides a dead one."""

_log = log.get()


class FetchJob(Job):
    """A job that runs `fetch_order` or nothing: JSON does not stop a job that names another function."""

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
    """RQ's worker in one process, without forks, whose time at a job the pool can read."""

    watch: Stopwatch

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Do a job, RQ's own bookkeeping included, while the pool sees how long it takes."""
        self.watch.start()
        try:
            super().execute_job(job, queue)
        finally:
            self.watch.stop()

    def _install_signal_handlers(self) -> None:
        """Stop on SIGTERM, which the pool sends; a Ctrl-C reaches the whole group and must not count twice."""
        signal.signal(signal.SIGTERM, self.request_stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """Ignore a second signal: a fetch under way ends by itself, and the pool cuts off what does not."""


def run_worker(
    settings: Settings, name: str, queue_name: str, watch: Stopwatch, kind: type[FetchWorker] = FetchWorker
) -> None:
    """Work `queue_name` off until SIGTERM. Call in a process of its own."""
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
    worker.watch = watch
    worker.log_result_lifespan = False
    worker.max_connection_wait_time = 5
    bootstrap.configure_log(settings)
    logging.getLogger("rq.worker").addFilter(_says_something_new)
    worker.work(logging_level=None)


def _says_something_new(record: logging.LogRecord) -> bool:
    """Drop what every worker says every few seconds while Redis is away: the pool says it once."""
    return "could not connect to Redis instance" not in str(record.msg)


BAD_SETTINGS: Final = 2
"""Exit code of a child whose settings are wrong, and then of the pool: starting it again cannot help."""

Work = Callable[[Settings, str, str, Stopwatch], None]
"""What it does until it is told to stop: settings, its name, its queue, and the watch that its pool reads."""


def start(work: Work, settings: Settings, name: str, lane: str, watch: Stopwatch) -> ForkProcess:
    """Return a new child of this process that does `work`; raises OSError when there is no room for one."""
    child = get_context("fork").Process(
        target=run_child, args=(work, os.getpid(), settings, name, lane, watch), name=name, daemon=False
    )
    # A SIGTERM for the child must not meet our own handler in it: it waits until the child has put on its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return child


def run_child(work: Work, parent: int, settings: Settings, name: str, lane: str, watch: Stopwatch) -> None:
    """Do `work` as a child of the process `parent`; raises SystemExit when it cannot be done."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        work(settings, name, lane, watch)
    except SettingsError as error:
        _log.error("service.bad_settings", problems=str(error).splitlines())
        raise SystemExit(BAD_SETTINGS) from None
    except Exception as error:
        # Else multiprocessing prints a traceback with the error's text beside the log.
        _log.error("pool.worker_failed", worker=name, error=type(error).__name__, trace=log.trace_of(error))
        raise SystemExit(1) from None


def work(settings: Settings, name: str, lane: str, watch: Stopwatch) -> None:
    """Fetch orders and hand them on until SIGTERM; raises SettingsError for a sink that cannot be imported."""
    # Before the first job: warm connections, and a bad sink stops the start. Not before the fork: a user's module may
    # open what must not be shared.
    jobs.prepare(settings)
    run_worker(settings, name, lane, watch)
