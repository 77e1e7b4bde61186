"""How fast a backlog is worked off, beside what the Channel Manager's five slots allow.

    uv run python -m tests.benchmarks.drain [--orders 500] [--latency-ms 50] [--json]

Exits 1 when an order was fetched twice or not at all, or when the Channel Manager had to say 429.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from redis import Redis
from rich.console import Console

from app.dev import valkey
from app.dev.processes import Process, ProcessEnded, free_port
from app.dev.sandbox import process as sandbox
from app.dev.sandbox.process import Sandbox
from app.ledger import keys
from tests.benchmarks import contenders, delivery
from tests.benchmarks.contenders import CLIENT_STATE, COMPANY, ENVIRONMENT, OURS, RECEIVER, TENANT, WEBHOOK_PATH

SLOTS = 5
_EVENTS_PER_POST = 20
# Longer than any backlog here should take, so that only a stuck one meets it.
_PATIENCE = 120.0


@dataclass(frozen=True)
class Drain:
    """One backlog worked off; seconds count from the start of the worker, the rate from the first order home."""

    orders: int
    first_after_seconds: float
    last_after_seconds: float
    orders_per_second: float
    of_what_the_slots_allow: float
    get_order_calls: int
    most_at_once: int
    throttled: int
    still_owed: int

    @property
    def faults(self) -> list[str]:
        """Name everything that went wrong."""
        wrong = {
            f"{self.get_order_calls} getOrder calls for {self.orders} orders": self.get_order_calls != self.orders,
            f"{self.throttled} calls were answered 429": self.throttled > 0,
            f"{self.most_at_once} calls at once where {SLOTS} are allowed": self.most_at_once > SLOTS,
            f"{self.still_owed} orders are owed a fetch still": self.still_owed > 0,
        }
        return [text for text, holds in wrong.items() if holds]


def measure(orders: int, latency_ms: int) -> Drain:
    """Fill the queue, start the worker, and watch the Channel Manager; raises TimeoutError after two minutes."""
    with filled_receiver(orders, latency_ms) as (channel_manager, environment, redis, folder):
        began = time.monotonic()
        worker = Process.start([*OURS, "worker"], env=environment, cwd=folder, log=folder / "worker.log")
        with worker:
            worker.wait_until(lambda: fetched(channel_manager) > 0, _PATIENCE, "the first order home")
            first, at_first = time.monotonic(), fetched(channel_manager)
            worker.wait_until(lambda: fetched(channel_manager) >= orders, _PATIENCE, "all orders home")
            last = time.monotonic()
            worker.wait_until(lambda: redis.zcard(keys.DUE) == 0, _PATIENCE, "nothing owed any more")
            stats = channel_manager.admin("GET", "stats")
            still_owed = int(redis.zcard(keys.DUE)) + int(redis.zcard(keys.DEAD))
    rate = (orders - at_first) / (last - first)
    return Drain(
        orders=orders,
        first_after_seconds=round(first - began, 2),
        last_after_seconds=round(last - began, 2),
        orders_per_second=round(rate, 1),
        of_what_the_slots_allow=round(rate / (SLOTS * 1000 / latency_ms), 3),
        get_order_calls=sum(stats["operations"]["getOrder"].values()),
        most_at_once=stats["most_active"],
        throttled=sum(stats["throttled"].values()),
        still_owed=still_owed,
    )


@contextmanager
def filled_receiver(orders: int, latency_ms: int) -> Iterator[tuple[Sandbox, dict[str, str], Redis, Path]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(valkey.start(folder / "valkey"))
        channel_manager = stack.enter_context(
            sandbox.start(seed=1, options=("--latency", str(latency_ms), "--slots", str(SLOTS)))
        )
        redis = stack.enter_context(Redis.from_url(server.url))
        port = free_port()
        company_id = channel_manager.company_id(TENANT, ENVIRONMENT, COMPANY)
        environment = contenders.settings(server.url, port, NP_BASE_URL=channel_manager.url, NP_COMPANY_ID=company_id)
        stack.enter_context(contenders.serve(RECEIVER, port, environment, folder))
        wish: dict[str, Any] = {"tenant": TENANT, "environment": ENVIRONMENT, "company": COMPANY, "count": orders}
        made = [row["order_id"] for row in channel_manager.admin("POST", "orders", wish)["orders"]]
        with httpx.Client(trust_env=False) as sender:
            for start in range(0, len(made), _EVENTS_PER_POST):
                batch = made[start : start + _EVENTS_PER_POST]
                body = delivery.body(batch, client_state=CLIENT_STATE, company_id=company_id)
                sender.post(f"http://127.0.0.1:{port}{WEBHOOK_PATH}", content=body).raise_for_status()
        yield channel_manager, environment, redis, folder


def fetched(channel_manager: Sandbox) -> int:
    calls = channel_manager.admin("GET", "stats")["operations"].get("getOrder", {})
    return int(calls.get("200", 0))


def main() -> int:
    """Measure once; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.drain", description=__doc__)
    parser.add_argument("--orders", type=int, default=500)
    parser.add_argument("--latency-ms", type=int, default=50, help="what one getOrder takes (default 50)")
    parser.add_argument("--json", action="store_true", help="one object instead of a sentence")
    options = parser.parse_args()
    trouble = Console(stderr=True)
    try:
        drain = measure(options.orders, options.latency_ms)
    except (valkey.ValkeyUnavailable, ProcessEnded, TimeoutError, httpx.HTTPError) as error:
        trouble.print(f"no result: {error}", markup=False)
        return 1
    if options.json:
        sys.stdout.write(json.dumps(asdict(drain)) + "\n")
    else:
        Console().print(
            f"{drain.orders} orders, first home {drain.first_after_seconds} s after the worker's start, last "
            f"{drain.last_after_seconds} s: {drain.orders_per_second} orders/s, "
            f"{drain.of_what_the_slots_allow} of what {SLOTS} slots allow"
        )
    for fault in drain.faults:
        trouble.print(f"invalid: {fault}", markup=False)
    return 1 if drain.faults else 0


if __name__ == "__main__":
    sys.exit(main())
