"""How fast workers fetch a backlog, compared with what the Channel Manager's five slots allow, and their memory.

    uv run python -m tests.benchmarks.drain [--orders 500] [--latency-ms 50]

Exits 1 when an order is fetched twice or not at all, or when the Channel Manager answers 429.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from app.ledger.redis import Redis
from tests.lab import KEYS
from tests.service import Service, service

_SLOTS = 5
_EVENTS_PER_POST = 20
_PATIENCE = 120.0


def main() -> int:
    """Fill the queue, start the worker, and watch the Channel Manager; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.drain", description=__doc__)
    parser.add_argument("--orders", type=int, default=500)
    parser.add_argument("--latency-ms", type=int, default=50, help="duration of a getOrder (default 50)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as one:
        one.start_valkey()
        one.start_sandbox("--latency", str(options.latency_ms), "--slots", str(_SLOTS))
        one.start("web")
        order_ids = one.issue(options.orders)
        for start in range(0, options.orders, _EVENTS_PER_POST):
            status, body = one.post(*(one.event(order_id) for order_id in order_ids[start : start + _EVENTS_PER_POST]))
            assert status == 200, body
        return _drain(one, options.orders, options.latency_ms)


def _pss(root: int) -> float:
    """Return the PSS of a process and all its descendants in MB; a page that several share counts once. Linux only."""
    family = [root]
    for pid in family:
        family += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    lines = (line for pid in family for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def _drain(one: Service, orders: int, latency_ms: int) -> int:
    """Print the rate, which counts from the first fetched order, and what makes the result invalid."""

    def fetched() -> int:
        return int(one.admin("GET", "stats")["operations"].get("getOrder", {}).get("200", 0))

    with Redis.from_url(one.valkey.url) as redis:
        started = time.monotonic()
        worker = one.launch("worker")
        worker.wait_until(lambda: fetched() > 0, _PATIENCE, "the first order is fetched")
        first, at_first = time.monotonic(), fetched()
        worker.wait_until(lambda: fetched() >= orders, _PATIENCE, "all orders are fetched")
        last = time.monotonic()
        worker.wait_until(lambda: redis.zcard(KEYS.due) == 0, _PATIENCE, "no fetch is pending")
        dead: int = redis.zcard(KEYS.dead)
        memory = _pss(worker.pid)
    stats = one.admin("GET", "stats")
    calls, throttled = sum(stats["operations"]["getOrder"].values()), sum(stats["throttled"].values())
    rate = (orders - at_first) / (last - first)
    sys.stdout.write(
        f"{orders} orders, first fetched {first - started:.1f} s after the worker's start, last {last - started:.1f} s:"
        f" {rate:.0f} orders/s, {rate / (_SLOTS * 1000 / latency_ms):.2f} of what {_SLOTS} slots allow;"
        f" pool and workers: {memory:.1f} MB PSS\n"
    )
    faults = {
        f"{calls} getOrder calls for {orders} orders": calls != orders,
        f"{throttled} calls were answered 429": throttled > 0,
        f"{stats['most_active']} calls at once where {_SLOTS} are allowed": stats["most_active"] > _SLOTS,
        f"{dead} orders are dead": dead > 0,
    }
    sys.stderr.writelines(f"invalid: {fault}\n" for fault, holds in faults.items() if holds)
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
