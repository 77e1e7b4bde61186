"""How long after the start of its POST an event's order is stored, one event at a time on an idle system.

    uv run python -m tests.benchmarks.latency [--events 300] [--latency-ms 50]

Between two events the same getOrder is made without this service: that is upstream's latency. Exits 1 when the median
is over upstream's median + 10 ms, or the 99th percentile over upstream's median + 30 ms.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from app.ids import OrderKey
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.lab import KEYS
from tests.service import HOOK, Service, service

MEDIAN: Final = 10.0
P99: Final = 30.0
_FIRST_JOBS: Final = 30
"""Three for each worker, whose first jobs load scripts and open connections."""
_IDLE: Final = 0.05


def main() -> int:
    """Send the events and print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.latency", description=__doc__)
    parser.add_argument("--events", type=int, default=300, help="(default 300)")
    parser.add_argument("--latency-ms", type=int, default=50, help="duration of a getOrder (default 50)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as one:
        one.start_valkey()
        one.start_sandbox("--latency", str(options.latency_ms))
        one.start("web")
        one.start("worker")
        ours, upstreams = _measure(one, options.events)
    upstream = _percentile(upstreams, 50)
    sys.stdout.write("| ms | median | p99 |\n|---|---|---|\n")
    for name, found in {"getOrder alone": upstreams, f"from the POST to the stored order ({len(ours)})": ours}.items():
        sys.stdout.write(f"| {name} | {_percentile(found, 50):.1f} | {_percentile(found, 99):.1f} |\n")
    more = [_percentile(ours, percent) - upstream for percent in (50, 99)]
    sys.stdout.write(f"| beyond upstream's median | {more[0]:.1f} | {more[1]:.1f} |\n")
    is_late = more[0] > MEDIAN or more[1] > P99
    if is_late:
        sys.stderr.write(f"invalid: over {MEDIAN:g} ms at the median, or over {P99:g} ms at p99\n")
    return int(is_late)


def alone(one: Service, order_ids: Iterable[str]) -> Iterator[float]:
    """Yield how many ms a getOrder of each order takes without this service, on one connection."""
    connection = HTTPConnection(urlsplit(one.sandbox.url).netloc)
    for order_id in order_ids:
        started = time.perf_counter()
        _ask(connection, "GET", urlsplit(one.api(f"channelManager/{order_id}")).path, "", one.key)
        yield (time.perf_counter() - started) * 1000


def _measure(one: Service, events: int) -> tuple[list[float], list[float]]:
    """Return the ms from each POST to the stored order, and those of each getOrder without this service."""
    ids = one.issue(_FIRST_JOBS + events)
    web = HTTPConnection(urlsplit(one.web_url).netloc)
    ours, upstreams = [], []
    with Redis.from_url(one.valkey.url) as redis:
        for order_id, upstream_ms in zip(ids, alone(one, ids), strict=True):
            upstreams.append(upstream_ms)
            time.sleep(_IDLE)
            body = json.dumps({"values": [one.event(order_id)]})
            started_at = time.time() * 1000
            _ask(web, "POST", HOOK, body, {"content-type": "application/json"})
            # The ledger's clock is that of this machine, and cuts to whole ms: half a ms on average.
            ours.append(_stored_at(redis, OrderKey(one.company_id, order_id)) + 0.5 - started_at)
            time.sleep(_IDLE)
    return ours[_FIRST_JOBS:], upstreams[_FIRST_JOBS:]


def _ask(connection: HTTPConnection, method: str, path: str, body: str, headers: dict[str, str]) -> None:
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status == 200, content


def _stored_at(redis: Redis, order: OrderKey) -> int:
    """Return when the order was stored, in ms since 1970, once it is."""
    client: Any = redis
    return int(eventually(lambda: client.hget(KEYS.record(order), "fetched_at"), what=f"{order.order_id} is stored"))


def _percentile(found: list[float], percent: int) -> float:
    return sorted(found)[len(found) * percent // 100]


if __name__ == "__main__":
    sys.exit(main())
