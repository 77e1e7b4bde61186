"""How a replay slows live traffic: live orders at a steady rate, alone, while 5,000 orders are replayed, and alone.

    uv run python -m tests.benchmarks.replay [--orders 5000] [--seconds 20] [--live-rate 15] [--json]

All phases are of one run, so that other work on the machine affects each of them. The sandbox needs 50 ms for a
getOrder and processes 5 at once. The time is from the event's acceptance to the stored order, read from the order's
history. Exits 1 when the live p99 during the replay is over 1.5 times (+20 ms) the p99 alone, when a live order is not
fetched, or when not all orders are queued.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import httpx
from rich.console import Console
from rich.table import Table

from app.dev import valkey
from app.dev.processes import ProcessEnded
from app.ids import OrderKey
from app.ledger.history import EventReceived, FetchStored
from app.ledger.ledger import Ledger
from app.ledger.orders import Archive
from app.ledger.rq_jobs import BACKFILL, LIVE, queue_key
from app.ledger.work import Content
from app.replay import Plans
from app.times import to_ms
from tests.benchmarks.system import System, system

_LATENCY_MS = 50
_PATIENCE = 60.0
_EVENTS_PER_POST = 100


@dataclass(frozen=True)
class Phase:
    """Live orders of one phase; times in ms from accepted to stored. `replayed` orders were fetched meanwhile."""

    name: str
    orders: int
    fetched: int
    replayed: int
    p50: float
    p90: float
    p99: float
    longest: float


def measure(orders: int, seconds: int, rate: float) -> tuple[list[Phase], int, int]:
    """Return both phases, the number of orders that the replay queued, and the number of 429 answers."""
    with system(_LATENCY_MS) as running:
        _store(running, running.issue(orders))
        until = datetime.now(UTC).isoformat()
        half, whole = round(seconds * rate / 2), round(seconds * rate)
        warm, before, beside, after = (running.issue(count) for count in (20, half, whole, half))
        with running.start("worker") as worker:
            worker.wait_for_line("pool.worker_started", _PATIENCE)
            _live(running, warm, rate)
            alone = _live(running, before, rate)
            calls = running.fetched()
            command = ("events", "replay", "--until", until, "--force", "--rate", "2000", "--yes")
            with running.start(*command) as replay:
                queue = queue_key(BACKFILL)
                replay.wait_until(lambda: running.redis.llen(queue) > 0, _PATIENCE, "orders are queued")
                during = _live(running, beside, rate)
                replayed = running.fetched() - calls - len(beside)
                replay.wait(_PATIENCE)
            # The dispatcher pushes the rest of the replay again, but not within two minutes.
            running.redis.delete(queue)
            alone += _live(running, after, rate)
        (plan,) = Plans(running.redis, event_days=90).newest_first()
        throttled = sum(running.stats()["throttled"].values())
    phases = [
        _phase("alone", len(before) + len(after), 0, alone),
        _phase("during the replay", len(beside), replayed, during),
    ]
    return phases, plan.queued + plan.waiting, throttled


def _store(running: System, order_ids: Sequence[str]) -> None:
    """Send the events and store the orders as workers do, without the minute that workers need."""
    running.post(order_ids, _EVENTS_PER_POST)
    ledger = Ledger(running.redis, order_days=400, fetch_lease=60_000)
    content = Content(
        raw=b"{}",
        digest="-",
        status="Issued",
        wallets=0,
        tickets=0,
        coupons=0,
        manifest=False,
        http_status=200,
        duration_ms=_LATENCY_MS,
    )
    for order_id in order_ids:
        order = OrderKey(running.company_id, order_id)
        what, fetch = ledger.start_fetch(order, "benchmark")
        if fetch is None:
            raise RuntimeError(f"an order needs no fetch but {what}")
        ledger.store_fetch(order, "benchmark", fetch, content)
    running.redis.delete(queue_key(LIVE))


def _live(running: System, order_ids: Sequence[str], rate: float) -> list[int]:
    """Send one event at a time at the rate, wait until all are fetched, and return the ms that each needed."""
    started = time.monotonic()
    for number, order_id in enumerate(order_ids):
        time.sleep(max(0.0, started + number / rate - time.monotonic()))
        running.post([order_id])
    archive, orders = Archive(running.redis), [OrderKey(running.company_id, one) for one in order_ids]
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and not all(one and not one.is_pending for one in archive.records(orders)):
        time.sleep(0.1)
    return [ms for ms in (_duration(archive, order) for order in orders) if ms is not None]


def _duration(archive: Archive, order: OrderKey) -> int | None:
    history = archive.history(order)
    received = next((to_ms(entry.at) for entry in history if isinstance(entry, EventReceived)), None)
    stored = next((to_ms(entry.at) for entry in history if isinstance(entry, FetchStored)), None)
    return None if received is None or stored is None else stored - received


def _phase(name: str, orders: int, replayed: int, times: list[int]) -> Phase:
    fetched, times = len(times), sorted(times) or [0]
    shares = (float(times[min(len(times) - 1, int(len(times) * part))]) for part in (0.5, 0.9, 0.99, 1))
    return Phase(name, orders, fetched, replayed, *shares)


def main() -> int:
    """Measure once; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.replay", description=__doc__)
    parser.add_argument("--orders", type=int, default=5000, help="replayed (default 5000)")
    parser.add_argument("--seconds", type=int, default=20, help="alone in all, and during the replay (default 20)")
    parser.add_argument("--live-rate", type=float, default=15, help="live orders per second (default 15)")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    options = parser.parse_args()
    errors = Console(stderr=True)
    try:
        phases, queued, throttled = measure(options.orders, options.seconds, options.live_rate)
    except (valkey.ValkeyUnavailable, ProcessEnded, TimeoutError, httpx.HTTPError) as error:
        errors.print(f"no result: {error}", markup=False)
        return 1
    alone, beside = phases
    ratio = round(beside.p99 / alone.p99, 2) if alone.p99 else 0.0
    if options.json:
        counts = {"queued": queued, "throttled": throttled, "p99_ratio": ratio}
        sys.stdout.write(json.dumps({"phases": [asdict(one) for one in phases]} | counts) + "\n")
    else:
        table = Table("live orders", "sent", "fetched", "replayed", "p50 ms", "p90 ms", "p99 ms", "longest ms")
        for one in phases:
            table.add_row(*(f"{value:,}" if not isinstance(value, str) else value for value in asdict(one).values()))
        Console(width=120).print(table)
        Console().print(f"{queued:,} of {options.orders:,} queued; live p99 during the replay: {ratio} of that alone")
    faults = {
        f"live p99 {beside.p99:g} ms during the replay, {alone.p99:g} ms alone": beside.p99 > alone.p99 * 1.5 + 20,
        "a live order was not fetched": any(one.fetched < one.orders for one in phases),
        f"{queued} of {options.orders} orders were queued": queued != options.orders,
        f"{throttled} calls were answered 429": throttled > 0,
        "nothing was replayed beside live traffic": beside.replayed <= 0,
    }
    for fault, holds in faults.items():
        if holds:
            errors.print(f"invalid: {fault}", markup=False)
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
