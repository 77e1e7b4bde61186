"""The composition root: the only place where parts are opened and put together.

Clients of Redis with time-outs that fit who asks.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, redirect_stdout
from typing import NamedTuple

import httpx
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from starlette.types import ASGIApp

from app import log
from app.audit import Audit
from app.erasure import AuditWords, Erasure
from app.health import Check, Health
from app.intake.auth import Authenticator
from app.intake.failover import Recorder
from app.intake.recorder import Inbox
from app.intake.service import Intake
from app.intake.spool import Spool, SpoolFolder
from app.ledger import policy
from app.ledger.dead_letters import DeadLetters
from app.ledger.events import EventLog
from app.ledger.guests import Guests
from app.ledger.ledger import Drops, Ledger
from app.ledger.orders import Archive, ReferenceIndex
from app.ledger.rate_limit import Budget, Limits, breaker_key
from app.ledger.redis import readable_url, refuse_newer, translated_errors
from app.metrics import Metrics, Tally
from app.replay import Plans, Selector
from app.settings import Company, Settings
from app.snapshot import Pools, Subject, VitalSigns
from app.upstream.client import ChannelManager
from app.upstream.transport import open_http
from app.web.app import Probes, application
from app.web.webhook import Webhook

WEB_TIMEOUT = 1.0
"""Seconds. A sender waits for the answer; redis-py 8 would else retry by itself for 15 s."""

WORKER_TIMEOUT = 10.0
"""Seconds. Nobody waits for a worker, but a hanging Redis must not hold one for ever."""


def for_web(url: str) -> AsyncRedis:
    """Return the client of the web process; one try, then the caller decides."""
    return AsyncRedis.from_url(
        url,
        socket_timeout=WEB_TIMEOUT,
        socket_connect_timeout=WEB_TIMEOUT,
        retry=AsyncRetry(NoBackoff(), 0),
        health_check_interval=0,
    )


def for_worker(url: str) -> Redis:
    """Return the client of the ledger and the budget in workers, the pool and the CLI; one try."""
    return Redis.from_url(
        url,
        socket_timeout=WORKER_TIMEOUT,
        socket_connect_timeout=WEB_TIMEOUT,
        retry=Retry(NoBackoff(), 0),
    )


def for_rq(url: str) -> Redis:
    """Return the client that RQ's worker blocks on; RQ sets its own socket_timeout, so nobody shares it."""
    return Redis.from_url(url, socket_connect_timeout=WORKER_TIMEOUT)


class Books(NamedTuple):
    """What the commands read, and the ledger they ask for fetches."""

    archive: Archive
    events: EventLog
    dead: DeadLetters
    ledger: Ledger
    pools: Pools
    references: ReferenceIndex
    drops: Drops
    selector: Selector
    plans: Plans
    erasure: Erasure
    guests: Guests
    audit: Audit
    audit_words: AuditWords


def clock() -> int:
    """Return now in ms since 1970: the time of the ledger, handed to it as an argument."""
    return time.time_ns() // 1_000_000


def web_app(settings: Settings) -> ASGIApp:
    """Return the web process's app; Redis is first asked when the first event comes.

    Raises SettingsError for a SPOOL_DIR that is not ours alone.
    """
    redis = for_web(settings.redis_url.get_secret_value())
    inbox = Inbox(redis, dedup_days=settings.dedup_days, event_days=settings.event_days, clock=clock)
    tally = Tally(redis)
    spool = Spool(SpoolFolder(settings.spool_dir, settings.spool_max_mb * 1024 * 1024)) if settings.spool_dir else None
    recorder = Recorder(inbox, spool, clock, tally.count) if spool else None

    @asynccontextmanager
    async def resources() -> AsyncIterator[None]:
        tasks = [asyncio.create_task(tally.run()), *([asyncio.create_task(recorder.run())] if recorder else [])]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await tally.flush()
            if spool:
                await spool.close()
            await redis.aclose()

    return application(
        webhook_path=settings.webhook_path,
        webhook=Webhook(
            Intake(Authenticator(settings.companies), recorder or inbox, tally), tally, settings.max_body_bytes
        ),
        probes=Probes(
            Health(redis, spool),
            Metrics(
                redis, vital_signs(settings), clock, spool.waiting if spool else None, _reconcile_every(settings)
            ).text,
            settings.ops_token.get_secret_value() if settings.ops_token else None,
        ),
        resources=resources,
    )


def configure_log(settings: Settings) -> None:
    log.configure(level=settings.log_level, form=settings.log_format)


def configure_cli_log() -> None:
    """Send warnings to stderr and nothing else: stdout belongs to what the command prints."""
    with redirect_stdout(sys.stderr):
        log.configure(level="WARNING", form="console")


def configure_stderr_log(settings: Settings) -> None:
    """Send log lines to stderr as the settings say: for a command that runs on, and prints something else."""
    with redirect_stdout(sys.stderr):
        configure_log(settings)


@contextmanager
def books(settings: Settings) -> Iterator[Books]:
    """Open Redis for a command.

    Raises StoreUnavailable, also out of the block, when Redis fails, and NewerData, which is one too.
    """
    url = settings.redis_url.get_secret_value()
    with readable_url():
        redis = worker_redis(settings)
    with translated_errors(url), redis:
        refuse_newer(redis)
        yield Books(
            archive=Archive(redis),
            events=EventLog(redis),
            dead=DeadLetters(redis),
            ledger=ledger(settings, redis),
            pools=Pools(redis),
            references=ReferenceIndex(redis),
            drops=Drops(redis, order_days=settings.order_days, sinks=settings.sinks),
            selector=Selector(redis),
            plans=Plans(redis, event_days=settings.event_days),
            erasure=Erasure(redis, order_days=settings.order_days, event_days=settings.event_days),
            guests=Guests(redis),
            audit=Audit(redis, event_days=settings.event_days),
            audit_words=AuditWords(redis),
        )


async def redis_checks(settings: Settings) -> list[Check]:
    """Return what the web process would find of its Redis; raises SettingsError for an address it cannot read."""
    with readable_url():
        redis = for_web(settings.redis_url.get_secret_value())
    try:
        return await Health(redis).checks()
    finally:
        await redis.aclose()


def worker_redis(settings: Settings) -> Redis:
    return for_worker(settings.redis_url.get_secret_value())


def ledger(settings: Settings, redis: Redis) -> Ledger:
    return Ledger(
        redis,
        order_days=settings.order_days,
        fetch_lease=_fetch_lease(settings),
        sinks=settings.sinks,
    )


def budget(settings: Settings, company: Company, redis: Redis) -> Budget:
    limits = Limits(
        concurrency=settings.upstream_concurrency,
        backfill_concurrency=settings.backfill_concurrency,
        requests_per_window=settings.upstream_requests_per_5_min,
        slot_lease=_fetch_lease(settings),
    )
    return Budget(redis, company.np_api_key.get_secret_value(), company.path, limits)


def _reconcile_every(settings: Settings) -> dict[str, int]:
    return {one.slug: settings.reconcile_every for one in settings.companies if one.np_partner_id is not None}


def vital_signs(settings: Settings) -> VitalSigns:
    """Return what asks Redis how the receiver is."""
    subjects = (
        Subject(one.slug, one.np_company_id, breaker_key(one.np_api_key.get_secret_value(), one.path))
        for one in settings.companies
    )
    return VitalSigns(tuple(subjects), settings.sinks)


def http(settings: Settings) -> httpx.Client:
    return open_http(settings.upstream_timeout)


def channel_manager(settings: Settings, company: Company, client: httpx.Client) -> ChannelManager:
    return ChannelManager(client, company, settings.np_api_version, settings.np_base_url)


def _fetch_lease(settings: Settings) -> int:
    return settings.upstream_timeout * policy.SECOND + policy.LEASE_MARGIN
