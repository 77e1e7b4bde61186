"""The pool of `ota-receiver worker`; its processes kill themselves (SIGKILL) at the steps that a file names, in turn.

    STOP_FILE=... [OVERDUE=seconds] python -m tests.acceptance.stopping_worker

All parts are the service's own, with wrappers that read the file before and after each step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rq import Queue
from rq.job import Job

from app import bootstrap, settings
from app.ledger import policy
from workers import jobs, pool, sinks, worker


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


class StoppingWorker(worker.FetchWorker):
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


def stopping(build: Callable[..., Any], *steps: str, kind: type[Stopping] = Stopping) -> Callable[..., Any]:
    """Return a function that builds the same part with `kind` around it."""
    return lambda *arguments: kind(build(*arguments), *steps)


def stopping_sinks(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda names: {name: Stopping(sink, "deliver") for name, sink in build(names).items()}


LEDGER = (
    *("start_fetch", "store_fetch", "fail_fetch", "acquire_delivery", "complete_delivery"),
    *("dispatch_due", "release_worker"),
)
REPLACED: dict[tuple[Any, str], Any] = {
    (bootstrap, "ledger"): stopping(bootstrap.ledger, *LEDGER),
    (bootstrap, "channel_manager"): stopping(bootstrap.channel_manager, "get_order"),
    (bootstrap, "rate_limiter"): stopping(bootstrap.rate_limiter, kind=StoppingLimiter),
    (jobs, "build"): stopping_sinks(sinks.build),
    (worker, "FetchWorker"): StoppingWorker,
    (policy, "JOB_OVERDUE"): float(os.environ.get("OVERDUE") or policy.JOB_OVERDUE),
}


def main() -> int:
    """Run the pool until a signal, or until its own step comes."""
    for (module, name), part in REPLACED.items():
        setattr(module, name, part)
    found = settings.load()
    bootstrap.configure_log(found)
    return pool.run(found)


if __name__ == "__main__":
    sys.exit(main())
