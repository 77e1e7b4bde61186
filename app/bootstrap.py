"""The composition root: the only place where parts are opened and put together."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, redirect_stdout
from typing import NamedTuple

import httpx
from redis import Redis
from starlette.types import ASGIApp

from app import log, web
from app.auth import Authenticator
from app.health import Check, Health
from app.intake import Intake
from app.settings import Company, Settings
from app.spool.folder import SpoolFolder
from app.spool.recorder import Recorder
from app.spool.spool import Spool
from app.store import clockwork, connection, schema
from app.store.archive import Archive
from app.store.audit import Audit
from app.store.audit_words import AuditWords
from app.store.budget import Budget, Limits, breaker_key
from app.store.dead_letters import DeadLetters
from app.store.drops import Drops
from app.store.erasure import Erasure
from app.store.event_log import EventLog
from app.store.gauges import Metrics
from app.store.guests import Guests
from app.store.inbox import Inbox
from app.store.ledger import Ledger
from app.store.outage import readable_url, translated_errors
from app.store.plans import Plans
from app.store.pools import Pools
from app.store.reference_index import ReferenceIndex
from app.store.selection import Selector
from app.store.tally import Tally
from app.store.vitals import Subject, VitalSigns
from app.upstream.client import ChannelManager
from app.upstream.transport import open_http


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
    redis = connection.for_web(settings.redis_url.get_secret_value())
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

    return web.application(
        webhook_path=settings.webhook_path,
        webhook=web.Webhook(
            Intake(Authenticator(settings.companies), recorder or inbox, tally), tally, settings.max_body_bytes
        ),
        probes=web.Probes(
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
        schema.refuse_newer(redis)
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
        redis = connection.for_web(settings.redis_url.get_secret_value())
    try:
        return await Health(redis).checks()
    finally:
        await redis.aclose()


def worker_redis(settings: Settings) -> Redis:
    return connection.for_worker(settings.redis_url.get_secret_value())


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
    return settings.upstream_timeout * clockwork.SECOND + clockwork.LEASE_MARGIN
