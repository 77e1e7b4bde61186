"""The workers' own processor over a real Redis and a real Channel Manager (the sandbox), under a clock of the test.

What the pool and RQ do between two jobs is done here in a few lines, so that hours pass in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

from pydantic import SecretStr
from redis import Redis

from app import bootstrap
from app.dev.sandbox.process import Sandbox
from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Inbox
from app.ledger import keys, policy
from app.ledger.history import Entry, parse_entry
from app.ledger.ledger import Ledger
from app.ledger.rate_limit import Limits, RateLimiter
from app.ledger.redis import for_worker
from app.ledger.rq_jobs import LIVE, queue_key
from app.settings import Company
from app.upstream.client import ChannelManager
from app.upstream.models import Order
from app.upstream.transport import DeadlineTransport
from workers.processor import Connection, Processor
from workers.sinks import Context, Sink

START: Final = 1_700_000_000_000
LEASE: Final = 60 * policy.SECOND
WORKER: Final = "w"


class Workbench:
    """One worker, one ticker, one company, and what they work on."""

    def __init__(self, url: str, sandbox: Sandbox, sinks: Mapping[str, Sink], requests_per_window: int) -> None:
        self.now = START
        self.redis = for_worker(url)
        self.sandbox = sandbox
        self.company_id = sandbox.company_id()
        self.calls: list[int] = []
        self.runs = 0
        self._url, self._sinks, self._most = url, sinks, requests_per_window
        self._http = DeadlineTransport(5)
        self.ledger = Ledger(self.redis, order_days=400, fetch_lease=LEASE, sinks=tuple(sinks), clock=self.clock)
        self.use_key("first-key")

    def use_key(self, api_key: str, wrap: Callable[[str, object], object] = lambda name, part: part) -> None:
        """Start a worker with this key; `wrap` may put something around its ledger, client and budget."""
        company = Company(
            slug="venue",
            np_company_id=self.company_id,
            np_company="Sandbox",
            np_tenant="sandbox",
            np_environment="Sandbox",
            np_api_key=SecretStr(api_key),
            client_state=SecretStr("state"),
        )
        limits = Limits(concurrency=5, backfill_concurrency=1, requests_per_window=self._most, permit_lease=LEASE)
        client = Counted(ChannelManager(self._http, company, "2026-08-21", self.sandbox.url), self)
        limiter = wrap("limiter", RateLimiter(self.redis, api_key, company.path, limits, clock=self.clock))
        ledger = cast("Ledger", wrap("ledger", self.ledger))
        connection = Connection("venue", cast("ChannelManager", wrap("client", client)), cast("RateLimiter", limiter))
        self.processor = Processor(ledger, {self.company_id: connection}, self._sinks)

    def clock(self) -> int:
        return self.now

    def issue(self, count: int = 1) -> list[OrderKey]:
        """Make issued orders at the Channel Manager, and let their events be accepted."""
        made = self.sandbox.admin("POST", "orders", {"count": count, "events": 0})["orders"]
        orders = [OrderKey(self.company_id, row["order_id"]) for row in made]
        self.hear(*orders)
        return orders

    def hear(self, *orders: OrderKey, status: str = "Issued") -> None:
        """Accept an event for each order, as the web process does."""
        events = [OrderProcessed(*order, status, "CM-1", "", "current", "request") for order in orders]

        async def accept() -> None:
            redis = bootstrap.for_web(self._url)
            inbox = Inbox(redis, dedup_days=7, event_days=90, clock=self.clock)
            try:
                for start in range(0, len(events), 200):
                    await inbox.accept(events[start : start + 200])
            finally:
                await redis.aclose()

        asyncio.run(accept())

    def fault(self, **fault: Any) -> None:
        """Put a rule into force at the Channel Manager instead of all others."""
        self.sandbox.admin("PUT", "faults", {"operation": "getOrder", **fault})

    def mend(self) -> None:
        self.sandbox.admin("DELETE", "faults")

    def work(self) -> None:
        """Do every job that waits."""
        while jobs := cast("list[bytes] | None", self.redis.lpop(queue_key(LIVE), 500)):
            for job in jobs:
                self.runs += 1
                self.processor.process(OrderKey(job[2:38].decode(), job[39:75].decode()), WORKER)

    def later(self, seconds: float) -> None:
        """Let time pass; at every moment when something is due, tick and work."""
        until = self.now + round(seconds * 1000)
        self.work()
        while (soonest := self._soonest()) is not None and soonest <= until:
            # A pool ticks each second.
            self.now = max(self.now, -(-soonest // 1000) * 1000)
            self.ledger.dispatch_due()
            self.work()
        self.now = max(self.now, until)

    def _soonest(self) -> int | None:
        found: Any = self.redis.zrange(keys.DUE, 0, 0, withscores=True)
        return int(found[0][1]) if found else None

    def pending(self) -> int:
        return int(self.redis.zcard(keys.DUE))

    def dead(self) -> int:
        return int(self.redis.zcard(keys.DEAD))

    def field(self, order: OrderKey, name: str) -> str | None:
        value = self.redis.hget(keys.record(order), name)
        return value.decode() if isinstance(value, bytes) else value

    def history(self, order: OrderKey) -> list[Entry]:
        entries: Any = self.redis.lrange(keys.history(order), 0, -1)
        return [parse_entry(entry) for entry in entries]

    def close(self) -> None:
        self._http.close()
        self.redis.close()


class Counted:
    """The client, and when it was called."""

    def __init__(self, client: ChannelManager, bench: Workbench) -> None:
        self._client, self._bench = client, bench

    def get_order(self, order_id: str) -> Any:
        self._bench.calls.append(self._bench.now)
        return self._client.get_order(order_id)


class Taking(Sink):
    """A sink that takes everything, or does what `trouble` does for an order."""

    def __init__(self, trouble: Callable[[str], None] = lambda order_id: None) -> None:
        self.taken: list[str] = []
        self.called: list[str] = []
        self._trouble = trouble

    def deliver(self, order: Order, context: Context) -> None:
        self.called.append(order.order_id)
        self._trouble(order.order_id)
        self.taken.append(order.order_id)


@contextlib.contextmanager
def workbench(
    url: str, sandbox: Sandbox, sinks: Mapping[str, Sink] | None = None, requests_per_window: int = 6000
) -> Iterator[Workbench]:
    """Open a workbench on an empty Redis and a Channel Manager without faults."""
    with Redis.from_url(url) as redis:
        redis.flushall()
    sandbox.admin("DELETE", "faults")
    bench = Workbench(url, sandbox, sinks or {}, requests_per_window)
    try:
        yield bench
    finally:
        bench.close()
