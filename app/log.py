"""The log: the fields that a line may have, and one way out for every line.

Lines are JSON unless stdout is a terminal; lines of uvicorn and RQ get the same form. A field that is not in FIELDS is
dropped, so no value gets into the logs by accident. tests/unit/test_log.py compares the source with docs/logs.md.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from types import TracebackType
from typing import Any, BinaryIO, Final, Literal, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_FIELDS: Final = """
    event level timestamp logger request_id order_id job_id worker

    advice attempts away_s busy_s bytes cause changed coalesced company coupons due due_in_s duplicates duration_ms
    enqueued erased error events exit_code figure function held http_status ignored invalid_items items kind lasted_s
    manifest method name next_in_s no_event open_s orders ours outcome pages path pid pool problems queue queued quiet_s
    reason revision role rows runbook sink spooled status stored_status stuck tickets trace unreadable usual waiting
    wallets what workers
"""

FIELDS: Final = frozenset(_FIELDS.split())
"""Every field that a line may have; docs/logs.md has the fields of each event."""


def get() -> structlog.typing.FilteringBoundLogger:
    """Return a logger; before `configure` it writes in structlog's own format."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


def configure(
    level: str = "INFO", form: Literal["auto", "json", "console"] = "auto", out: TextIO | None = None
) -> None:
    """Send all log lines of this process to `out` (stdout), as JSON or, on a terminal, as readable text."""
    out = out or sys.stdout
    json_lines = form == "json" or (form == "auto" and not out.isatty())
    render: Processor = (
        structlog.processors.JSONRenderer(serializer=_encode)
        if json_lines
        else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    )
    time = structlog.processors.TimeStamper(fmt="iso", utc=True)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            time,
            _drop_unknown_fields,
            render,
            *([] if json_lines else [_to_bytes]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.BytesLoggerFactory(cast("BinaryIO", _OncePerTurn(out.buffer))),
        cache_logger_on_first_use=True,
    )
    _configure_foreign(level, [structlog.contextvars.merge_contextvars, time], json_lines, out)


class _OncePerTurn:
    """The output, written once per turn of the event loop: writing takes a fifth of the CPU time of a small request.

    Outside an event loop each line is written at once.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._held: list[bytes] = []

    def write(self, line: bytes) -> None:
        self._held.append(line)

    def flush(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._write_held()
        else:
            if len(self._held) == 1:
                loop.call_soon(self._write_held)

    def _write_held(self) -> None:
        held, self._held = self._held, []
        self._out.write(b"".join(held))
        self._out.flush()


def trace_of(error: BaseException) -> str:
    """Return where an error was raised, without its text, which may quote names or secrets."""
    return _frames(type(error), error.__traceback__)


def _frames(kind: type[BaseException] | None, trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)[-8:]
    places = " < ".join(
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames)
    )
    return f"{kind.__name__ if kind else 'error'} at {places}"


def _configure_foreign(level: str, shared: list[Processor], json_lines: bool, out: TextIO) -> None:
    """Give the lines of the standard library's loggers the same form and the same output."""
    render: Processor = (
        structlog.processors.JSONRenderer(serializer=lambda value, **_: _encode(value).decode())
        if json_lines
        else structlog.dev.ConsoleRenderer()
    )
    names = [structlog.stdlib.add_logger_name, structlog.stdlib.add_log_level]
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*names, *shared, _without_values],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
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


def _without_values(logger: WrappedLogger, name: str, line: EventDict) -> EventDict:
    """Keep the places of a foreign traceback and drop its text.

    Only the first line of a message stays: RQ writes tracebacks below it, asyncio the repr of an exception. What RQ
    attaches as `extra`, such as the arguments of a job, is not rendered without structlog's ExtraAdder.
    """
    record = line.get("_record")
    if record is not None and record.exc_info and record.exc_info[0] is not None:
        line["trace"] = _frames(record.exc_info[0], record.exc_info[2])
        record.exc_info = record.exc_text = None
    for field in ("exc_info", "stack_info"):
        line.pop(field, None)
    line["event"] = line["event"].partition("Traceback (most recent call last)")[0].strip().partition("\n")[0]
    return line


def _drop_unknown_fields(logger: WrappedLogger, name: str, line: EventDict) -> EventDict:
    return {field: value for field, value in line.items() if field in FIELDS}


def _encode(value: Any, **_: Any) -> bytes:
    return msgspec.json.encode(value, enc_hook=str)


def _to_bytes(logger: WrappedLogger, name: str, line: Any) -> bytes:
    return str(line).encode()
