"""The receiver in this process, step by step over a real Redis: what the web process, workers and people do to orders.

tests/service.py starts the processes instead.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal, cast
from unittest.mock import patch
from zoneinfo import ZoneInfo

import msgspec
from pydantic import SecretStr

from app import settings, times
from app.deployment import Deployment
from app.explain.stores import Stores
from app.heartbeat import Configuration, DeclaredCompany, Heartbeat
from app.ids import OrderKey
from app.intake import recorder
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Inbox, Recorded
from app.ledger import policy
from app.ledger.history import Entry
from app.ledger.keys import DEFAULT_PREFIX, Keys
from app.ledger.ledger import Ledger
from app.ledger.orders import Archive
from app.ledger.redis import AsyncRedis, Redis
from app.ledger.rq_jobs import BACKFILL, LIVE, delivery_of, order_of, queue_key, sink_queue
from app.ledger.work import (
    Content,
    Delivery,
    DeliveryOutcome,
    FailOutcome,
    Failure,
    Fetch,
    StartOutcome,
    StoreOutcome,
)
from app.settings import Company
from app.upstream.decode import digest
from app.upstream.models import parse_order
from tests import command
from tests.command import Ended
from tests.samples import sample

KEYS: Final = Keys(DEFAULT_PREFIX)
VENUE: Final = "11111111-1111-4111-8111-111111111111"
MUSEUM: Final = "22222222-2222-4222-8222-222222222222"
COMPANIES: Final = {"venue": VENUE, "museum": MUSEUM}
CLIENT_STATES: Final = {"venue": "canary-client-state-of-the-venue", "museum": "canary-client-state-of-the-museum"}
API_KEY: Final = "canary-api-key"
PARTNER: Final = "21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
SINK: Final = "python:operator:is_"

WORKER: Final = "w-live-1"
START: Final = 1_700_000_000_000
LEASE: Final = 60 * policy.SECOND

QUEUED: Final = Recorded(1, 0, 0)
COALESCED: Final = Recorded(0, 1, 0)
DUPLICATE: Final = Recorded(0, 0, 1)
ERASED: Final = Recorded(0, 0, 0, erased=1)


def order(number: int, company_id: str = VENUE) -> OrderKey:
    """Return the order with this number."""
    return OrderKey(company_id, f"00000000-0000-4000-8000-{number:012}")


ONE: Final = order(1)
SAME_ID: Final = order(1, MUSEUM)
"""An order of another company with the same order id."""

_timestamps = count(1)


def now_ms() -> int:
    """Return the time in ms since 1970 of this machine, which is that of the Valkey that a test starts."""
    return time.time_ns() // 1_000_000


def shown(at: int) -> str:
    """Return a time in ms as a command of a lab shows it, up to its minute."""
    return times.from_ms(at).astimezone(ZoneInfo("Europe/Copenhagen")).strftime("%m-%d %H:%M:")


class Lab:
    """An empty receiver with two companies. The default order is ONE, and all times are in ms unless named otherwise.

    `url` and `folder` are needed by commands only, `base_url` by those that call upstream.
    """

    def __init__(
        self,
        redis: Redis,
        url: str = "",
        folder: Path = Path(),
        base_url: str = "http://127.0.0.1:1",
        *,
        sinks: Sequence[str] = (SINK,),
        now: int | None = None,
    ) -> None:
        self.redis, self.url, self.folder, self.base_url, self.sinks = redis, url, folder, base_url, tuple(sinks)
        # Commands of redis-py are typed as any answer of a sync or async client, with or without decoding.
        self._read: Any = redis
        self._now = now
        self.ledger = Ledger(redis, order_days=400, fetch_lease=LEASE, sinks=sinks, clock=self.clock)
        # One connection for both, so that all steps have one order.
        inbox_redis = cast("AsyncRedis", _AsyncScripts(redis))
        self._inbox = Inbox(inbox_redis, dedup_days=7, event_days=90, clock=self.clock)

    @property
    def now(self) -> int:
        """Return the time that a test has set, else that of Redis."""
        if self._now is not None:
            return self._now
        seconds, microseconds = self._read.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    @now.setter
    def now(self, now: int | None) -> None:
        self._now = now

    def clock(self) -> int:
        return self.now

    def later(self, seconds: float) -> None:
        self.now += round(seconds * 1000)

    def accept(
        self, *orders: OrderKey, status: str = "Issued", timestamp: str | None = None, at: int | None = None
    ) -> Recorded:
        """Accept one event for each order in one POST; each has a timestamp of its own unless one is given.

        `at`: the time of this call alone.
        """
        kept, self._now = self._now, self._now if at is None else at
        try:
            return self.accept_events(*(event_of(one, timestamp, status) for one in orders or (ONE,)))
        finally:
            self._now = kept

    def accept_events(self, *events: OrderProcessed) -> Recorded:
        """Accept the events of one POST, or of the spool, without its time limit: the machine may be busy."""
        with patch.object(recorder, "ACCEPT_SECONDS", None):
            return asyncio.run(self._inbox.accept(events))

    def request_fetch(self, *orders: OrderKey, queue: Literal["live", "backfill"] = "live") -> int:
        """Return how many jobs were enqueued."""
        return self.ledger.request_fetch(orders or [ONE], queue=queue, reason="refetch").queued

    def run_command(self, *arguments: str, stdin: str = "", **env: str) -> Ended:
        """Run `ota-receiver` with these arguments in this process, as from a pipe."""
        return command.run(arguments, self.env | env, stdin)

    def on_terminal(self, columns: int, *arguments: str, **env: str) -> Ended:
        """Run `ota-receiver` with these arguments in this process, its output on a terminal of so many columns."""
        return command.run(arguments, self.env | env, "", columns)

    def run_commands(self, commands: Iterable[Sequence[str]]) -> list[Ended]:
        """Run several commands, one after the other."""
        return [self.run_command(*arguments) for arguments in commands]

    def try_start(self, order: OrderKey = ONE, worker: str = WORKER) -> StartOutcome:
        """Start a fetch if the order needs one; return what it needs."""
        return self.ledger.start_fetch(order, worker)[0]

    def start_fetch(self, order: OrderKey = ONE, worker: str = WORKER) -> Fetch:
        """Start a fetch; raises AssertionError unless the order needs one now."""
        outcome, fetch, _ = self.ledger.start_fetch(order, worker)
        assert fetch is not None, outcome
        return fetch

    def store_fetch(
        self,
        fetch: Fetch,
        answer: int | str = "order-issued",
        *,
        order: OrderKey = ONE,
        worker: str = WORKER,
        recheck: float | None = None,
        give_up: str = "",
        **changed: object,
    ) -> StoreOutcome:
        """Store upstream's answer: a fixture with some fields changed, or the content with this version number.

        `recheck` (seconds) marks it unsettled.
        """
        recheck_ms = None if recheck is None else round(recheck * 1000)
        content = content_of(answer) if isinstance(answer, int) else content_of_fixture(order, answer, **changed)
        return self.ledger.store_fetch(order, worker, fetch, content, recheck_ms=recheck_ms, give_up=give_up).what

    def fetch_and_store(
        self, order: OrderKey = ONE, answer: int | str = "order-issued", *, worker: str = WORKER, **changed: object
    ) -> StoreOutcome:
        """Fetch the order, which must need it, with this answer of upstream."""
        return self.store_fetch(self.start_fetch(order, worker), answer, order=order, worker=worker, **changed)  # type: ignore[arg-type]  # fields of the answer

    def accept_and_fetch(
        self, order: OrderKey = ONE, answer: int | str = "order-issued", **changed: Any
    ) -> StoreOutcome:
        """Accept an event of the order, and fetch the order with this answer of upstream."""
        self.accept(order)
        return self.fetch_and_store(order, answer, **changed)

    def fail_fetch(
        self,
        outcome: Failure,
        order: OrderKey = ONE,
        *,
        fetch: Fetch | None = None,
        worker: str = WORKER,
        reason: str = "",
        wait: float = 5,
        http_status: int | None = None,
        duration_ms: int = 0,
        unanswered: bool = False,
    ) -> FailOutcome:
        """End a fetch without an order; it is started unless `fetch` runs already. `wait`: seconds."""
        return self.ledger.fail_fetch(
            order,
            worker,
            fetch or self.start_fetch(order, worker),
            outcome=outcome,
            reason=reason or f"reason_{outcome}",
            wait_ms=round(wait * 1000),
            http_status=http_status,
            duration_ms=duration_ms,
            unanswered=unanswered,
        )

    def dead_letter(self, order: OrderKey = ONE, reason: str = "order_missing", http_status: int = 404) -> None:
        """End the fetch of the order as a dead letter."""
        assert self.fail_fetch("dead", order, reason=reason, http_status=http_status) == "dead"

    def acquire_delivery(
        self, order: OrderKey = ONE, worker: str = WORKER, *, sink: str | None = None
    ) -> Delivery | None:
        """`sink`: the first one of the lab without it, as in all that follow."""
        return self.ledger.acquire_delivery(order, sink or self.sinks[0], worker)

    def start_delivery(self, order: OrderKey = ONE, worker: str = WORKER, *, sink: str | None = None) -> Delivery:
        """Acquire a delivery; raises AssertionError unless one is due."""
        delivery = self.acquire_delivery(order, worker, sink=sink)
        assert delivery is not None
        return delivery

    def complete_delivery(
        self,
        delivery: Delivery,
        outcome: DeliveryOutcome = "succeeded",
        order: OrderKey = ONE,
        *,
        worker: str = WORKER,
        reason: str = "reason",
        failure: str = "",
        wait: float = 5,
        unavailable: bool = False,
    ) -> None:
        """`wait`: seconds."""
        self.ledger.complete_delivery(
            order,
            worker,
            delivery,
            outcome=outcome,
            reason=reason,
            failure=failure,
            wait_ms=round(wait * 1000),
            duration_ms=7,
            unavailable=unavailable,
        )

    def deliver(
        self,
        outcome: DeliveryOutcome = "succeeded",
        order: OrderKey = ONE,
        *,
        worker: str = WORKER,
        sink: str | None = None,
        **ended: Any,
    ) -> Delivery:
        """Acquire a delivery and complete it with this outcome; `ended` as for `complete_delivery`."""
        delivery = self.start_delivery(order, worker, sink=sink)
        self.complete_delivery(delivery, outcome, order, worker=worker, **ended)
        return delivery

    def dead_letter_delivery(self, order: OrderKey = ONE, reason: str = "ValueError") -> None:
        """End the delivery of the order as a dead letter."""
        self.deliver("dead", order, reason=reason)

    def dispatch(self) -> int:
        """Return how many jobs were enqueued."""
        return self.ledger.dispatch_due().enqueued

    def overwrite(self, key: str, value: bytes | None) -> None:
        """Replace a key by a string, with None by a set: no key of the receiver is one."""
        self.redis.delete(key)
        if value is None:
            self.redis.sadd(key, "another program")
        else:
            self.redis.set(key, value)

    def clear_queues(self) -> None:
        """Remove all jobs: workers have taken them, or they are lost."""
        self.redis.delete(*(queue_key(queue, KEYS) for queue in (LIVE, BACKFILL, *map(sink_queue, self.sinks))))

    @property
    def archive(self) -> Archive:
        return Archive(self.redis)

    def declare(self, pool: str = "pool", *, ago: float = 0, since: float = 60, **changed: Any) -> None:
        """Write what a running pool does: its heartbeat of `ago` seconds ago; it began `since` seconds ago.

        `changed`: fields of its `configuration` that are not those of the lab.
        """
        beat = Heartbeat("machine", 1, "", [], self.now - round(ago * 1000), self.now - round(since * 1000))
        mine = msgspec.structs.replace(configuration(self.sinks), **changed)
        Deployment(self.redis).declare(pool, msgspec.structs.replace(beat, configuration=mine))

    def record(self, order: OrderKey = ONE) -> dict[str, str]:
        """Return the fields of an order's record, none if there is no record."""
        return _texts(self._read.hgetall(KEYS.record(order)))

    def field(self, name: str, order: OrderKey = ONE) -> str | None:
        return self.record(order).get(name)

    def fields(self, *names: str) -> list[str | None]:
        return [self.field(name) for name in names]

    def history(self, order: OrderKey = ONE) -> tuple[Entry, ...]:
        return tuple(self.archive.history(order))

    def days_kept(self, order: OrderKey = ONE) -> set[float | None]:
        """Return the days until each key of the order expires, None for one that does not expire."""
        names = (KEYS.record(order), KEYS.history(order), KEYS.content(order), KEYS.revisions(order))
        left = [self._read.pttl(name) for name in names if self.redis.exists(name)]
        return {None if ms == -1 else round(ms / policy.DAY, 2) for ms in left}

    def due(self) -> dict[OrderKey, int]:
        """Return the due time of every pending order."""
        return {OrderKey.of(one.decode()): int(at) for one, at in self._read.zrange(KEYS.due, 0, -1, withscores=True)}

    def due_in(self, order: OrderKey = ONE) -> float | None:
        """Return the seconds until the order is due, None if it is not in `due`."""
        score = self._read.zscore(KEYS.due, order.member)
        return None if score is None else (score - self.now) / 1000

    def delivery_in(self, order: OrderKey = ONE, *, sink: str | None = None) -> float | None:
        """Return the seconds until a delivery of the order is due, None if none is outstanding."""
        score = self._read.zscore(KEYS.deliveries(sink or self.sinks[0]), order.member)
        return None if score is None else (score - self.now) / 1000

    def pending(self) -> int:
        """Return how many fetches and deliveries are outstanding."""
        return sum(int(self._read.zcard(clock)) for clock in (KEYS.due, *map(KEYS.deliveries, self.sinks)))

    def dead(self) -> int:
        """Return how many orders are dead letters."""
        return int(self._read.zcard(KEYS.dead))

    def is_dead(self, order: OrderKey = ONE) -> bool:
        return self._read.zscore(KEYS.dead, order.member) is not None

    def jobs(self, queue: str = LIVE) -> list[str]:
        """Return the ids of the jobs that wait, first one first."""
        return [one.decode() for one in self._read.lrange(queue_key(queue, KEYS), 0, -1)]

    def queued(self, queue: str = LIVE) -> list[str]:
        """Return the order ids of the jobs that wait, first one first."""
        found = (order_of(job) or (delivery_of(job) or [None])[0] for job in self.jobs(queue))
        return [one.order_id for one in found if one]

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of a job's hash."""
        return _texts(self._read.hgetall(f"rq:job:{job_id}"))

    def events(self) -> list[dict[str, str]]:
        """Return the fields of every stored event, oldest first."""
        return [_texts(fields) for _, fields in self._read.xrange(KEYS.events)]

    def counters(self, prefix: str = "") -> dict[str, int]:
        """Return the counters whose name begins with `prefix`."""
        found = _texts(self._read.hgetall(KEYS.counters))
        return {name: int(value) for name, value in found.items() if name.startswith(prefix)}

    def dump(self) -> dict[bytes, bytes]:
        """Return all keys with their serialized values: nothing has changed if two dumps are equal."""
        self._read.config_set("rdbcompression", "no")
        return {name: self._read.dump(name) or b"" for name in self._read.keys("*")}

    def everything(self) -> bytes:
        """Return names and values of all keys in one piece, to search for secrets."""
        return b"".join(part for one in self.dump().items() for part in one)

    @cached_property
    def env(self) -> dict[str, str]:
        """Return the settings of commands, with the two companies in a file."""
        companies = self.folder / "companies.toml"
        companies.write_text(
            "\n".join(
                f'[companies.{slug}]\nnp_company_id = "{company_id}"\nnp_company = "{slug.title()}"\n'
                f'np_tenant = "tenant"\nnp_environment = "Sandbox"\nnp_api_key = "{API_KEY}"\n'
                f'client_state = "{CLIENT_STATES[slug]}"\n'
                for slug, company_id in COMPANIES.items()
            )
        )
        shell = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return shell | {
            "REDIS_URL": self.url,
            "COMPANIES_FILE": str(companies),
            "NP_BASE_URL": self.base_url,
            "SINKS": ",".join(self.sinks),
            "TZ": "Europe/Copenhagen",
            "PYTHONWARNINGS": "error",
        }

    def stores(self, **env: str) -> Stores:
        """Return what a command or a page reads, with the settings of commands."""
        return Stores(self.redis, settings.parse(self.env | env))

    def change_companies(self, old: str, new: str) -> None:
        """Change a text of the companies' file."""
        file = Path(self.env["COMPANIES_FILE"])
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))


class _AsyncScripts:
    """What Inbox uses of its async client, over a synchronous one; what fails is not tried twice."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.names = redis.names
        self.connection_pool = redis.connection_pool

    def register_script(self, text: str) -> Callable[..., Awaitable[Any]]:
        script = self._redis.register_script(text)

        async def call(args: Sequence[Any], client: object) -> Any:
            return script(args=args)

        return call


def configuration(sinks: Sequence[str] = (SINK,), *companies: str) -> Configuration:
    """Return what a pool declares that has these sinks, and all companies of a lab or those named."""
    names = companies or tuple(COMPANIES)
    known = {COMPANIES[name]: DeclaredCompany(name, f"/tenant/Sandbox/{name.title()}", "breaker") for name in names}
    return Configuration(known, tuple(sinks), "https://api.example.com 2026-08-21")


def company(
    slug: str, company_id: str, name: str, tenant: str = "tenant", environment: str = "Sandbox", api_key: str = API_KEY
) -> Company:
    """Return the settings of a company."""
    return Company(
        slug=slug,
        np_company_id=company_id,
        np_company=name,
        np_tenant=tenant,
        np_environment=environment,
        np_api_key=SecretStr(api_key),
        np_partner_id=PARTNER,
        client_state=SecretStr(CLIENT_STATES["venue"]),
    )


def event_of(order: OrderKey, timestamp: str | None = None, status: str = "Issued") -> OrderProcessed:
    """Return an event of the order; without a `timestamp` it has a new one, with "" none."""
    return OrderProcessed(
        company_id=order.company_id,
        order_id=order.order_id,
        status=status,
        reference=f"CM-{order.order_id[:8]}",
        timestamp=f"2026-11-22T10:00:00.{next(_timestamps):07}Z" if timestamp is None else timestamp,
        secret="current",
        request_id="request-1",
    )


def content_of(version: int) -> Content:
    """Return upstream's answer while the order has this version."""
    return Content(
        raw=b"%d" % version,
        digest=str(version),
        status="Issued",
        wallets=1,
        tickets=1,
        coupons=0,
        manifest=True,
        http_status=200,
        duration_ms=1,
    )


def content_of_answer(raw: bytes) -> Content:
    """Return the answer of getOrder as a worker stores it."""
    found = parse_order(raw)
    return Content(
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


def content_of_fixture(order: OrderKey, name: str, **changed: object) -> Content:
    """Return the answer in tests/fixtures, as an answer for this order, with some of its fields changed."""
    body = json.loads(sample(name)) | {"orderId": order.order_id} | changed
    return content_of_answer(json.dumps(body).encode())


def _texts(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
