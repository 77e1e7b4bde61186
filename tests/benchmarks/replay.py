"""What a replay does to live traffic: live orders at a steady rate, alone, while 5,000 orders are replayed, and alone.

    uv run python -m tests.benchmarks.replay [--orders 5000] [--seconds 20] [--live-rate 15] [--json]

All phases are of one run, so that a machine that does other work does it to each of them, against a sandbox that takes
50 ms for a getOrder and works on 5 at once. What is timed is the way from the event's acceptance to the stored order,
by the order's trail. Exits 1 when the live p99 during the replay is over 1.5 times (+20 ms) the one alone, when a
live order did not come home, or when not all were queued.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from redis import Redis
from rich.console import Console
from rich.table import Table

from app.dev import valkey
from app.dev.processes import Process, ProcessEnded, free_port
from app.dev.sandbox import process as sandbox
from app.dev.sandbox.process import Sandbox
from app.ids import OrderKey
from app.ledger.history import EventReceived, FetchStored
from app.ledger.ledger import Ledger
from app.ledger.orders import Archive
from app.ledger.rq_jobs import BACKFILL, LIVE, queue_key
from app.ledger.work import Content
from app.replay import Plans
from app.times import to_ms
from tests.benchmarks import contenders, delivery
from tests.benchmarks.contenders import CLIENT_STATE, COMPANY, ENVIRONMENT, OURS, RECEIVER, TENANT, WEBHOOK_PATH

SLOTS = 5
LATENCY_MS = 50
_PATIENCE = 60.0
_EVENTS_PER_POST = 100


@dataclass(frozen=True)
class Phase:
    """Live orders told of, alone or not; times in ms from accepted to stored. `replayed` came home beside them."""

    name: str
    orders: int
    home: int
    replayed: int
    p50: float
    p90: float
    p99: float
    longest: float


@dataclass(frozen=True)
class System:
    """Everything runs."""

    channel_manager: Sandbox
    company_id: str
    environment: dict[str, str]
    redis: Redis
    folder: Path
    url: str

    def make(self, count: int) -> list[OrderKey]:
        """Return orders that are issued at the Channel Manager, and of which no event was sent."""
        wish: dict[str, Any] = {
            "tenant": TENANT,
            "environment": ENVIRONMENT,
            "company": COMPANY,
            "count": count,
            "events": 0,
        }
        made = self.channel_manager.admin("POST", "orders", wish)["orders"]
        return [OrderKey(self.company_id, row["order_id"]) for row in made]

    def post(self, sender: httpx.Client, orders: Sequence[OrderKey]) -> None:
        ids = [order.order_id for order in orders]
        sender.post(
            self.url, content=delivery.body(ids, client_state=CLIENT_STATE, company_id=self.company_id)
        ).raise_for_status()


@contextmanager
def _system() -> Iterator[System]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(valkey.start(folder / "valkey"))
        channel_manager = stack.enter_context(
            sandbox.start(seed=1, options=("--latency", str(LATENCY_MS), "--slots", str(SLOTS)))
        )
        redis = stack.enter_context(Redis.from_url(server.url))
        port = free_port()
        company_id = channel_manager.company_id(TENANT, ENVIRONMENT, COMPANY)
        environment = contenders.settings(server.url, port, NP_BASE_URL=channel_manager.url, NP_COMPANY_ID=company_id)
        stack.enter_context(contenders.serve(RECEIVER, port, environment, folder))
        yield System(channel_manager, company_id, environment, redis, folder, f"http://127.0.0.1:{port}{WEBHOOK_PATH}")


def _bring_home(system: System, orders: Sequence[OrderKey]) -> None:
    """Tell of the orders and end their fetches as workers do, without the minute that workers would need."""
    with httpx.Client(trust_env=False, timeout=30) as sender:
        for start in range(0, len(orders), _EVENTS_PER_POST):
            system.post(sender, orders[start : start + _EVENTS_PER_POST])
    ledger = Ledger(system.redis, order_days=400, fetch_lease=60_000)
    content = Content(
        raw=b"{}",
        digest="-",
        status="Issued",
        wallets=0,
        tickets=0,
        coupons=0,
        manifest=False,
        http_status=200,
        duration_ms=LATENCY_MS,
    )
    for order in orders:
        what, fetch = ledger.start_fetch(order, "benchmark")
        if fetch is None:
            raise RuntimeError(f"an order needs no fetch but {what}")
        ledger.store_fetch(order, "benchmark", fetch, content)
    system.redis.delete(queue_key(LIVE))


def _live(system: System, orders: Sequence[OrderKey], rate: float) -> list[int]:
    """Tell of the orders one by one at the rate, wait until all are home, and return how many ms each needed."""
    began = time.monotonic()
    with httpx.Client(trust_env=False) as sender:
        for number, order in enumerate(orders):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            system.post(sender, [order])
    archive = Archive(system.redis)
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and not all(one and not one.is_pending for one in archive.records(orders)):
        time.sleep(0.1)
    return [ms for ms in (_way(archive, order) for order in orders) if ms is not None]


def _phase(name: str, orders: int, replayed: int, times: list[int]) -> Phase:
    home, times = len(times), sorted(times) or [0]

    def share(part: float) -> float:
        return float(times[min(len(times) - 1, int(len(times) * part))])

    return Phase(name, orders, home, replayed, share(0.5), share(0.9), share(0.99), share(1))


def _way(archive: Archive, order: OrderKey) -> int | None:
    trail = archive.history(order)
    heard = next((to_ms(entry.at) for entry in trail if isinstance(entry, EventReceived)), None)
    stored = next((to_ms(entry.at) for entry in trail if isinstance(entry, FetchStored)), None)
    return None if heard is None or stored is None else stored - heard


def _fetched(system: System) -> int:
    calls = system.channel_manager.admin("GET", "stats")["operations"].get("getOrder", {})
    return int(calls.get("200", 0))


def measure(orders: int, seconds: int, rate: float) -> tuple[list[Phase], int, int]:
    """Return both phases, and how many orders the replay queued and how many calls were answered 429."""
    with _system() as system:
        _bring_home(system, system.make(orders))
        told = datetime.now(UTC).isoformat()
        half, whole = round(seconds * rate / 2), round(seconds * rate)
        warm, before, beside, after = (system.make(count) for count in (20, half, whole, half))
        command = [*OURS, "worker"]
        worker = Process.start(command, env=system.environment, cwd=system.folder, log=system.folder / "worker.log")
        with worker:
            worker.wait_for_line("pool.worker_started", _PATIENCE)
            _live(system, warm, rate)
            alone = _live(system, before, rate)
            calls = _fetched(system)
            feeder = Process.start(
                [*OURS, "events", "replay", "--until", told, "--force", "--rate", "2000", "--yes"],
                env=system.environment,
                cwd=system.folder,
                log=system.folder / "feeder.log",
            )
            with feeder:
                feeder.wait_until(lambda: system.redis.llen(queue_key(BACKFILL)) > 0, _PATIENCE, "orders are queued")
                during = _live(system, beside, rate)
                replayed = _fetched(system) - calls - len(beside)
                feeder.wait(_PATIENCE)
            # What is left of the replay would come back by the clock, but not within two minutes.
            system.redis.delete(queue_key(BACKFILL))
            alone += _live(system, after, rate)
        (plan,) = Plans(system.redis, event_days=90).newest_first()
        throttled = sum(system.channel_manager.admin("GET", "stats")["throttled"].values())
    phases = [
        _phase("alone", len(before) + len(after), 0, alone),
        _phase("during the replay", len(beside), replayed, during),
    ]
    return phases, plan.queued + plan.waiting, throttled


def main() -> int:
    """Measure once; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.replay", description=__doc__)
    parser.add_argument("--orders", type=int, default=5000, help="replayed (default 5000)")
    parser.add_argument("--seconds", type=int, default=20, help="alone in all, and beside the replay (default 20)")
    parser.add_argument("--live-rate", type=float, default=15, help="live orders a second (default 15)")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    options = parser.parse_args()
    trouble = Console(stderr=True)
    try:
        phases, queued, throttled = measure(options.orders, options.seconds, options.live_rate)
    except (valkey.ValkeyUnavailable, ProcessEnded, TimeoutError, httpx.HTTPError) as error:
        trouble.print(f"no result: {error}", markup=False)
        return 1
    alone, beside = phases
    ratio = round(beside.p99 / alone.p99, 2) if alone.p99 else 0.0
    if options.json:
        result = {
            "phases": [asdict(one) for one in phases],
            "queued": queued,
            "throttled": throttled,
            "p99_ratio": ratio,
        }
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        table = Table("live orders", "told of", "home", "replayed beside", "p50 ms", "p90 ms", "p99 ms", "longest ms")
        for one in phases:
            table.add_row(*(f"{value:,}" if not isinstance(value, str) else value for value in asdict(one).values()))
        Console(width=120).print(table)
        Console().print(f"{queued:,} of {options.orders:,} queued; live p99 during the replay: {ratio} of that alone")
    faults = {
        f"live p99 {beside.p99:g} ms during the replay, {alone.p99:g} ms alone": beside.p99 > alone.p99 * 1.5 + 20,
        "a live order did not come home": any(one.home < one.orders for one in phases),
        f"{queued} of {options.orders} orders were queued": queued != options.orders,
        f"{throttled} calls were answered 429": throttled > 0,
        "nothing was replayed beside live traffic": beside.replayed <= 0,
    }
    for fault, holds in faults.items():
        if holds:
            trouble.print(f"invalid: {fault}", markup=False)
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
