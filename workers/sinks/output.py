"""What is shown of a sink: the lines that it prints, and where it failed."""

from __future__ import annotations

import errno
import io
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, cast

from rq.timeouts import JobTimeoutException

from app import log
from app.ledger.policy import JOB_TIMEOUT
from workers.sinks.contract import Failed

MOST_LINES: Final = 100
"""Lines of one delivery's output that are logged; a sink that prints in a loop must not fill the log."""

LONGEST_LINE: Final = 1000
"""Bytes of such a line; the rest is cut."""

TRACEBACKS: Final = "OTA_DEV_TRACEBACKS"
"""Variable by which `dev` names a file for whole tracebacks, with the texts of errors. The image has no app.dev and
writes none, whatever its environment holds."""

_log = log.get()


def failure_of(package: str, error: BaseException) -> str:
    """Return type and place of what a sink raised, such as `ValueError at orders.py:41`, or the reason of a Failed.

    The place is the innermost one in the sink's own `package`. The text is left out, as it may quote people's data;
    that of our time limit and of the system's error numbers cannot.
    """
    if isinstance(error, Failed):
        return error.reason
    places = [
        (frame.f_globals.get("__name__", ""), frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    own = [one for one in places if one[0].partition(".")[0] == package]
    others = [one for one in places if one[0].partition(".")[0] not in {"workers", "importlib"}]
    text = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        text += f" at {Path(error.filename).name}:{error.lineno}"
    elif found := own or others:
        _, file, line = found[-1]
        text += f" at {Path(file).name}:{line}"
    if isinstance(error, JobTimeoutException):
        text += f" (longer than {JOB_TIMEOUT} s)"
    elif isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        text += f" ({os.strerror(error.errno)})"
    return text


def show_traceback(sink: str, error: BaseException) -> None:
    """Append the whole traceback to the file of `dev`, which exists; does nothing elsewhere."""
    path = os.environ.get(TRACEBACKS)
    if path and find_spec("app.dev") is not None:
        with suppress(OSError), open(os.open(path, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as file:
            file.write("".join((f"\n{sink}\n", *traceback.format_exception(error))))


class SinkOutput(io.RawIOBase):
    """Logs what Python code prints to stdout and stderr, line by line, with what is bound to the log by then.

    What other programs and C code write is not caught.
    """

    def __init__(self) -> None:
        self._part = b""
        self._lines = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch what is printed in the block: one delivery, or the import of the sinks."""
        self._lines = 0
        # A new one for each block, as the last may have been closed or detached in it. What keeps one beyond its block,
        # such as a handler of logging, still writes to the log.
        text = io.TextIOWrapper(cast("Any", self), encoding="utf-8", errors="replace", write_through=True)
        try:
            with redirect_stdout(text), redirect_stderr(text):
                yield
        finally:
            if self._part:
                self.write(b"\n")
            if self._lines > MOST_LINES:
                _log.warning("sink.output_dropped", lines=self._lines - MOST_LINES)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Return stderr, for what needs a file: a program that the sink starts, faulthandler."""
        return 2

    def close(self) -> None:
        """Do nothing: a sink's own wrapper of `sys.stdout.buffer` closes this when it is collected."""

    def write(self, data: Any) -> int:
        *lines, part = (self._part + bytes(data)).split(b"\n")
        self._part = part[:LONGEST_LINE]
        for line in filter(None, map(bytes.rstrip, lines)):
            self._lines += 1
            if self._lines <= MOST_LINES:
                _log.info("sink.output", text=line[:LONGEST_LINE].decode(errors="replace"))
        return len(data)
