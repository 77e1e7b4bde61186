"""What a forked child of the pool does: dies with its pool, works one queue off, and ends with a code that says why."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from typing import Final

from app import log
from app.errors import SettingsError
from app.settings import Settings
from workers import jobs, process, worker
from workers.stopwatch import Stopwatch

BAD_SETTINGS: Final = 2
"""Exit code of a child whose settings are wrong, and then of the pool: starting it again cannot help."""

Work = Callable[[Settings, str, str, Stopwatch], None]
"""What it does until it is told to stop: settings, its name, its queue, and the watch that its pool reads."""

_log = log.get()


def start(work: Work, settings: Settings, name: str, lane: str, watch: Stopwatch) -> ForkProcess:
    """Return a new child of this process that does `work`; raises OSError when there is no room for one."""
    child = get_context("fork").Process(
        target=run, args=(work, os.getpid(), settings, name, lane, watch), name=name, daemon=False
    )
    # A SIGTERM for the child must not meet our own handler in it: it waits until the child has put on its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return child


def run(work: Work, parent: int, settings: Settings, name: str, lane: str, watch: Stopwatch) -> None:
    """Do `work` as a child of the process `parent`; raises SystemExit when it cannot be done."""
    process.die_with(parent)
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
    worker.run(settings, name, lane, watch)
