"""How fast workers fetch a backlog, compared with what the Channel Manager's five slots allow.

    uv run python -m tests.benchmarks.drain [--orders 500] [--latency-ms 50] [--json]

Exits 1 when an order is fetched twice or not at all, or when the Channel Manager answers 429.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass

import httpx
from rich.console import Console

from app.dev import valkey
from app.dev.processes import ProcessEnded
from app.ledger import keys
from tests.benchmarks.system import SLOTS, system

_EVENTS_PER_POST = 20
_PATIENCE = 120.0


@dataclass(frozen=True)
class Drain:
    """The result; seconds count from the start of the worker, the rate from the first fetched order."""

    orders: int
    first_after_seconds: float
    last_after_seconds: float
    orders_per_second: float
    of_what_the_slots_allow: float
    get_order_calls: int
    most_at_once: int
    throttled: int
    still_pending: int

    @property
    def faults(self) -> list[str]:
        """Return what makes the result invalid."""
        wrong = {
            f"{self.get_order_calls} getOrder calls for {self.orders} orders": self.get_order_calls != self.orders,
            f"{self.throttled} calls were answered 429": self.throttled > 0,
            f"{self.most_at_once} calls at once where {SLOTS} are allowed": self.most_at_once > SLOTS,
            f"{self.still_pending} orders are still pending or dead": self.still_pending > 0,
        }
        return [text for text, holds in wrong.items() if holds]


def measure(orders: int, latency_ms: int) -> Drain:
    """Fill the queue, start the worker, and watch the Channel Manager; raises TimeoutError after two minutes."""
    with system(latency_ms) as running:
        running.post(running.issue(orders), _EVENTS_PER_POST)
        started = time.monotonic()
        with running.start("worker") as worker:
            worker.wait_until(lambda: running.fetched() > 0, _PATIENCE, "the first order is fetched")
            first, at_first = time.monotonic(), running.fetched()
            worker.wait_until(lambda: running.fetched() >= orders, _PATIENCE, "all orders are fetched")
            last = time.monotonic()
            worker.wait_until(lambda: running.redis.zcard(keys.DUE) == 0, _PATIENCE, "no fetch is pending")
            stats = running.stats()
            still_pending = int(running.redis.zcard(keys.DUE)) + int(running.redis.zcard(keys.DEAD))
    rate = (orders - at_first) / (last - first)
    return Drain(
        orders=orders,
        first_after_seconds=round(first - started, 2),
        last_after_seconds=round(last - started, 2),
        orders_per_second=round(rate, 1),
        of_what_the_slots_allow=round(rate / (SLOTS * 1000 / latency_ms), 3),
        get_order_calls=sum(stats["operations"]["getOrder"].values()),
        most_at_once=stats["most_active"],
        throttled=sum(stats["throttled"].values()),
        still_pending=still_pending,
    )


def main() -> int:
    """Measure once; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.drain", description=__doc__)
    parser.add_argument("--orders", type=int, default=500)
    parser.add_argument("--latency-ms", type=int, default=50, help="duration of a getOrder (default 50)")
    parser.add_argument("--json", action="store_true", help="one object instead of a sentence")
    options = parser.parse_args()
    errors = Console(stderr=True)
    try:
        drain = measure(options.orders, options.latency_ms)
    except (valkey.ValkeyUnavailable, ProcessEnded, TimeoutError, httpx.HTTPError) as error:
        errors.print(f"no result: {error}", markup=False)
        return 1
    if options.json:
        sys.stdout.write(json.dumps(asdict(drain)) + "\n")
    else:
        Console().print(
            f"{drain.orders} orders, first fetched {drain.first_after_seconds} s after the worker's start, last "
            f"{drain.last_after_seconds} s: {drain.orders_per_second} orders/s, "
            f"{drain.of_what_the_slots_allow} of what {SLOTS} slots allow"
        )
    for fault in drain.faults:
        errors.print(f"invalid: {fault}", markup=False)
    return 1 if drain.faults else 0


if __name__ == "__main__":
    sys.exit(main())
