"""The log: the fields that a line may have, and one way out for every line.

Lines are JSON unless stdout is a terminal; lines of uvicorn and RQ get the same form. A field that is not in FIELDS is
dropped, so no value gets into the logs by accident. tests/unit/test_log.py compares the source with docs/logs.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, BinaryIO, Final, Literal, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from app.texts import printable

Form = Literal["auto", "json", "ecs", "console"]

_FIELDS: Final = """
    timestamp level event service version host logger request_id trace_id span_id order_id job_id worker

    advice attempts away_s busy_s bytes cause changed coalesced company consumer coupons dead due due_in_s duplicates
    duration_ms enqueued erased error events exit_code field figure for_good function held http_status ignored
    invalid_items items key kind lasted_s lines lost manifest method name next_in_s no_event open_s orders ours outcome
    pages parent_id path pid place pool problems processes proxy_request_id queue queued quiet_s reason requests
    revision role rows runbook sender shape sink spooled status stored_status stuck text tickets trace unreadable
    unscheduled user usual waiting wallets what workers
"""

SAMPLE_SECONDS: Final = 1.0

SENDERS: Final = 50
OTHERS: Final = "others"
"""A Sampler tells so many senders apart; all others are one."""

WAIT: Final = 0.05
"""Seconds that a line waits for a slow reader of the log; a request waits as long."""

FIELDS: Final = frozenset(_FIELDS.split())
"""Every field that a line may have; docs/logs.md has the fields of each event."""

_ECS: Final = {
    "timestamp": "@timestamp",
    "level": "log.level",
    "event": "message",
    "service": "service.name",
    "version": "service.version",
    "host": "host.name",
    "logger": "log.logger",
    "pid": "process.pid",
    "request_id": "http.request.id",
    "trace_id": "trace.id",
    "span_id": "span.id",
    "parent_id": "parent.id",
    "sender": "client.address",
    "method": "http.request.method",
    "status": "http.response.status_code",
    "bytes": "http.request.body.bytes",
    "path": "url.path",
    "error": "error.type",
    "trace": "error.stack_trace",
}
"""The names of Elastic's common schema; the other fields get `ota.` before their names."""


def get() -> structlog.typing.FilteringBoundLogger:
    """Return a logger; before `configure` it writes in structlog's own format."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


_log = get()


def writer(event: str) -> Callable[[EventDict], None]:
    """Return what logs a line of `event` with these fields, as `get().info` does; call it after `configure`.

    For a line that each request has: without structlog's own steps a POST of one event takes 6 % less CPU time.
    """
    if not get().is_enabled_for(logging.INFO):
        return lambda fields: None
    config = structlog.get_config()
    processors, logger = config["processors"], config["logger_factory"]()

    def write(fields: EventDict) -> None:
        line: Any = {"event": event, **fields}
        for process in processors:
            line = process(logger, "info", line)
        logger.msg(line)

    return write


def configure(level: str = "INFO", form: Form = "auto", out: TextIO | None = None) -> None:
    """Send all log lines of this process to `out` (stdout), as JSON or, on a terminal, as readable text."""
    out = out or sys.stdout
    json_lines = form in {"json", "ecs"} or (form == "auto" and not out.isatty())
    render: Processor
    factory: structlog.BytesLoggerFactory | structlog.WriteLoggerFactory
    output = Output(out)
    if json_lines:
        render = structlog.processors.JSONRenderer(serializer=_encode)
        factory = structlog.BytesLoggerFactory(cast("BinaryIO", _OncePerTurn(output)))
    else:
        render = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        factory = structlog.WriteLoggerFactory(cast("TextIO", output))
    shared: list[Processor] = [structlog.contextvars.merge_contextvars]
    if json_lines:
        shape = _shaped_as_json(form)
    else:
        time = structlog.processors.TimeStamper(fmt="iso", utc=True)
        shared += [structlog.processors.add_log_level, time, _printable_texts]
        shape = _drop_unknown_fields
    structlog.configure(
        processors=[output.report_lost, *shared, shape, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    _configure_foreign(level, shared, shape if json_lines else None, cast("TextIO", output))
    if json_lines:
        _log_what_python_prints()


class Output:
    """Where the lines go: it never raises, and never waits longer than WAIT for a reader that does not read.

    A line that cannot be written (the reader is gone or does not read, the disk is full) is dropped and counted.
    `log.lines_lost` reports how many, once, after a line was written again.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lost = self._to_report = 0
        self._is_torn = False
        self._file: int | None = None
        self._may_block = False
        with suppress(OSError, ValueError):  # a buffer of a test is no file
            self._file, self._may_block = _without_blocking(out.fileno())
        self._waiting = select.poll()
        if self._file is not None:
            self._waiting.register(self._file, select.POLLOUT)

    def write(self, part: bytes | str) -> None:
        lines = part.encode(errors="replace") if isinstance(part, str) else part
        if not self._put(b"\n" + lines if self._is_torn else lines):
            self._lost += lines.count(b"\n")
        else:
            self._to_report, self._lost = self._to_report + self._lost, 0

    def report_lost(self, _logger: WrappedLogger, _name: str, line: EventDict) -> EventDict:
        """Log before this line how many were lost: a processor, as the logger is locked while it writes."""
        lost, self._to_report = self._to_report, 0
        if lost:
            _log.warning("log.lines_lost", lines=lost)
        return line

    def flush(self) -> None:
        """Do nothing: `write` keeps nothing back."""

    def _put(self, left: bytes) -> bool:
        if self._file is None:
            self._out.write(left.decode())
            self._out.flush()
            return True
        is_begun = False
        try:
            while left:
                written = self._write(self._file, left)
                is_begun, left = is_begun or written > 0, left[written:]
        except OSError:
            self._is_torn = self._is_torn or is_begun
            return False
        self._is_torn = False
        return True

    def _write(self, file: int, left: bytes) -> int:
        """Return how many bytes were written; raises OSError, such as BlockingIOError when the reader does not read."""
        if not self._may_block:
            with suppress(BlockingIOError):
                return os.write(file, left)
        # Once a line was dropped, no line waits until the reader reads again.
        if not self._waiting.poll(0 if self._lost else WAIT * 1000):
            raise BlockingIOError
        # What polls as writable takes so much without blocking (pipe(7)).
        return os.write(file, left[: select.PIPE_BUF])


def _without_blocking(file: int) -> tuple[int, bool]:
    """Return the file, where possible opened again so that a write to a full pipe fails, and whether a write may block.

    The flag O_NONBLOCK belongs to all that have the file open, such as a terminal, so it is not set there.
    """
    mode = os.fstat(file).st_mode
    if stat.S_ISFIFO(mode):
        with suppress(OSError):  # not Linux, or the pipe belongs to another user
            return os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_NONBLOCK), False
    return file, not stat.S_ISREG(mode)


class _OncePerTurn:
    """The output, written once per turn of the event loop: writing takes a fifth of the CPU time of a small request.

    Outside an event loop each line is written at once.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._held: list[bytes] = []

    def write(self, line: bytes) -> None:
        self._held.append(line)

    def flush(self) -> None:
        if len(self._held) > 1:
            return  # the first one has called for it
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._write_held()
        else:
            loop.call_soon(self._write_held)

    def _write_held(self) -> None:
        held, self._held = self._held, []
        self._out.write(b"".join(held))


class Sampler:
    """For lines that anybody can cause: of a flood from one sender each second has one line.

    The first line passes. While others follow, `report` gets each second their status, their sender and their number;
    beyond SENDERS, the further senders are counted together as OTHERS. Needs a running event loop.
    """

    def __init__(self, report: Callable[[int, str, int], None]) -> None:
        self._report = report
        self._held: dict[tuple[int, str], int] = {}

    def passes(self, status: int, sender: str) -> bool:
        """Return whether the line may be written; otherwise it is counted."""
        if (status, sender) not in self._held and len(self._held) >= SENDERS:
            sender = OTHERS
        if (status, sender) in self._held:
            self._held[status, sender] += 1
            return False
        self._await_second(status, sender)
        return True

    def _await_second(self, status: int, sender: str) -> None:
        self._held[status, sender] = 0
        # In a context of its own: the line of the rest must not get the id of this request.
        loop = asyncio.get_running_loop()
        loop.call_later(SAMPLE_SECONDS, self._end_second, status, sender, context=Context())

    def _end_second(self, status: int, sender: str) -> None:
        if held := self._held.pop((status, sender)):
            self._report(status, sender, held)
            self._await_second(status, sender)


def trace_of(error: BaseException) -> str:
    """Return where an error was raised, without its text, which may quote names or secrets."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    places = (f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {' < '.join(places)}"


def _configure_foreign(level: str, shared: list[Processor], as_json: Processor | None, out: TextIO) -> None:
    """Give the lines of the standard library's loggers the same form and the same output."""
    render: list[Processor] = (
        [as_json, structlog.processors.JSONRenderer(serializer=lambda value, **_: _encode(value).decode())]
        if as_json
        else [structlog.dev.ConsoleRenderer()]
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared, _without_values],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # httpx logs each URL, RQ four lines per job with its arguments; our own lines replace them.
    for name in ("httpx", "httpcore", "rq.worker", "rq.job", "rq.queue", "rq.registry"):
        logging.getLogger(name).setLevel("WARNING")
    for name in ("uvicorn.access", "uvicorn", "uvicorn.error", "rq", "rq.worker"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"


def _log_what_python_prints() -> None:
    """Log warnings, and the errors that Python itself would print to stderr, without the texts of the errors."""
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: _log_uncaught("process", error, kind)
    threading.excepthook = lambda failed: _log_uncaught("thread", failed.exc_value, failed.exc_type)
    sys.unraisablehook = lambda failed: _log_uncaught("finalizer", failed.exc_value, failed.exc_type)


def _log_uncaught(what: str, error: BaseException | None, kind: type[BaseException]) -> None:
    trace = trace_of(error) if error else None
    _log.error("process.uncaught_error", what=what, error=kind.__name__, trace=trace)


def _without_values(logger: WrappedLogger, name: str, line: EventDict) -> EventDict:
    """Keep the places of a foreign traceback and drop its text.

    Only the first line of a message stays: RQ writes tracebacks below it, asyncio the repr of an exception. What RQ
    attaches as `extra`, such as the arguments of a job, is not rendered without structlog's ExtraAdder.
    """
    record = line.get("_record")
    if record is not None and record.exc_info and record.exc_info[1] is not None:
        line["trace"] = trace_of(record.exc_info[1])
        record.exc_info = record.exc_text = None
    for field in ("exc_info", "stack_info"):
        line.pop(field, None)
    line["event"] = line["event"].partition("Traceback (most recent call last)")[0].strip().partition("\n")[0]
    return line


def _printable_texts(logger: WrappedLogger, name: str, line: EventDict) -> EventDict:
    return {field: printable(value) if isinstance(value, str) else value for field, value in line.items()}


def _drop_unknown_fields(logger: WrappedLogger, name: str, line: EventDict) -> EventDict:
    return {field: value for field, value in line.items() if field in FIELDS}


def _shaped_as_json(form: Form) -> Processor:
    """Return what adds time, level and what is the same in each line, and drops unknown fields."""
    same = {"service": "ota-receiver", "version": version("ota-receiver"), "host": os.uname().nodename}
    names = {field: field for field in FIELDS}
    if form == "ecs":
        names = {field: _ECS.get(field, f"ota.{field}") for field in FIELDS} | {"ecs.version": "ecs.version"}
        same["ecs.version"] = "8.11.0"

    def shape(logger: WrappedLogger, name: str, line: EventDict) -> EventDict:
        now = f"{datetime.now(UTC).isoformat()[:-6]}Z"
        whole = {"timestamp": now, "level": name, "event": line["event"], **same, **line}
        if form != "ecs" and whole.keys() <= FIELDS:
            return whole
        return {names[field]: value for field, value in whole.items() if field in names}

    return shape


def _encode(value: Any, **_: Any) -> bytes:
    return msgspec.json.encode(value, enc_hook=str)
