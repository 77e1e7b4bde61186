"""One worker process: RQ's SimpleWorker, warm, on one queue, and deaf to any function but ours."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any, Final

from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer

from app import bootstrap, log
from app.settings import Settings
from app.store import connection
from app.store.jobs import FETCH_ORDER, queue
from workers.stopwatch import Stopwatch

WORKER_TTL: Final = 30
"""Seconds between signs of life of an idle worker; RQ's default of 420 hides a dead one."""

_log = log.get()


class FetchWorker(SimpleWorker):
    """Runs `fetch_order` and nothing else: JSON does not stop a job that names another function."""

    watch: Stopwatch

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Do a job, RQ's own bookkeeping included, while the pool sees how long it takes."""
        self.watch.start()
        try:
            super().execute_job(job, queue)
        finally:
            self.watch.stop()

    def perform_job(self, job: Job, queue: Queue, *args: Any, **kwargs: Any) -> bool:
        try:
            function = str(job.func_name)
        except Exception as error:
            # Data that cannot be read: outside RQ's own try it would end the worker.
            function = type(error).__name__
        if function != FETCH_ORDER:
            _log.error("job.refused", function=function[:100], job_id=job.id)
            job._func_name, job._args, job._kwargs = f"{__name__}.refuse", (), {}
        return super().perform_job(job, queue, *args, **kwargs)

    def _install_signal_handlers(self) -> None:
        """Stop on SIGTERM, which the pool sends; a Ctrl-C reaches the whole group and must not count twice."""
        signal.signal(signal.SIGTERM, self.request_stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """Ignore a second signal: a fetch under way ends by itself, and the pool cuts off what does not."""


def refuse() -> None:
    """Stand in for a function that is not ours, so that RQ ends its job without a trace of it."""


def run(
    settings: Settings, name: str, queue_name: str, watch: Stopwatch, kind: type[FetchWorker] = FetchWorker
) -> None:
    """Work `queue_name` off until SIGTERM. Call in a process of its own."""
    redis = connection.for_rq(settings.redis_url.get_secret_value())
    worker = kind(
        [queue(queue_name, redis)],
        name=name,
        connection=redis,
        serializer=JSONSerializer,
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
