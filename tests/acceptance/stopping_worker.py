"""The pool of `ota-receiver worker`; its processes kill themselves (SIGKILL) at the steps that a file names, in turn.

    STOP_FILE=... [OVERDUE=seconds] python -m tests.acceptance.stopping_worker

All parts are the service's own, with wrappers that read the file before and after each step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

from rq import Queue
from rq.job import Job

from app import bootstrap, settings
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.rate_limit import RateLimiter
from app.settings import Settings
from app.upstream.client import ChannelManager
from workers import jobs
from workers.delivery import Deliverer
from workers.pool import Pool
from workers.processor import Connection, Processor
from workers.sinks import Sink, build
from workers.worker import FetchWorker, Stopwatch, run_worker


def stop(step: str) -> None:
    """Kill this process if the step is the next one in the file."""
    path = Path(os.environ["STOP_FILE"])
    try:
        first, *others = path.read_text().split()
    except FileNotFoundError:
        return
    if first != step:
        return
    if others:
        draft = path.with_suffix(".next")
        draft.write_text(" ".join(others))
        draft.rename(path)
    else:
        path.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


class Stopping:
    """A part of the service that can die before and after each of its steps."""

    def __init__(self, part: object, *steps: str) -> None:
        self._part, self._steps = part, steps

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        if name not in self._steps:
            return found

        def step(*arguments: Any, **named: Any) -> Any:
            stop(f"{name}:before")
            answer = found(*arguments, **named)
            stop(f"{name}:after")
            return answer

        return step


class StoppingWorker(FetchWorker):
    """RQ's own steps around a job."""

    def execute_job(self, job: Job, queue: Queue) -> None:
        stop("taken")
        super().execute_job(job, queue)
        stop("ended")

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        stop("registered")
        super().prepare_job_execution(job, remove_from_intermediate_queue)
        stop("prepared")

    def handle_job_success(self, *arguments: Any, **named: Any) -> None:
        stop("bookkeeping:before")
        super().handle_job_success(*arguments, **named)
        stop("bookkeeping:after")


class StoppingLimiter(Stopping):
    """A limiter that can die before and after each permit and its release."""

    def permit(self, *arguments: Any, **named: Any) -> Any:
        stop("permit:before")
        permit = self._part.permit(*arguments, **named)  # type: ignore[attr-defined]  # the part is a RateLimiter
        stop("permit:after")
        release = permit._release

        def released(*values: Any, **options: Any) -> Any:
            stop("release:before")
            answer = release(*values, **options)
            stop("release:after")
            return answer

        permit._release = released
        return permit


def work(found: Settings, name: str, queue: str, stopwatch: Stopwatch) -> None:
    """Do the work of a child of the pool, with wrappers around its parts."""
    redis, http = bootstrap.worker_redis(found), bootstrap.http(found)
    steps = ("start_fetch", "store_fetch", "fail_fetch", "acquire_delivery", "complete_delivery")
    ledger = cast("Ledger", Stopping(bootstrap.ledger(found, redis), *steps))
    connections = {
        company.np_company_id: Connection(
            company.slug,
            cast("ChannelManager", Stopping(bootstrap.channel_manager(found, company, http), "get_order")),
            cast("RateLimiter", StoppingLimiter(bootstrap.rate_limiter(found, company, redis))),
        )
        for company in found.companies
    }
    sinks = {name: cast("Sink", Stopping(sink, "deliver")) for name, sink in build(found.sinks).items()}
    jobs.use(Processor(ledger=ledger, connections=connections, deliverer=Deliverer(ledger=ledger, sinks=sinks)))
    run_worker(found, name, queue, stopwatch, StoppingWorker)


def main() -> int:
    """Run the pool until a signal, or until its own step comes."""
    found = settings.load()
    bootstrap.configure_log(found)
    redis = bootstrap.worker_redis(found)
    ledger = cast("Ledger", Stopping(bootstrap.ledger(found, redis), "dispatch_due", "release_worker"))
    overdue = float(os.environ.get("OVERDUE") or policy.JOB_OVERDUE)
    return Pool(found, redis, ledger, work=work, overdue=overdue).run()


if __name__ == "__main__":
    sys.exit(main())
