"""The traces of an order from the real processes, as a collector receives them over OTLP.

`uv run pytest -n0 -s tests/acceptance/test_traces.py` prints them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
from msgspec.structs import replace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from structlog.testing import capture_logs

from app import bootstrap
from app.dev.processes import free_port
from app.ids import OrderKey, traceparent
from app.ledger.redis import Redis
from app.settings import parse
from app.traces import OFF, ExportingTracer
from tests import command
from tests.eventually import eventually
from tests.lab import event_of
from tests.lab_upstream import Reply, Upstream, fake_upstream, raw, says, worker_lab
from tests.service import Service, ask

KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
POST, SEND, FETCH, DELIVERY = (
    "POST /webhooks/ota-channel-manager",
    "send ota-live",
    "process ota-live",
    "process ota-sink-shop",
)
GET = "GET /{tenant}/{environment}/{company}/channelManager/{orderId}"
STORE, COMPLETE = "EVALSHA store_fetch", "EVALSHA complete_delivery"
MESSAGING = {
    "messaging.system": "rq",
    "messaging.operation.type": "send",
    "messaging.operation.name": "send",
    "messaging.destination.name": "ota-live",
}


SHOWN = {
    "http.response.status_code": "status",
    "messaging.batch.message_count": "events",
    "ota.outcome": "outcome",
    "ota.attempt": "attempt",
}
"""The attributes that `as_text` shows."""


@dataclass(frozen=True)
class Span:
    """A span as received: `links` are the ids of spans, `error` the text of its status."""

    service: str
    trace: str
    id: str
    parent: str
    state: str
    name: str
    kind: str
    started: int
    ended: int
    links: tuple[str, ...]
    error: str
    attributes: dict[str, Any]


class Collector:
    """A receiver of OTLP by HTTP."""

    def __init__(self, http: Upstream) -> None:
        self.url = http.url
        self.http = http
        http.will(says(200))

    def spans(self) -> list[Span]:
        """Return what has come so far, by time; raises DecodeError for a body that is not OTLP."""
        found = []
        for asked in [*self.http.asked]:
            assert (asked.method, asked.target) == ("POST", "/v1/traces")
            assert asked.headers["content-type"] == "application/x-protobuf"
            for part in ExportTraceServiceRequest.FromString(asked.body).resource_spans:
                resource = {one.key: one.value.string_value for one in part.resource.attributes}
                found += [_span(resource["service.name"], one) for scope in part.scope_spans for one in scope.spans]
        return sorted(found, key=lambda one: one.started)

    def wait_for(self, *names: str) -> list[Span]:
        """Return all spans once their names, sorted, are these."""

        def there() -> list[Span]:
            found = self.spans()
            assert sorted(one.name for one in found) == sorted(names)
            return found

        return eventually(there, what=f"the spans {names}")


def _span(service: str, one: Any) -> Span:
    values = {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in one.attributes}
    error = one.status.message if one.status.code == 2 else ""
    return Span(
        service,
        one.trace_id.hex(),
        one.span_id.hex(),
        one.parent_span_id.hex(),
        one.trace_state,
        one.name,
        KINDS[one.kind],
        one.start_time_unix_nano,
        one.end_time_unix_nano,
        tuple(link.span_id.hex() for link in one.links),
        error,
        values,
    )


def as_text(spans: list[Span]) -> str:
    """Return the spans as trees, with what each is linked to."""
    by_id = {one.id: one for one in spans}
    numbers = {one.id: number for number, one in enumerate(spans, 1)}
    lines: list[str] = []

    def show(one: Span, depth: int) -> None:
        line = f"{numbers[one.id]:>2} {'   ' * depth}{'└─ ' if depth else ''}{one.name} ({one.kind})"
        line += f" {(one.ended - one.started) / 1e6:.1f} ms"
        if one.links:
            line += " linked to " + ", ".join(str(numbers.get(link, link)) for link in one.links)
        line += "".join(f" {short}={one.attributes[name]}" for name, short in SHOWN.items() if name in one.attributes)
        lines.append(line + (f" ERROR {one.error}" if one.error else ""))
        for child in spans:
            if child.parent == one.id:
                show(child, depth + 1)

    for one in spans:
        if one.parent not in by_id:
            lines.append(f"trace {one.trace}" + (f", continued from {one.parent}" if one.parent else ""))
            show(one, 0)
    return "\n".join(lines)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with fake_upstream() as http:
        yield Collector(http)


@pytest.fixture
def hook() -> Iterator[Upstream]:
    with fake_upstream() as http:
        http.will(says(200))
        yield http


@pytest.fixture
def traced(bare: Service, collector: Collector, hook: Upstream) -> Service:
    """A service whose every trace goes to the collector at once, with the sink `shop`."""
    (bare.folder / "sinks.toml").write_text(
        f'[sinks.shop]\nkind = "https"\nurl = "{hook.url}/hook"\nallow_private = true\nworkers = 1\n'
        'secret = "whsec_bmV3LXNlY3JldC1jYW5hcnktMDEyMzQ1Njc4OWFi"\n'
    )
    bare.variables |= {
        "SINKS_FILE": str(bare.folder / "sinks.toml"),
        "WORKERS": "1",
        "BACKFILL_WORKERS": "0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=canary-collector-key",
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    return bare


@pytest.fixture
def tracer(collector: Collector) -> Iterator[ExportingTracer]:
    """A tracer of this process that samples what was sampled before."""
    with patch.dict(os.environ, {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}):
        yield ExportingTracer({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})


def post(service: Service, order_id: str, trace: str = "", **headers: str) -> None:
    """POST an event of the order, of a sender with this traceparent."""
    body = {"values": [service.event(order_id)]}
    given = headers | ({"traceparent": trace} if trace else {})
    assert ask("POST", service.webhook, body, given)[0] == 200


def test_the_traces_of_an_order_from_two_events_to_a_repeated_delivery(
    traced: Service, collector: Collector, hook: Upstream
) -> None:
    hook.will(says(503), says(200))
    traced.start("web")
    (order_id,) = traced.issue()
    post(traced, order_id, SAMPLED, tracestate="shop=1")
    post(traced, order_id)
    traced.start("worker")
    traced.wait_fetched(order_id)
    eventually(lambda: traced.log("worker", "delivery.failed"), what="the first delivery fails")
    with Redis.from_url(traced.valkey.url) as redis:
        ledger = bootstrap.ledger(parse(traced.variables), redis, ("shop",))
        assert ledger.retry_delivery(OrderKey(traced.company_id, order_id), "shop")

    spans = collector.wait_for(*(POST, SEND) * 2, FETCH, GET, STORE, *(DELIVERY, COMPLETE) * 2)
    sys.stdout.write(f"\n{as_text(spans)}\n")
    first, first_send, second, second_send, fetch, get, store, failed, _, delivered, _ = spans
    assert (first.trace, first.parent, first.state, first.kind) == (TRACE, PARENT, "shop=1", "server")
    assert (second.parent, second.links) == ("", ())
    assert [one.parent for one in (first_send, second_send)] == [first.id, second.id]
    assert [one.links for one in (fetch, failed, delivered)] == [(second.id, first.id)] * 3
    assert [one.kind for one in spans[4:]] == ["consumer", "client", "client", *("consumer", "client") * 2]
    assert {one.parent for one in (get, store)} == {fetch.id}
    roots = (first, second, fetch, failed, delivered)
    assert len({one.trace for one in spans}) == len(roots)
    assert [(one.error, one.attributes["ota.outcome"]) for one in (fetch, failed, delivered)] == [
        ("", "fetched"),
        ("HTTP 503", "retry"),
        ("", "succeeded"),
    ]
    # The names of the semantic conventions.
    assert first_send.attributes == MESSAGING | {"messaging.batch.message_count": 1}
    assert fetch.attributes["messaging.operation.type"] == "process"
    assert fetch.attributes["messaging.message.id"].startswith(f"ota-f-{traced.company_id}-{order_id}-")
    assert fetch.attributes["ota.order_id"] == order_id
    assert get.attributes["http.response.status_code"] == first.attributes["http.response.status_code"] == 200
    assert get.attributes["server.address"] == "127.0.0.1"
    # The sink's endpoint continues the trace of its delivery, and the log names the spans.
    assert [one.headers["traceparent"][:52] for one in hook.asked] == [
        f"00-{one.trace}-{one.id}" for one in (failed, delivered)
    ]
    lines = [
        *traced.log("web", "request"),
        *traced.log("worker", "order.fetched"),
        *traced.log("worker", "delivery.failed"),
        *traced.log("worker", "delivery.succeeded"),
    ]
    assert [(line["trace_id"], line["span_id"]) for line in lines] == [(one.trace, one.id) for one in roots]
    assert lines[2]["request_id"] == second.attributes["ota.request_id"]
    sent = b"".join(asked.body for asked in collector.http.asked)
    for secret in ("CLIENT_STATE", "NP_API_KEY"):
        assert traced.variables[secret].encode() not in sent
    assert {asked.headers["api-key"] for asked in collector.http.asked} == {"canary-collector-key"}
    assert not [line for name in ("web", "worker") for line in traced.log(name) if "canary" in str(line)]


def test_an_event_of_a_sender_that_samples_nothing_makes_no_span_and_no_span_is_lost_at_the_end(
    traced: Service, collector: Collector, hook: Upstream
) -> None:
    traced.variables["OTEL_BSP_SCHEDULE_DELAY"] = "60000"
    web, worker = traced.start("web"), traced.start("worker")
    silent, sampled = traced.issue(2)
    post(traced, silent, NOT_SAMPLED)
    post(traced, sampled, SAMPLED)
    assert ask("POST", traced.webhook, {"values": [traced.event(sampled, clientState="wrong")]})[0] == 401
    assert ask("GET", f"{traced.webhook}?validationToken=canary")[0] == 200
    eventually(lambda: len(traced.log("worker", "delivery.succeeded")) == 2, what="both are delivered")
    assert collector.spans() == []
    assert [worker.stop(), web.stop()] == [0, 0]

    spans = collector.wait_for(POST, POST, SEND, FETCH, GET, STORE, DELIVERY, COMPLETE)
    refused = next(one for one in spans if one.attributes.get("http.response.status_code") == 401)
    assert (refused.error, refused.attributes["error.type"]) == ("", "unauthenticated")
    assert {one.attributes.get("ota.order_id") for one in spans} == {None, sampled}
    (unsampled,) = (one for one in hook.asked if silent.encode() in one.body)
    assert unsampled.headers["traceparent"] == NOT_SAMPLED
    (line,) = (line for line in traced.log("worker", "order.fetched") if line["order_id"] == silent)
    assert (line["trace_id"], "span_id" in line) == (TRACE, False)


def test_a_sampler_that_asks_no_sender_decides_for_all_that_follows(traced: Service, collector: Collector) -> None:
    traced.variables["OTEL_TRACES_SAMPLER"] = "always_off"
    web, worker = traced.start("web"), traced.start("worker")
    (order_id,) = traced.issue()
    post(traced, order_id, SAMPLED)
    eventually(lambda: traced.log("worker", "delivery.succeeded"), what="the order is delivered")
    assert [worker.stop(), web.stop()] == [0, 0]

    assert collector.http.asked == []


@pytest.mark.parametrize("is_away", [True, False], ids=["away", "hangs"])
def test_a_collector_without_answers_costs_no_event_one_line_a_process_and_two_seconds_at_the_end(
    traced: Service, collector: Collector, is_away: bool
) -> None:
    if is_away:
        traced.variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{free_port()}"
    collector.http.will(collector.http.slowly(then=b"", every=60))
    web, worker = traced.start("web"), traced.start("worker")
    orders = traced.issue(5)
    for order_id in orders:
        post(traced, order_id)
    eventually(lambda: len(traced.log("worker", "delivery.succeeded")) == len(orders), what="all are delivered")
    eventually(lambda: is_away or len(collector.http.asked) == 3, what="each process with spans waits for an answer")
    for process in (worker, web):
        began = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - began < 2.0

    for name, processes in {"web": 1, "worker": 2}.items():
        lines = [(line["event"], line.get("reason")) for line in traced.log(name) if line["level"] != "info"]
        assert set(lines) <= {("traces.unavailable", "network")}
        assert len(lines) <= processes


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (says(500, b"canary"), "http_500"),
        (says(429, retry_after="60"), "http_429"),
        (says(401, b"canary"), "http_401"),
        (raw(b"HTTP/1.1 500 No\r\nno header\r\n\r\n"), "http_500"),
        (raw(b"SSH-2.0-canary\r\n\r\n"), "network"),
    ],
    ids=["500", "429", "401", "headers", "rubbish"],
)
def test_an_outage_of_the_collector_is_one_line_and_its_end_another(
    collector: Collector, answer: Reply, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    collector.http.will(answer)
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "10"}
    with patch.dict(os.environ, {"OTEL_EXPORTER_OTLP_TIMEOUT": "0.1"}), capture_logs() as lines:
        tracer = ExportingTracer(variables)
        for number in (1, 2, 3):
            if number == 3:
                collector.http.will(says(200))
            before = len(collector.http.asked)
            with tracer.send("ota-live", [SAMPLED], 1):
                pass
            eventually(lambda: len(collector.http.asked) > before, what="the span was sent")  # noqa: B023  # called at once
            eventually(lambda: len(lines) == max(1, number - 1), what="its line")  # noqa: B023  # the same
        tracer.close()

    lost, found = lines
    assert (lost["event"], lost["reason"]) == ("traces.unavailable", reason)
    assert found["event"] == "traces.recovered"
    assert found["lost"] in {1, 2}  # the second may have been sent with the third
    assert caplog.records == []


def test_a_group_belongs_to_its_first_sampled_post_and_is_linked_to_the_others(
    collector: Collector, tracer: ExportingTracer
) -> None:
    others = [SAMPLED.replace(PARENT, f"{number:016x}") for number in (1, 2)]

    with tracer.send("ota-live", [NOT_SAMPLED, SAMPLED, *others], 7):
        pass
    with tracer.send("ota-live", [NOT_SAMPLED], 1):
        pass
    with pytest.raises(KeyError), tracer.send("ota-live", [SAMPLED], 1):
        raise KeyError("canary")
    tracer.close()

    group, failed = collector.spans()
    assert (group.trace, group.parent, group.links) == (TRACE, PARENT, (f"{1:016x}", f"{2:016x}"))
    assert group.attributes["messaging.batch.message_count"] == 7
    assert failed.error == "KeyError"


def test_what_another_program_or_a_hostile_sender_wrote_stops_no_work(
    collector: Collector, tracer: ExportingTracer
) -> None:
    for state in (b"", b"a", b"=", b"a=1,,b=2,\xff=\x00", b"a=1," * 10_000, b"a" * 60_000):
        span = tracer.post(SAMPLED, [(b"tracestate", state), (b"tracestate", b"b=2")], "/hook")
        assert span is not None
        span.end("request", 200, {})
    for record in ("canary", f"can\nary {SAMPLED}", f"  {SAMPLED}", f"{SAMPLED}-1", "ä"):
        for either in (tracer, OFF):
            with either.job("ota-live", record, time.time_ns()) as passed_on:
                assert passed_on == traceparent(passed_on.encode())  # it becomes a header
    tracer.close()

    assert [one.links for one in collector.spans() if one.name == FETCH] == [(PARENT,), (PARENT,)]


def test_a_failed_call_is_an_error_of_its_job_with_the_reason_code(
    bare: Service, collector: Collector, tracer: ExportingTracer
) -> None:
    with worker_lab(bare.valkey.url, bare.sandbox, tracer=tracer) as lab:
        (made,) = lab.sandbox.admin("POST", "orders", {"count": 1, "events": 0})["orders"]
        announced = event_of(OrderKey(lab.company_id, made["order_id"]))
        lab.accept_events(replace(announced, traceparent=SAMPLED))
        lab.fault(kind="status", status=404, calls=1)
        lab.run_for(600)
        lab.issue()  # by a POST that is not sampled
        lab.work()
    tracer.close()

    failed, get, fail, fetched, *_ = spans = collector.spans()
    assert [one.name for one in spans] == [FETCH, GET, "EVALSHA fail_fetch", FETCH, GET, STORE]
    assert (get.error, get.attributes["http.response.status_code"]) == ("order_not_found", 404)
    assert (fail.error, failed.attributes["ota.outcome"]) == ("", "retry")
    assert failed.error == failed.attributes["error.type"] == "order_not_found"
    assert (fetched.error, fetched.attributes["ota.outcome"]) == ("", "fetched")
    assert [one.links for one in (failed, fetched)] == [(PARENT,)] * 2


def imported(service: Service, variables: Mapping[str, str]) -> set[str]:
    """Return the modules that web and a pool with its sink import while an event comes and is delivered."""
    parts = [service.start(name, PYTHONPROFILEIMPORTTIME="1", **variables) for name in ("web", "worker")]
    (order_id,) = service.issue()
    post(service, order_id, SAMPLED)
    eventually(lambda: "delivery.succeeded" in parts[1].output, what="the order is delivered")
    assert [part.stop() for part in reversed(parts)] == [0, 0]
    return {line.rpartition("|")[2].strip() for part in parts for line in part.output.splitlines()}


def test_without_a_collector_no_process_imports_what_makes_traces(traced: Service, hook: Upstream) -> None:
    """redis-py imports the metrics of OpenTelemetry by itself, where they are installed."""
    modules = imported(traced, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""})

    assert {"app.web.app", "app.intake.recorder", "workers.sinks.https"} <= modules
    heavy = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "google.protobuf", "requests")
    assert [name for name in modules if name.startswith(heavy)] == []
    # What a sender has given is passed on all the same.
    assert [asked.headers["traceparent"] for asked in hook.asked] == [SAMPLED]


@pytest.mark.parametrize("name", ["serve", "worker"])
def test_a_start_without_the_extra_or_with_a_wrong_variable_is_refused_with_what_to_do(
    traced: Service, name: str
) -> None:
    wrong = command.run([name], traced.variables | {"OTEL_SPAN_LINK_COUNT_LIMIT": "canary"}, "")
    with patch.dict(sys.modules, {"opentelemetry.sdk.resources": None}):
        lacking = command.run([name], traced.variables, "")

    assert [(one.code, one.objects[-1]["problems"]) for one in (wrong, lacking)] == [
        (2, ["OTEL_*: OpenTelemetry refuses a value: OTEL_SPAN_LINK_COUNT_LIMIT must be a non-negative integer"]),
        (2, ["OTEL_EXPORTER_OTLP_ENDPOINT: needs OpenTelemetry: pip install 'ota-receiver[traces]'"]),
    ]
