"""A desk to run the commands from: settings of two companies, and a Redis filled through the real scripts."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from redis import Redis

from app import bootstrap
from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Inbox, Recorded
from app.ledger.ledger import Ledger
from app.ledger.work import Content, Fetch
from app.upstream.models import digest, parse_order

VENUE: Final = "11111111-1111-4111-8111-111111111111"
MUSEUM: Final = "22222222-2222-4222-8222-222222222222"
PARTNER: Final = "21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
SINK: Final = "python:json:dumps"
CLIENT_STATES: Final = {"venue": "canary-client-state-of-the-venue", "museum": "canary-client-state-of-the-museum"}
API_KEY: Final = "canary-api-key"
FIXTURES: Final = Path(__file__).parent.parent / "fixtures"
WORKER: Final = "w-live-1"


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[Any]:
        """Return what a command with --json printed, and nothing else may stand on its stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass(frozen=True)
class Desk:
    """Runs commands, and does in their Redis what the web process and the workers would."""

    redis: Redis
    folder: Path
    env: dict[str, str]
    inbox_url: str = field(repr=False)

    def run(self, *arguments: str, stdin: str | None = None, **env: str) -> Ended:
        """Run `ota-receiver` with these arguments, as from a pipe."""
        ended = subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments],
            env=self.env | env,
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in ended.stderr, ended.stderr
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def hear(self, *orders: OrderKey, status: str = "Issued", timestamp: str = "", at: int | None = None) -> Recorded:
        """Accept one event for each order, as the web process does."""
        events = [
            OrderProcessed(
                company_id=order.company_id,
                order_id=order.order_id,
                status=status,
                reference=f"CM-{order.order_id[:8]}",
                timestamp=timestamp,
                secret="current",
            )
            for order in orders
        ]

        async def accept() -> Recorded:
            redis = bootstrap.for_web(self.inbox_url)
            clock = bootstrap.clock if at is None else lambda: at
            try:
                return await Inbox(redis, dedup_days=7, event_days=90, clock=clock).accept(events, "request-1")
            finally:
                await redis.aclose()

        return asyncio.run(accept())

    def ledger(self) -> Ledger:
        return Ledger(self.redis, order_days=400, fetch_lease=60_000, sinks=(SINK,))

    def begin(self, order: OrderKey) -> Fetch:
        """Begin the fetch that the order is owed, as a worker does."""
        what, fetch = self.ledger().begin(order, WORKER, bootstrap.clock())
        assert what == "fetch"
        assert fetch is not None
        return fetch

    def bring_home(self, order: OrderKey, fixture: str = "order-issued", **changed: object) -> None:
        """Fetch the order as a worker does, with a fixture for upstream's answer."""
        self.store(order, self.begin(order), fixture, **changed)

    def store(self, order: OrderKey, fetch: Fetch, fixture: str = "order-issued", **changed: object) -> None:
        """Store the answer of a fetch that has begun, as a worker does."""
        body = json.loads((FIXTURES / f"{fixture}.json").read_bytes()) | {"orderId": order.order_id} | changed
        raw = json.dumps(body).encode()
        found = parse_order(raw)
        content = Content(
            raw=raw,
            digest=digest(raw),
            status=found.status,
            wallets=len(found.wallets),
            tickets=len(found.tickets),
            coupons=len(found.coupons),
            manifest=found.manifest_url is not None,
            http_status=200,
            duration_ms=42,
            references=found.references,
            guests=found.addresses,
        )
        self.ledger().finish(order, WORKER, fetch, content, bootstrap.clock())

    def give_up(self, order: OrderKey, reason: str = "order_missing", http_status: int = 404) -> None:
        """End the fetch that the order is owed as a dead letter, as a worker does."""
        verdict = self.ledger().fail(
            order, WORKER, self.begin(order), bootstrap.clock(), what="dead", reason=reason, http_status=http_status
        )
        assert verdict == "dead"

    def give_up_sink(self, order: OrderKey, reason: str = "ValueError") -> None:
        """Let the sink refuse the order's revision for good, as a worker does."""
        ledger = self.ledger()
        hand_on = ledger.hand(order, WORKER, bootstrap.clock())
        assert hand_on is not None
        ledger.handed(order, WORKER, hand_on, bootstrap.clock(), what="dead", reason=reason)

    def waiting(self, queue: str) -> list[str]:
        """Return the order ids of the jobs that wait in a queue, first one first."""
        found: list[Any] = self.redis.lrange(f"rq:queue:{queue}", 0, -1)
        return [job.decode()[39:75] for job in found]

    def forget_jobs(self) -> None:
        """Take all jobs off the queues, as workers do."""
        self.redis.delete("rq:queue:live", "rq:queue:backfill")


def order(number: int, company_id: str = VENUE) -> OrderKey:
    """Return the order with this number."""
    return OrderKey(company_id, f"00000000-0000-4000-8000-{number:012}")


def open_desk(redis: Redis, redis_url: str, folder: Path, base_url: str = "http://127.0.0.1:1") -> Desk:
    """Write the settings of two companies and return a desk for them."""
    companies = folder / "companies.toml"
    ids = {"venue": VENUE, "museum": MUSEUM}
    companies.write_text(
        "\n".join(
            f'[companies.{slug}]\nnp_company_id = "{ids[slug]}"\nnp_company = "{slug.title()}"\nnp_tenant = "tenant"\n'
            f'np_environment = "Sandbox"\nnp_api_key = "{API_KEY}"\nclient_state = "{CLIENT_STATES[slug]}"\n'
            for slug in ids
        )
    )
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    env |= {
        "REDIS_URL": redis_url,
        "COMPANIES_FILE": str(companies),
        "NP_BASE_URL": base_url,
        "SINKS": SINK,
        "TZ": "Europe/Copenhagen",
        "PYTHONWARNINGS": "error",
    }
    return Desk(redis, folder, env, redis_url)
