"""Traces: spans of POSTs, jobs, calls and deliveries for an OpenTelemetry collector (docs/traces.md).

The only file that imports OpenTelemetry, and only when an `ExportingTracer` is made: without
OTEL_EXPORTER_OTLP_ENDPOINT nothing of it is in memory. There is no global provider; a tracer is passed to what uses it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from importlib.metadata import version
from threading import Thread
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast
from urllib.parse import urlsplit

from structlog.contextvars import bind_contextvars, get_contextvars

from app import log
from app.errors import SettingsError
from app.ids import is_sampled, parent_id, trace_id, traceparent

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span, SpanContext, SpanKind
    from opentelemetry.trace import Tracer as SdkTracer
    from requests import Response

SAMPLER: Final = "OTEL_TRACES_SAMPLER"
SAMPLED: Final = "0.01"
"""The share of traces that begin here, unless OTEL_TRACES_SAMPLER says otherwise."""

FLUSH_SECONDS: Final = 1.0
"""At the end of a process, for the spans that are not sent yet."""

_COUNTS: Final = ("events", "queued", "coalesced", "duplicates", "spooled", "erased", "ignored", "invalid_items")
_log = log.get()


class Tracer:
    """Makes no spans: the tracer of a process without a collector."""

    def job(self, queue: str, posts: str, started: int, **about: str | int) -> AbstractContextManager[str]:
        """Make the span of a job of this RQ queue that began at `started` (ns since 1970).

        `posts`: the traceparents of the POSTs whose events it serves, the latest first, separated by blanks. Yields the
        traceparent to pass on: that of the span, or else of the latest POST, "" without one.
        """
        return nullcontext(_latest(posts))

    def call(self, method: str, template: str, url: str) -> AbstractContextManager[None]:
        """Make the span of a call by HTTP within a job; of the URL it shows host and port alone."""
        return nullcontext()

    def script(self, name: str) -> AbstractContextManager[None]:
        """Make the span of a script of Redis within a job."""
        return nullcontext()

    def answered(self, http_status: int) -> None:
        """Note the status of the answer in the span of a call."""

    def outcome(self, what: str, error: str = "") -> None:
        """Note in the span of a job how it ended; `error` is the reason code of a failure."""

    def close(self) -> None:
        """Send what is not sent yet, within FLUSH_SECONDS; no span is made afterwards."""


OFF: Final = Tracer()


class ExportingTracer(Tracer):
    """Sends spans to a collector from a thread of its own; whatever becomes of them, nothing else waits or fails.

    Opened with its first span: a pool makes it before it forks, and each worker has a thread and connections of its
    own.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        """`variables`: those of OpenTelemetry, also of `.env`; it reads the environment alone, so they are put there.

        Raises SettingsError without the extra `traces`, and for values that OpenTelemetry refuses.
        """
        os.environ.update(variables)
        if not os.environ.get(SAMPLER):
            os.environ[SAMPLER] = "parentbased_traceidratio"
            os.environ.setdefault(f"{SAMPLER}_ARG", SAMPLED)
        # Their lines quote addresses and headers. That of an unknown sampler stays: it samples everything.
        for name, level in (("opentelemetry", "CRITICAL"), ("opentelemetry.sdk.trace.sampling", "WARNING")):
            logging.getLogger(name).setLevel(level)
        logging.getLogger("urllib3").setLevel("CRITICAL")
        try:
            _open().processor.shutdown()
        except ModuleNotFoundError:
            wanted = "needs OpenTelemetry: pip install 'ota-receiver[traces]'"
            raise SettingsError(f"OTEL_EXPORTER_OTLP_ENDPOINT: {wanted}") from None
        except Exception as error:
            text = str(error).partition(" but got ")[0]
            raise SettingsError(f"OTEL_*: OpenTelemetry refuses a value: {text}") from None

    @cached_property
    def _sdk(self) -> _Sdk:
        return _open()

    def post(self, given: str, headers: Iterable[tuple[bytes, bytes]], route: str) -> Post | None:
        """Return the span of a POST, which continues the trace of its sender; None if it is not sampled.

        `given`: the sender's traceparent, as app.ids.traceparent returns it. A tracestate is taken from the headers.
        """
        sdk = self._sdk
        context = sdk.root
        if given:
            state = b",".join([value for name, value in headers if name == b"tracestate"])
            context = _below(_context(given, state.decode("latin-1")))
        span = sdk.sampling.start_span(f"POST {route}", context, sdk.kinds.SERVER)
        return Post(span, route) if span.is_recording() else None

    @contextmanager
    def send(self, queue: str, posts: Iterable[str], events: int) -> Iterator[None]:
        """Make the span of a group of events that are recorded in one step.

        `posts`: the traceparents of their POSTs. The span belongs to the first one that is sampled, and is linked to
        the others.
        """
        sampled = [one for one in posts if is_sampled(one)]
        if not sampled:
            yield
            return
        span = self._sdk.always.start_span(
            f"send {queue}",
            _below(_context(sampled[0])),
            self._sdk.kinds.PRODUCER,
            {**_messaging("send", queue), "messaging.batch.message_count": events},
            _links(sampled[1:]),
        )
        with _ending(span):
            yield

    @contextmanager
    def job(self, queue: str, posts: str, started: int, **about: str | int) -> Iterator[str]:
        """Do as Tracer.job; the ids of the log are attributes of the span.

        The span begins a trace of its own, linked to the POSTs: events coalesce, and a retry comes hours later. It is
        sampled if one of them is. A job without a known POST (of reconciling, of a replay) is sampled as a POST is.
        """
        from opentelemetry.trace import use_span

        known = [one for one in map(_valid, posts.split(" ")) if one]
        span = None
        if not known or any(map(is_sampled, known)):
            span = self._start_job(queue, known, started, about)
        if span is None or not span.is_recording():
            yield _latest(posts)
            return
        own = _traceparent(span)
        bind_contextvars(trace_id=trace_id(own), span_id=parent_id(own))
        # The current one, so that spans of a sink that uses OpenTelemetry itself belong to it.
        with _ending(span), use_span(span, record_exception=False, set_status_on_exception=False):
            yield own

    def _start_job(self, queue: str, posts: Sequence[str], started: int, about: Mapping[str, str | int]) -> Span:
        ids = get_contextvars()
        attributes = _messaging("process", queue) | {"messaging.message.id": ids.get("job_id") or ""}
        attributes |= {f"ota.{name}": ids[name] for name in ("request_id", "worker") if name in ids}
        attributes |= {f"ota.{name}": value for name, value in about.items()}
        tracer = self._sdk.always if posts else self._sdk.sampling
        return tracer.start_span(
            f"process {queue}", self._sdk.root, self._sdk.kinds.CONSUMER, attributes, _links(posts), started
        )

    def call(self, method: str, template: str, url: str) -> AbstractContextManager[None]:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        where: dict[str, str | int] = {"server.address": parts.hostname or "", "server.port": port}
        what = {"http.request.method": method, "url.template": template}
        return self._within_job(f"{method} {template}", where | what)

    def script(self, name: str) -> AbstractContextManager[None]:
        of_redis = {"db.system.name": "redis", "db.operation.name": "EVALSHA", "db.stored_procedure.name": name}
        return self._within_job(f"EVALSHA {name}", of_redis)

    @contextmanager
    def _within_job(self, name: str, attributes: Mapping[str, str | int]) -> Iterator[None]:
        from opentelemetry.trace import get_current_span, use_span

        if not get_current_span().is_recording():
            yield
            return
        span = self._sdk.always.start_span(name, None, self._sdk.kinds.CLIENT, attributes)
        with _ending(span), use_span(span, record_exception=False, set_status_on_exception=False):
            yield

    def answered(self, http_status: int) -> None:
        from opentelemetry.trace import get_current_span

        get_current_span().set_attribute("http.response.status_code", http_status)

    def outcome(self, what: str, error: str = "") -> None:
        from opentelemetry.trace import get_current_span

        span = get_current_span()
        span.set_attribute("ota.outcome", what)
        if error:
            _fail(span, error)

    def close(self) -> None:
        """Do as Tracer.close; the SDK itself would wait 30 s for a collector that does not answer."""
        if "_sdk" in vars(self):
            thread = Thread(target=self._sdk.processor.shutdown, daemon=True)
            thread.start()
            thread.join(FLUSH_SECONDS)


class Post:
    """The span of a POST that is sampled; `traceparent` names it."""

    def __init__(self, span: Span, route: str) -> None:
        self._span = span
        self._route = route
        self.traceparent = _traceparent(span)

    def end(self, request_id: str, status: int, line: Mapping[str, Any]) -> None:
        """End it with the status of the answer, and what the log line of the request has of numbers and reason."""
        attributes: dict[str, Any] = {
            "http.request.method": "POST",
            "http.route": self._route,
            "url.path": self._route,
            "http.response.status_code": status,
            "ota.request_id": request_id,
        }
        self._span.set_attributes(attributes | {f"ota.{name}": line[name] for name in _COUNTS if name in line})
        if status >= 500:
            _fail(self._span, str(line.get("reason", status)))
        elif "reason" in line:
            self._span.set_attribute("error.type", line["reason"])
        self._span.end()


class _Sdk(NamedTuple):
    """What makes the spans of a process: `sampling` asks the sampler, `always` is for what is sampled already.

    `root` is the context of the first span of a trace.
    """

    sampling: SdkTracer
    always: SdkTracer
    processor: Any
    root: Context
    kinds: type[SpanKind]


def _open() -> _Sdk:
    """Start the thread that sends; raises ModuleNotFoundError without the extra, ValueError for a wrong variable."""
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON
    from opentelemetry.trace import SpanKind

    names = ("ota-receiver", version("ota-receiver"))
    ours = {"service.name": names[0], "service.version": names[1]}
    resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
    processor = BatchSpanProcessor(cast("SpanExporter", _Exporter()))
    sampling, always = (TracerProvider(sampler, resource, shutdown_on_exit=False) for sampler in (None, ALWAYS_ON))
    for provider in (sampling, always):
        provider.add_span_processor(processor)
    return _Sdk(sampling.get_tracer(*names), always.get_tracer(*names), processor, Context(), SpanKind)


class _Exporter:
    """OTLP by HTTP, with two lines in the log for an outage of the collector."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from requests import Session

        session = Session()
        session.hooks["response"].append(self._note)
        self._otlp = OTLPSpanExporter(session=session)
        self._status: int | None = None
        self._lost = 0
        self._lost_since = 0.0
        self.shutdown = self._otlp.shutdown

    def _note(self, response: Response, **_: object) -> None:
        self._status = response.status_code

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send the spans, with repeats for 10 s; log the first failure of an outage, and its end."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        self._status = None
        result = self._otlp.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._lost:
                self._lost_since = time.monotonic()
                _log.warning("traces.unavailable", reason=f"http_{self._status}" if self._status else "network")
            self._lost += len(spans)
        elif self._lost:
            away_s = round(time.monotonic() - self._lost_since, 1)
            _log.warning("traces.recovered", lost=self._lost, away_s=away_s)
            self._lost = 0
        return result


def _valid(given: str) -> str:
    """Return the traceparent, "" for what another program may have written to Redis."""
    return traceparent(given.encode())


def _latest(posts: str) -> str:
    return _valid(posts.partition(" ")[0])


def _context(given: str, state: str = "") -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    flags = TraceFlags(int(given[53:], 16))
    trace, span = int(trace_id(given), 16), int(parent_id(given), 16)
    return SpanContext(trace, span, is_remote=True, trace_flags=flags, trace_state=TraceState.from_header([state]))


def _traceparent(span: Span) -> str:
    found = span.get_span_context()
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


def _below(parent: SpanContext) -> Context:
    """Return the context of a span with this parent."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    return set_span_in_context(NonRecordingSpan(parent), Context())


def _links(traceparents: Iterable[str]) -> list[Any]:
    from opentelemetry.trace import Link

    return [Link(_context(one)) for one in traceparents]


def _messaging(operation: str, queue: str) -> dict[str, Any]:
    return {
        "messaging.system": "rq",
        "messaging.operation.type": operation,
        "messaging.operation.name": operation,
        "messaging.destination.name": queue,
    }


@contextmanager
def _ending(span: Span) -> Iterator[None]:
    """End the span after the block, with the reason code of an error and never with its text."""
    try:
        yield
    except BaseException as error:
        if http_status := getattr(error, "http_status", None):
            span.set_attribute("http.response.status_code", http_status)
        _fail(span, getattr(error, "reason", "") or type(error).__name__)
        raise
    finally:
        span.end()


def _fail(span: Span, reason: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    # After a colon a reason may have a text of the user's sink.
    code = reason.partition(":")[0]
    span.set_status(Status(StatusCode.ERROR, code))
    span.set_attribute("error.type", code)
