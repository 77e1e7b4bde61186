"""How long an event waits for its fetch while a sink hangs, compared with the same while the sink works.

    uv run python -m tests.benchmarks.bulkhead [--rounds 3] [--orders 300] [--rate 30]

Rounds with and without the hanging sink alternate. Exits 1 when an order is not fetched, when the sink did not hang, or
when the 99th percentile with the hanging sink is over 1.5 times that without.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from app.ids import OrderKey
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.lab import KEYS
from tests.service import Service, service

MOST: Final = 1.5
_SINK_NAME: Final = "python:hanging:on_order"
_SINK: Final = """
import os, time

def on_order(order, context):
    while os.path.exists("hang"):
        time.sleep(0.02)
"""
_PATIENCE: Final = 60.0


def main() -> int:
    """Run the rounds and print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bulkhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each kind (default 3)")
    parser.add_argument("--orders", type=int, default=300, help="in each round (default 300)")
    parser.add_argument("--rate", type=float, default=30, help="events a second (default 30)")
    options = parser.parse_args()
    waits: dict[bool, list[int]] = {False: [], True: []}
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name, service(Path(name)) as one, Redis.from_url(_start(one)) as redis:
        for number in range(2 * options.rounds):
            hangs = number % 2 == 1
            waits[hangs] += _round(one, redis, options.orders, options.rate, faults, hangs=hangs)
    p99 = {hangs: _percentile(found, 99) for hangs, found in waits.items()}
    for hangs, found in waits.items():
        kind = "the sink hangs" if hangs else "the sink works"
        sys.stdout.write(f"{kind}: {len(found)} events, p50 {_percentile(found, 50)} ms, p99 {p99[hangs]} ms\n")
    ratio = p99[True] / p99[False]
    sys.stdout.write(f"p99 with the hanging sink: {ratio:.2f} times that without\n")
    if ratio > MOST:
        faults.append(f"over {MOST} times")
    sys.stderr.writelines(f"invalid: {fault}\n" for fault in faults)
    return int(bool(faults))


def _start(one: Service) -> str:
    """Start all parts; return the address of Redis."""
    one.start_valkey()
    one.start_sandbox("--latency", "50", "--slots", "5")
    (one.folder / "hanging.py").write_text(_SINK)
    one.variables["SINKS"] = _SINK_NAME
    one.start("web")
    one.start("worker")
    return one.valkey.url


def _round(one: Service, redis: Redis, orders: int, rate: float, faults: list[str], *, hangs: bool) -> list[int]:
    """Send one event after the other; return the ms from each to its stored content."""
    hang, clock = one.folder / "hang", KEYS.deliveries(_SINK_NAME)
    eventually(lambda: redis.zcard(clock) == 0, _PATIENCE, what="the sink has all orders of the round before")
    if hangs:
        hang.touch()
    ids = one.issue(orders)
    started = time.monotonic()
    for number, order_id in enumerate(ids):
        time.sleep(max(0.0, started + number / rate - time.monotonic()))
        status, body = one.post(one.event(order_id))
        assert status == 200, body
    eventually(lambda: redis.zcard(KEYS.due) == 0, _PATIENCE, what="all orders are fetched")
    if hangs and redis.zcard(clock) != orders:
        faults.append("the sink did not hang")
    hang.unlink(missing_ok=True)
    return [_waited(redis, OrderKey(one.company_id, order_id), faults) for order_id in ids]


def _waited(redis: Redis, order: OrderKey, faults: list[str]) -> int:
    fields: Any = redis.hmget(KEYS.record(order), "last_event_at", "fetched_at")
    event_at, fetched_at = fields
    if event_at is None or fetched_at is None:
        faults.append(f"{order.order_id} was not fetched")
        return 0
    return int(fetched_at) - int(event_at)


def _percentile(found: list[int], percent: int) -> int:
    return sorted(found)[len(found) * percent // 100]


if __name__ == "__main__":
    sys.exit(main())
