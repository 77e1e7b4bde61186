"""How fast workers fetch a backlog, compared with what upstream's slots allow, and the CPU time of each order.

    uv run python -m tests.benchmarks.drain [--seconds 8] [--rounds 1]

Each row is one kind of upstream (duration of a getOrder, calls at once) with one or two pools, as long as `--seconds`
at the full rate: slots / duration, as upstream is set, and as a getOrder without this service takes in the same run.
Exits 1 when a row is below 0.95 of the latter, when an order is fetched twice or not at all, or when upstream answers
429.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from app.dev.processes import Process
from app.ledger.redis import Redis
from tests.benchmarks.latency import alone
from tests.benchmarks.load import cpu_seconds
from tests.lab import KEYS
from tests.service import Service, service

LEAST: Final = 0.95
_EVENTS_PER_POST: Final = 100
_WORKERS_PER_SLOT: Final = 1.6
"""As by default, 8 for 5: while five wait for upstream, the others store what came and start the next."""
_FIRST_JOBS: Final = 4
_CALLS: Final = 20
"""Of getOrder without this service."""
_PATIENCE: Final = 120.0
_CORES: Final = len(os.sched_getaffinity(0))


class Row(msgspec.Struct):
    """One run: fetched orders a second, and as a part of the full rate; CPU time in ms an order; memory (PSS) in MB."""

    rate: float
    ratio: float
    throttled: int
    worker_ms: float
    valkey_ms: float
    upstream_ms: float
    memory: float


def main() -> int:
    """Run each row and print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.drain", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="of each row at the full rate (default 8)")
    parser.add_argument("--rounds", type=int, default=1, help="of each row; the median counts (default 1)")
    for name, kinds in {"latency": [50, 250], "slots": [5, 20], "pools": [1, 2]}.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=kinds, help=f"(default {kinds})")
    options = parser.parse_args()
    faults: list[str] = []
    sys.stdout.write(
        "| getOrder | slots | pools | orders/s | as set | as measured | 429"
        " | CPU ms: pools | Valkey | upstream | cores allow | MB |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for latency, slots, pools in product(options.latency, options.slots, options.pools):
        full = slots * 1000 / latency
        runs = [_run(latency, slots, pools, round(full * options.seconds), faults) for _ in range(options.rounds)]
        row = Row(*(median(values) for values in zip(*map(msgspec.structs.astuple, runs), strict=True)))
        allowed = _CORES * 1000 / (row.worker_ms + row.valkey_ms + row.upstream_ms)
        cells = (
            *(f"{latency} ms", slots, pools, f"{row.rate:.0f}", f"{row.rate / full:.3f}", f"{row.ratio:.3f}"),
            *(f"{row.throttled:.0f}", f"{row.worker_ms:.2f}", f"{row.valkey_ms:.2f}", f"{row.upstream_ms:.2f}"),
            *(f"{allowed:.0f}/s", f"{row.memory:.0f}"),
        )
        sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
        sys.stdout.flush()
        if row.ratio < LEAST:
            why = f", as {_CORES} cores allow {allowed:.0f} orders/s" if allowed < full else ""
            faults.append(f"{latency} ms, {slots} slots, {pools} pools: {row.ratio:.3f} of the full rate{why}")
    sys.stderr.writelines(f"invalid: {fault}\n" for fault in faults)
    return int(bool(faults))


def _run(latency: int, slots: int, pools: int, orders: int, faults: list[str]) -> Row:
    """Let idle pools fetch a backlog that comes at once."""
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as one:
        one.start_valkey()
        one.start_sandbox("--latency", str(latency), "--slots", str(slots), "--requests", "1000000")
        workers = round(slots * _WORKERS_PER_SLOT / pools)
        one.variables |= {
            "UPSTREAM_CONCURRENCY": str(slots),
            "UPSTREAM_REQUESTS_PER_5_MIN": "1000000",
            "WORKERS": str(workers),
        }
        one.start("web")
        order_ids = one.issue(orders)
        running = [one.start("worker") for _ in range(pools)]
        with Redis.from_url(one.valkey.url) as redis:
            # The first jobs of a process load scripts and open connections.
            first = one.issue(_FIRST_JOBS * workers * pools)
            getting = median(alone(one, first[:_CALLS]))
            _drain(one, redis, running, first, getting, faults)
            return _drain(one, redis, running, order_ids, getting, faults)


def _drain(
    one: Service, redis: Redis, pools: list[Process], order_ids: list[str], getting: float, faults: list[str]
) -> Row:
    """Return what one backlog showed; `getting` is how many ms a getOrder takes without this service."""
    client: Any = redis
    slots = int(one.admin("GET", "settings")["slots"])
    families = [[pool.pid for pool in pools], [one.valkey.pid], [one.sandbox.process.pid]]
    before, called = [_cpu_ms(pids) for pids in families], _calls(one)
    for start in range(0, len(order_ids), _EVENTS_PER_POST):
        status, body = one.post(*(one.event(order_id) for order_id in order_ids[start : start + _EVENTS_PER_POST]))
        assert status == 200, body
    pools[0].wait_until(lambda: redis.zcard(KEYS.due) == 0, _PATIENCE, "no fetch is pending")
    worker_ms, valkey_ms, upstream_ms = (
        (_cpu_ms(pids) - was) / len(order_ids) for pids, was in zip(families, before, strict=True)
    )
    # The ledger's clock: when each order was stored. The first answers came together.
    times = [at for _, at in client.zrange(KEYS.orders, -len(order_ids), -1, withscores=True)]
    rate = (len(times) - slots) / (times[-1] - times[slots - 1]) * 1000
    stats, calls = one.admin("GET", "stats"), _calls(one) - called
    throttled = sum(stats["throttled"].values())
    found = {
        f"{calls} getOrder calls for {len(order_ids)} orders": calls != len(order_ids),
        f"{throttled} calls were answered 429": throttled > 0,
        f"{stats['most_active']} calls at once where {slots} are allowed": stats["most_active"] > slots,
        f"{redis.zcard(KEYS.dead)} orders are dead": redis.zcard(KEYS.dead) != 0,
    }
    faults += [fault for fault, holds in found.items() if holds]
    memory = _pss_mb([pool.pid for pool in pools])
    return Row(rate, rate * getting / slots / 1000, throttled, worker_ms, valkey_ms, upstream_ms, memory)


def _calls(one: Service) -> int:
    return sum(one.admin("GET", "stats")["operations"].get("getOrder", {}).values())


def _with_children(pids: list[int]) -> list[int]:
    family = list(pids)
    for pid in family:
        family += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return family


def _cpu_ms(pids: list[int]) -> float:
    """Return the CPU time of these processes and all their descendants that run. Linux only."""
    return sum(cpu_seconds(pid) for pid in _with_children(pids)) * 1000


def _pss_mb(pids: list[int]) -> float:
    """Return the PSS of these processes and all their descendants; a shared page counts once. Linux only."""
    lines = (
        line for pid in _with_children(pids) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    )
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
