"""The log: the declared events with their fields, and one way out for every line.

Lines are JSON unless stdout is a terminal; lines of uvicorn and RQ get the same form. A field that an event does not
declare is dropped, so no value gets into the logs by accident. tests/unit/test_log.py compares the source with EVENTS.
"""

from __future__ import annotations

import asyncio
import logging
import logging.config
import sys
import traceback
from types import TracebackType
from typing import Any, BinaryIO, Final, Literal, cast

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

EVENTS: Final[dict[str, frozenset[str]]] = {
    name: frozenset(fields.split())
    for name, fields in {
        "service.started": "role pid",
        "service.stopped": "role",
        "service.bad_settings": "problems",
        "service.other_schema": "held ours",
        "request": (
            "method path status reason duration_ms bytes events queued coalesced duplicates spooled erased ignored"
            " invalid_items"
        ),
        "request.client_disconnected": "path",
        "request.failed": "path error trace",
        "auth.rejected": "company items",
        "auth.alert": "company items advice",
        "items.invalid": "reason items",
        "intake.unavailable": "error",
        "redis.unavailable": "role error",
        "redis.recovered": "role waiting away_s",
        "spool.drained": "events",
        "spool.file_gone": "events",
        "spool.failed": "error trace",
        "spool.event_refused": "order_id company",
        "order.fetched": (
            "order_id company status revision changed wallets tickets coupons manifest duration_ms http_status queue"
        ),
        "fetch.skipped": "order_id company reason",
        "fetch.retry_scheduled": "order_id company reason http_status attempts due_in_s",
        "fetch.deferred": "order_id company reason http_status due_in_s",
        "order.deleted_upstream": "order_id company http_status",
        "order.dead_lettered": "order_id company reason http_status attempts",
        "delivery.succeeded": "order_id company sink revision duration_ms",
        "delivery.failed": "order_id company sink revision error attempts due_in_s trace",
        "delivery.dead_lettered": "order_id company sink revision reason attempts",
        "job.failed": "order_id error trace",
        "job.refused": "function",
        "subscription.active": "company",
        "subscription.down": "company reason",
        "subscription.repaired": "company",
        "subscription.check_failed": "company what reason http_status",
        "upstream.breaker_opened": "company reason http_status open_s",
        "reconcile.finished": (
            "company cause outcome pages rows unreadable no_event changed stuck queued duration_ms next_in_s"
        ),
        "reconcile.discrepancy_found": "order_id company kind status stored_status",
        "reconcile.failed": "company cause reason http_status pages queued error trace next_in_s",
        "pool.worker_started": "worker queue",
        "pool.worker_died": "worker exit_code order_id",
        "pool.worker_failed": "worker error trace",
        "pool.recovered": "pool workers",
        "dispatcher.enqueued": "due enqueued",
        "dispatcher.orders_broken": "orders",
        "dispatcher.orders_found": "orders",
        "worker.timed_out": "worker busy_s",
        "pool.failed": "error trace",
        "alert.firing": "name company sink figure runbook",
        "alert.silence": "company reason quiet_s usual runbook",
        "alert.resolved": "name company sink lasted_s",
        "alert.failed": "error trace",
    }.items()
}
"""Every log event, with the fields that it may have beside COMMON."""

COMMON: Final = frozenset({"event", "level", "timestamp", "logger", "request_id", "order_id", "job_id", "worker"})


def get() -> structlog.typing.FilteringBoundLogger:
    """Return a logger; before `configure` it writes in structlog's own format."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


def configure(
    *,
    level: str = "INFO",
    form: Literal["auto", "json", "console"] = "auto",
) -> None:
    """Send all log lines of this process to stdout, as JSON or, on a terminal, as readable text."""
    json_lines = form == "json" or (form == "auto" and not sys.stdout.isatty())
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
            _drop_undeclared,
            render,
            *([] if json_lines else [_to_bytes]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.BytesLoggerFactory(cast("BinaryIO", _OncePerTurn(sys.stdout.buffer))),
        cache_logger_on_first_use=True,
    )
    logging.config.dictConfig(_foreign(level, [structlog.contextvars.merge_contextvars, time], json_lines))


class _OncePerTurn:
    """Stdout, written once per turn of the event loop: a write per request is a fifth of a small request's CPU time.

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


def _foreign(level: str, shared: list[Processor], json_lines: bool) -> dict[str, Any]:
    renderer: list[Processor] = (
        [structlog.processors.JSONRenderer(serializer=lambda value, **_: _encode(value).decode())]
        if json_lines
        else [structlog.dev.ConsoleRenderer()]
    )
    quiet = {"level": "WARNING", "handlers": [], "propagate": True}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "one": {
                "()": structlog.stdlib.ProcessorFormatter,
                "foreign_pre_chain": [
                    structlog.stdlib.add_logger_name,
                    structlog.stdlib.add_log_level,
                    *shared,
                    _without_values,
                ],
                "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
            }
        },
        "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "one", "stream": "ext://sys.stdout"}},
        "root": {"level": level, "handlers": ["out"]},
        # httpx logs each URL, RQ four lines per job with its arguments; our own lines replace them.
        "loggers": dict.fromkeys(("httpx", "httpcore", "rq.worker", "rq.job", "rq.queue", "rq.registry"), quiet)
        | {name: {"handlers": [], "propagate": True} for name in ("uvicorn", "uvicorn.error", "rq")}
        | {"uvicorn.access": {"handlers": [], "propagate": False}},
    }


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


def _drop_undeclared(logger: WrappedLogger, name: str, line: EventDict) -> EventDict:
    declared = EVENTS.get(line["event"], frozenset())
    for field in [field for field in line if field not in declared and field not in COMMON]:
        del line[field]
    return line


def _encode(value: Any, **_: Any) -> bytes:
    return msgspec.json.encode(value, enc_hook=str)


def _to_bytes(logger: WrappedLogger, name: str, line: Any) -> bytes:
    return str(line).encode()
