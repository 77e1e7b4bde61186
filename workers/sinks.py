"""The sinks, as listed in SINKS: each takes one revision of an order at a time, at least once."""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Awaitable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from contextvars import copy_context
from datetime import timedelta
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from rq.timeouts import JobTimeoutException

from app import log
from app.errors import SettingsError
from app.ledger.policy import JOB_TIMEOUT
from app.texts import printable
from app.upstream.models import Order

if TYPE_CHECKING:
    import asyncio

MOST_LINES: Final = 100
"""Lines of one delivery's output that are logged; a sink that prints in a loop must not fill the log."""

LONGEST_LINE: Final = 1000
"""Bytes of such a line; the rest is cut."""

LONGEST_REASON: Final = 200
"""Characters of the reason of a Reject; the rest is cut."""

ENTRY_POINTS: Final = "ota_receiver.sinks"
"""Group of the entry points by which an installed package offers its sinks."""

FORMS: Final = "is not of the form python:package.module:function, or entry:NAME of an installed package"

TRACEBACKS: Final = "OTA_DEV_TRACEBACKS"
"""Variable by which `dev` names a file for whole tracebacks, with the texts of errors. The image has no app.dev and
writes none, whatever its environment holds."""

_log = log.get()


class Context(msgspec.Struct, frozen=True):
    """What a sink gets with the order.

    `idempotency_key` is company/order/revision/digest: the same for every repeat of this revision, and for no other
    content. `attempt` counts from 1, without those that ended with Retry. `fetched_at`: when the Channel Manager last
    answered with this content, in ms since 1970.
    """

    idempotency_key: str
    company_id: str
    order_id: str
    revision: int
    attempt: int
    request_id: str
    fetched_at: int


class Retry(Exception):
    """Raised by a sink that wants this revision at another time. It is no failure and uses no attempt."""

    seconds = 0.0

    def __init__(self, *, after: float | timedelta) -> None:
        """Ask for the next call `after` so many seconds; from 5 s up to 2 h, and others are cut to these.

        Raises ValueError for a negative number and for NaN.
        """
        self.seconds = after.total_seconds() if isinstance(after, timedelta) else float(after)
        if not self.seconds >= 0:
            raise ValueError("after is negative, or no number")
        super().__init__(self.seconds)


class Reject(Exception):
    """Raised by a sink that will never take this revision: it is a dead letter at once.

    Its reason is logged and shown, on one line of 200 characters at most, so it must not hold people's data.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)

    @property
    def reason(self) -> str:
        text = str(self.args[0]) if self.args else ""
        return printable(" ".join(text.split()))[:LONGEST_REASON] or "no reason given"


class Sink:
    """A sink of SINKS: the user's own function, imported when the worker starts."""

    package = ""
    """The top package of its module: the place of an error is searched there."""

    def __init__(self, specification: str) -> None:
        """Import the function; raises SettingsError if it cannot be used."""
        kind, _, target = specification.partition(":")
        if kind == "entry":
            target = _entry_point(target)
        module_name, _, function_name = target.partition(":")
        if kind not in {"python", "entry"} or not all(map(str.isidentifier, (*module_name.split("."), function_name))):
            raise SettingsError(FORMS)
        self.package = module_name.partition(".")[0]
        try:
            module = import_module(module_name)
        except (Exception, SystemExit) as error:
            # Importing the user's module may raise anything.
            reason = failure_of(self.package, error)
            if isinstance(error, ModuleNotFoundError) and error.name:
                reason = f"no module {error.name} in {_searched()}"
            raise SettingsError(f"cannot be imported: {reason}") from error
        if not hasattr(module, function_name):
            raise SettingsError(
                f"cannot be imported: {getattr(module, '__file__', '') or module_name} has no {function_name}"
            )
        self._function = getattr(module, function_name)
        if not callable(self._function):
            raise SettingsError("is not callable")
        if inspect.isgeneratorfunction(self._function) or inspect.isasyncgenfunction(self._function):
            raise SettingsError("is a generator: calling it would run nothing of it")
        try:
            inspect.signature(self._function).bind(None, None)
        except TypeError:
            raise SettingsError("does not take two arguments, an order and its context") from None
        except ValueError:  # written in C, without a signature
            pass
        self._runner: asyncio.Runner | None = None

    def deliver(self, order: Order, context: Context) -> None:
        """Deliver a revision; raises what the function raises, also Retry and Reject.

        An async function runs on one event loop for all deliveries of this process. After another exception, which may
        be RQ's time limit in the middle of the loop, the loop is closed, and the next delivery gets a new one.
        """
        result = self._function(order, context)
        if not inspect.isawaitable(result):
            return
        from asyncio import Runner  # here: most sinks are not async, and it takes 2 MB of each worker

        self._runner = self._runner or Runner()
        try:
            self._runner.run(_finished(result), context=copy_context())
        except (Retry, Reject):
            raise
        except BaseException:
            runner, self._runner = self._runner, None
            runner.close()
            raise


def _entry_point(name: str) -> str:
    """Return module:function of the entry point; raises SettingsError unless one installed package has it."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise SettingsError(FORMS)
    offered = entry_points(group=ENTRY_POINTS)
    found = [one for one in offered if one.name == name]
    if not found:
        names = ", ".join(sorted({one.name for one in offered})) or "none"
        raise SettingsError(f"is no sink of an installed package; these have: {names}")
    if len(found) > 1:
        packages = " and ".join(sorted(one.dist.name for one in found if one.dist))
        raise SettingsError(f"is a sink of several installed packages, {packages}: keep one of them")
    return found[0].value


async def _finished(result: Awaitable[object]) -> None:
    await result


def build(specifications: Iterable[str]) -> dict[str, Sink]:
    """Return name -> sink for specifications such as `python:mypackage.orders:on_order`.

    Raises SettingsError, with every problem on its own line, for an unknown kind or a function that cannot be used.
    """
    sinks: dict[str, Sink] = {}
    problems: list[str] = []
    for number, specification in enumerate(specifications, start=1):
        try:
            sinks[specification] = Sink(specification)
        except SettingsError as error:
            # Named by its place in the list: the value may hold a secret.
            problems.append(f"SINKS: number {number} {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return sinks


def failure_of(package: str, error: BaseException) -> str:
    """Return type and place of what a sink raised, such as `ValueError at orders.py:41`.

    The place is the innermost one in the sink's own `package`. The text is left out, as it may quote people's data;
    that of our time limit and of the system's error numbers cannot.
    """
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


def _searched() -> str:
    """Return in words where modules are searched: the folders of PYTHONPATH and others that are not Python's own."""
    pythons = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts"))
    folders = [one or os.getcwd() for one in sys.path if not one.startswith(pythons) and not one.endswith(".zip")]
    return f"{', '.join((*dict.fromkeys(folders), 'the installed packages'))} (PYTHONPATH adds folders)"
