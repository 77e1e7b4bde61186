"""Reconciling in tests: one company at a real Channel Manager, a ledger in a real Valkey, and a clock of the test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import SecretStr
from redis import Redis

from app.ids import OrderKey
from app.ledger.ledger import Ledger
from app.ledger.orders import Archive, Backlog
from app.ledger.rate_limit import Limits, RateLimiter
from app.ledger.record import OrderRecord
from app.ledger.work import Content
from app.reconcile.run import OrderList, Reconcile, Report
from app.reconcile.state import Checkpoint
from app.settings import Company
from app.upstream.client import ChannelManager
from app.upstream.transport import DeadlineTransport
from tests.clock import now_ms

MINUTE: Final = 60_000
PARTNER: Final = "21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
API_KEY: Final = "canary-api-key"


@dataclass
class Station:
    """`now` is our time in ms; the Channel Manager has its own."""

    redis: Redis
    company: Company
    client: ChannelManager
    now: int = field(default_factory=now_ms)
    per_minute: float = 1200
    page_size: int = 1000
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.redis, order_days=400, fetch_lease=60_000, clock=lambda: self.now)

    @property
    def company_id(self) -> str:
        return self.company.np_company_id

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.redis, self.company_id)

    @property
    def limiter(self) -> RateLimiter:
        limits = Limits(concurrency=5, backfill_concurrency=1, requests_per_window=6000, permit_lease=60_000)
        return RateLimiter(self.redis, API_KEY, self.company.path, limits, clock=lambda: self.now)

    def reconcile(self, ledger: Ledger | None = None) -> Reconcile:
        """Return a run as the worker builds it, with the clock of the test."""
        return Reconcile(
            self.company.slug,
            OrderList(
                self.redis,
                self.company_id,
                self.client,
                self.limiter,
                order_days=400,
                clock=lambda: self.now,
                pause=self._pause,
                page_size=self.page_size,
            ),
            ledger or self.ledger,
            Backlog(self.redis),
            per_minute=self.per_minute,
            company_ids=frozenset({self.company_id}),
            queue="backfill",
        )

    def run(self) -> Report:
        return self.reconcile().run()

    def queued(self) -> list[str]:
        """Return the order ids of the jobs in backfill."""
        found: Any = self.redis.lrange("rq:queue:backfill", 0, -1)
        return [job.decode()[39:75] for job in found]

    def record(self, order_id: str) -> OrderRecord | None:
        return Archive(self.redis).record(OrderKey(self.company_id, order_id))

    def fetch(self, *order_ids: str) -> None:
        """Fetch these orders, or all in backfill, as workers do."""
        for order_id in order_ids or self.queued():
            key = OrderKey(self.company_id, order_id)
            _, fetch = self.ledger.start_fetch(key, "w-backfill-1")
            if fetch is None:
                continue
            found = self.client.get_order(order_id)
            order = found.order
            content = Content(
                raw=found.raw,
                digest=found.digest,
                status=order.status,
                wallets=len(order.wallets),
                tickets=len(order.tickets),
                coupons=len(order.coupons),
                manifest=order.manifest_url is not None,
                http_status=200,
                duration_ms=1,
            )
            recheck_ms = None if order.settled else 2 * MINUTE
            self.ledger.store_fetch(key, "w-backfill-1", fetch, content, recheck_ms=recheck_ms)
        if not order_ids:
            self.redis.delete("rq:queue:backfill")

    def _pause(self, seconds: float) -> None:
        self.now += round(seconds * 1000)


@contextmanager
def station(redis: Redis, url: str, tenant: str, company_id: str) -> Iterator[Station]:
    """Open a station for the company `tenant`/Production/Museum."""
    company = Company(
        slug="venue",
        np_company_id=company_id,
        np_company="Museum",
        np_tenant=tenant,
        np_environment="Production",
        np_api_key=SecretStr(API_KEY),
        np_partner_id=PARTNER,
        client_state=SecretStr("canary-client-state"),
    )
    with DeadlineTransport(5) as http:
        yield Station(redis, company, ChannelManager(http, company, "2026-08-21", url))


def forked(call: Callable[[], object]) -> int:
    """Run `call` in a forked process; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
        finally:
            os._exit(0)
    return pid


def exit_code(pid: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
