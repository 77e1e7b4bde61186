"""Runs a command in this process as if in one of its own: starting a Python takes longer than what a command does.

Tests of pipes, terminals and signals start a process.
"""

from __future__ import annotations

import contextvars
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import structlog

from app.cli.main import main
from app.settings import NAMES

_one_at_a_time: Final = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[Any]:
        """Return what a command with --json printed, and nothing else may stand on its stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


class _Stream(io.TextIOWrapper):
    """A pipe that keeps what is written to it."""

    buffer: io.BytesIO

    def __init__(self, text: str = "", encoding: str = "utf-8", *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(text.encode()), encoding=encoding, write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def run(arguments: Sequence[str], environment: Mapping[str, str], stdin: str, columns: int | None = None) -> Ended:
    """Run `ota-receiver` with these arguments, as from a pipe, or to a terminal of so many columns.

    Raises AssertionError if it prints a traceback.
    """
    with _process_of_its_own(environment, arguments, stdin, columns) as (out, err):
        code = contextvars.copy_context().run(_exit_code)
    ended = Ended(code, *(one.buffer.getvalue().decode(one.encoding) for one in (out, err)))
    assert "Traceback" not in ended.err, ended.err
    return ended


def _exit_code() -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


@contextmanager
def _process_of_its_own(
    environment: Mapping[str, str], arguments: Sequence[str], stdin: str, columns: int | None
) -> Iterator[tuple[_Stream, _Stream]]:
    """Give the block the environment, arguments and streams of a process, and yield its stdout and stderr.

    All that a command changes in this process is as before when the block ends: also its signal handlers and where
    its log lines go.
    """
    is_main = threading.current_thread() is threading.main_thread()
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    out, err = _Stream(encoding=encoding, terminal=columns is not None), _Stream(encoding=encoding)
    ours: dict[str, Any] = {"argv": ["ota-receiver", *arguments], "stdin": _Stream(stdin), "stdout": out, "stderr": err}
    with _one_at_a_time, _log_state_restored():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with (
                patch.dict(os.environ, {"COLUMNS": str(columns or 80)} | dict(environment), clear=True),
                patch.multiple(sys, excepthook=sys.excepthook, **ours),
            ):
                time.tzset()
                yield out, err
        finally:
            time.tzset()
            if is_main:
                for number, handler in handlers.items():
                    signal.signal(number, handler)


@contextmanager
def _log_state_restored() -> Iterator[None]:
    root, config = logging.getLogger(), structlog.get_config() if structlog.is_configured() else None
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
        structlog.reset_defaults()
        if config is not None:
            structlog.configure(**config)
        ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in {"app", "workers"}]
        for logger in filter(None, (vars(module).get("_log") for module in ours)):
            # It keeps the stream of its first use.
            vars(logger).pop("bind", None)


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without any variable, or NAME_FILE, that app.settings reads."""
    names = {name.upper() for name in NAMES}
    ours = names | {f"{name}_FILE" for name in names}
    return {name: value for name, value in environment.items() if name.upper() not in ours}
