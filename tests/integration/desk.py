"""A desk to run the commands from: settings of two companies, and a Redis filled through the real scripts."""

from __future__ import annotations

import asyncio
import contextvars
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog
from redis import Redis

from app import bootstrap
from app.cli.main import main
from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Inbox, Recorded
from app.ledger.ledger import Ledger
from app.ledger.work import Content, Fetch
from app.upstream.decode import digest
from app.upstream.models import parse_order

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
        """Run `ota-receiver` with these arguments in this process, as from a pipe.

        To start a Python for each command takes longer than what the command does. Tests of pipes, terminals and
        signals start one.
        """
        with _process_of_its_own(self.env | env, arguments, stdin or "") as (out, err):
            code = contextvars.copy_context().run(_exit_code)
        ended = Ended(code, *(one.buffer.getvalue().decode() for one in (out, err)))
        assert "Traceback" not in ended.err, ended.err
        return ended

    def run_each(self, commands: Sequence[Sequence[str]]) -> list[Ended]:
        """Run several commands, one after the other."""
        return [self.run(*arguments) for arguments in commands]

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
                request_id="request-1",
            )
            for order in orders
        ]

        async def accept() -> Recorded:
            redis = bootstrap.for_web(self.inbox_url)
            clock = None if at is None else lambda: at
            try:
                return await Inbox(redis, dedup_days=7, event_days=90, clock=clock).accept(events)
            finally:
                await redis.aclose()

        return asyncio.run(accept())

    def ledger(self) -> Ledger:
        return Ledger(self.redis, order_days=400, fetch_lease=60_000, sinks=(SINK,))

    def begin(self, order: OrderKey) -> Fetch:
        """Begin the fetch that the order is owed, as a worker does."""
        what, fetch = self.ledger().start_fetch(order, WORKER)
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
        )
        self.ledger().store_fetch(order, WORKER, fetch, content)

    def give_up(self, order: OrderKey, reason: str = "order_missing", http_status: int = 404) -> None:
        """End the fetch that the order is owed as a dead letter, as a worker does."""
        verdict = self.ledger().fail_fetch(
            order, WORKER, self.begin(order), outcome="dead", reason=reason, http_status=http_status
        )
        assert verdict == "dead"

    def give_up_sink(self, order: OrderKey, reason: str = "ValueError") -> None:
        """Let the sink refuse the order's revision for good, as a worker does."""
        ledger = self.ledger()
        delivery = ledger.acquire_delivery(order, WORKER)
        assert delivery is not None
        ledger.complete_delivery(order, WORKER, delivery, outcome="dead", reason=reason)

    def waiting(self, queue: str) -> list[str]:
        """Return the order ids of the jobs that wait in a queue, first one first."""
        found: list[Any] = self.redis.lrange(f"rq:queue:{queue}", 0, -1)
        return [job.decode()[39:75] for job in found]

    def forget_jobs(self) -> None:
        """Take all jobs off the queues, as workers do."""
        self.redis.delete("rq:queue:live", "rq:queue:backfill")


class _Stream(io.TextIOWrapper):
    """A pipe that keeps what is written to it."""

    buffer: io.BytesIO

    def __init__(self, text: str = "") -> None:
        super().__init__(io.BytesIO(text.encode()), encoding="utf-8", write_through=True)


_one_at_a_time: Final = threading.Lock()


@contextmanager
def _process_of_its_own(
    environment: Mapping[str, str], arguments: Sequence[str], stdin: str
) -> Iterator[tuple[_Stream, _Stream]]:
    """Give the block the environment, arguments and streams of a process, and yield its stdout and stderr.

    All that a command changes in this process is as before when the block ends: also its signal handlers and where
    its log lines go.
    """
    shell, streams, argv, hook = dict(os.environ), (sys.stdin, sys.stdout, sys.stderr), sys.argv, sys.excepthook
    is_main = threading.current_thread() is threading.main_thread()
    with _one_at_a_time, _log_state_restored():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        out, err = _Stream(), _Stream()
        try:
            _set_environment({"COLUMNS": "80"} | dict(environment))
            sys.argv = ["ota-receiver", *arguments]
            sys.stdin, sys.stdout, sys.stderr = _Stream(stdin), out, err
            yield out, err
        finally:
            sys.stdin, sys.stdout, sys.stderr = streams
            sys.argv, sys.excepthook = argv, hook
            _set_environment(shell)
            if is_main:
                for number, handler in handlers.items():
                    signal.signal(number, handler)


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()


@contextmanager
def _log_state_restored() -> Iterator[None]:
    root, config = logging.getLogger(), structlog.get_config() if structlog.is_configured() else None
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
        structlog.reset_defaults()
        if config is not None:
            structlog.configure(**config)
        ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in {"app", "workers"}]
        for logger in filter(None, (vars(module).get("_log") for module in ours)):
            # It keeps the stream of its first use.
            vars(logger).pop("bind", None)


def _exit_code() -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


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
