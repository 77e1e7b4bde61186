"""`ota-receiver worker`, whose processes kill themselves (SIGKILL) at the steps that a file names, in turn.

    STOP_FILE=... [OVERDUE=seconds] python -m tests.acceptance.stopping_worker

A step is `METHOD:before` or `METHOD:after`, of the methods in STEPS.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import wraps
from pathlib import Path
from typing import Any, Final

from app.cli.main import main
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.rate_limit import RateLimiter
from app.upstream.client import ChannelManager
from workers.sinks.python import Function
from workers.worker import OrderWorker

STEPS: Final[dict[type, tuple[str, ...]]] = {
    OrderWorker: ("execute_job", "prepare_job_execution", "handle_job_success"),
    Ledger: (
        *("start_fetch", "store_fetch", "fail_fetch", "acquire_delivery", "complete_delivery"),
        *("dispatch_due", "release_worker"),
    ),
    RateLimiter: ("permit", "_call_release"),
    ChannelManager: ("get_order",),
    Function: ("deliver",),
}


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


def stopping(owner: type, name: str) -> None:
    """Let a process die before or after the method."""
    method = getattr(owner, name)

    @wraps(method)
    def step(*arguments: Any, **named: Any) -> Any:
        stop(f"{name}:before")
        answer = method(*arguments, **named)
        stop(f"{name}:after")
        return answer

    setattr(owner, name, step)


if __name__ == "__main__":
    for owner, names in STEPS.items():
        for name in names:
            stopping(owner, name)
    policy.JOB_OVERDUE = int(os.environ.get("OVERDUE") or policy.JOB_OVERDUE)  # type: ignore[misc]  # for one test
    sys.argv = ["ota-receiver", "worker"]
    main()
