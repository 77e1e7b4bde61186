"""The traces of an order from the real processes, as a collector receives them over OTLP.

`uv run pytest -n0 -s tests/acceptance/test_traces.py` prints them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app import bootstrap
from app.ids import OrderKey
from app.ledger.redis import Redis
from app.settings import parse
from tests.eventually import eventually
from tests.lab_upstream import Upstream, fake_upstream, raw, says
from tests.service import Service, ask

KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
POST, SEND, FETCH, DELIVERY = (
    "POST /webhooks/ota-channel-manager",
    "send ota-live",
    "process ota-live",
    "process ota-sink-shop",
)
GET = "GET /{tenant}/{environment}/{company}/channelManager/{orderId}"


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
    values = {
        pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in one.attributes
    }
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
        said = {name: value for name, value in one.attributes.items() if name in SHOWN}
        line = f"{numbers[one.id]:>2} {'   ' * depth}{'└─ ' if depth else ''}{one.name} ({one.kind})"
        line += f" {(one.ended - one.started) / 1e6:.1f} ms"
        if one.links:
            line += " linked to " + ", ".join(str(numbers.get(link, link)) for link in one.links)
        lines.append(line + "".join(f" {SHOWN[name]}={value}" for name, value in said.items()))
        if one.error:
            lines[-1] += f" ERROR {one.error}"
        for child in spans:
            if child.parent == one.id:
                show(child, depth + 1)

    for one in spans:
        if one.parent not in by_id:
            lines.append(f"trace {one.trace}" + (f", continued from {one.parent}" if one.parent else ""))
            show(one, 0)
    return "\n".join(lines)


SHOWN = {
    "http.response.status_code": "status",
    "messaging.batch.message_count": "events",
    "ota.outcome": "outcome",
    "ota.attempt": "attempt",
}


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


def test_the_traces_of_an_order_from_two_events_to_a_repeated_delivery(
    traced: Service, collector: Collector, hook: Upstream
) -> None:
    hook.will(says(503), says(200))
    traced.start("web")
    (order_id,) = traced.issue()
    sent = {"values": [traced.event(order_id)]}
    headers = {"traceparent": SAMPLED, "tracestate": "shop=1"}
    assert ask("POST", traced.webhook, sent, headers)[0] == 200
    assert traced.post(traced.event(order_id))[0] == 200
    traced.start("worker")
    traced.wait_fetched(order_id)
    eventually(lambda: traced.log("worker", "delivery.failed"), what="the first delivery fails")
    with Redis.from_url(traced.valkey.url) as redis:
        ledger = bootstrap.ledger(parse(traced.variables), redis, ("shop",))
        key = OrderKey(traced.company_id, order_id)
        assert ledger.retry_delivery(key, "shop")

    spans = collector.wait_for(
        *(POST, SEND) * 2, FETCH, GET, "EVALSHA store_fetch", *(DELIVERY, "EVALSHA complete_delivery") * 2
    )
    print(f"\n{as_text(spans)}")
    print(spans)
