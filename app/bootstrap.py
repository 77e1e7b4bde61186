"""The composition root: the only place where parts are opened and put together."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TextIO

from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app import log
from app.deployment import Deployment, refuse_undeclared
from app.erased_file import ErasedFile
from app.erasure import Erasure
from app.errors import SettingsError
from app.health import Check, Health
from app.heartbeat import Configuration, DeclaredCompany
from app.intake.auth import Authenticator
from app.intake.recorder import Inbox
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.rate_limit import Limits, RateLimiter, breaker_id, key_id
from app.ledger.redis import WORKER_TIMEOUT, AsyncRedis, Redis, client_of, for_worker, log_outage
from app.metrics import CounterBuffer, Metrics
from app.operations import Operations
from app.reconcile.run import OrderList
from app.replay import Plans
from app.setting_values import is_loopback
from app.settings import Company, Settings
from app.snapshot import SnapshotReader
from app.traces import OFF, ExportingTracer, Tracer
from app.upstream.client import ChannelManager
from app.upstream.transport import DeadlineTransport

if TYPE_CHECKING:
    from starlette.types import ASGIApp

WEB_TIMEOUT = 1.0
"""Seconds; a sender waits for the answer."""


def for_web(url: str, prefix: str) -> AsyncRedis:
    """Return the client of the web process; one try, then the caller decides."""
    return client_of(AsyncRedis, url, prefix, socket_timeout=WEB_TIMEOUT, socket_connect_timeout=WEB_TIMEOUT)


def for_rq(settings: Settings) -> Redis:
    """Return the client that RQ's worker blocks on. RQ sets its socket_timeout, so it is not shared."""
    url = settings.redis_url.get_secret_value()
    return client_of(Redis, url, settings.key_prefix, socket_connect_timeout=WORKER_TIMEOUT)


def web_app(settings: Settings) -> ASGIApp:
    """Return the web process's app; Redis is first asked when the app starts, which does not wait for the answer.

    Raises SettingsError for a SPOOL_DIR that is not ours alone, and as `tracer` does.
    """
    # Here, not above: the pool of workers does without a web framework and SQLite.
    from app.intake.failover import Failover
    from app.intake.service import Intake
    from app.intake.spool import Spool
    from app.web.app import Probes, application
    from app.web.webhook import Webhook

    redis = for_web(settings.redis_url.get_secret_value(), settings.key_prefix)
    spans = tracer(settings)
    inbox = Inbox(redis, dedup_days=settings.dedup_days, event_days=settings.event_days, tracer=spans)
    counters = CounterBuffer(redis)
    spool = Spool(settings.spool_dir, settings.spool_max_mb * 1024 * 1024) if settings.spool_dir else None
    failover = Failover(inbox, spool, counters.count) if spool else None

    @asynccontextmanager
    async def resources() -> AsyncIterator[None]:
        first = failover.run() if failover else _report_outage(inbox)
        tasks = [asyncio.create_task(counters.run()), asyncio.create_task(first)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await counters.flush()
            if spool and failover:
                await failover.rescue()
                await spool.close()
            await redis.aclose()
            if spans:
                await asyncio.to_thread(spans.close)

    reader = SnapshotReader(settings.companies)
    metrics = Metrics(redis, reader, settings.companies, spool.state if spool else None, settings.reconcile_every)
    ops_token = settings.ops_token.get_secret_value() if settings.ops_token else None
    intake = Intake(Authenticator(settings.companies), failover or inbox, counters.count, settings.max_items)
    return application(
        webhook_path=settings.webhook_path,
        webhook=Webhook(intake, settings.max_body_bytes),
        probes=Probes(Health(inbox.probe, redis, spool), metrics.text, ops_token),
        count=counters.count_request,
        trusted_proxies=settings.trusted_proxies,
        resources=resources,
        tracer=spans,
    )


async def _report_outage(inbox: Inbox) -> None:
    """Log once if Redis takes no events at the start: web starts all the same, and waits for it."""
    try:
        await inbox.probe()
    except Exception as error:
        refusal = inbox.refusal(error)
        log_outage("web", refusal.error, refusal.cause)


def api_app(settings: Settings) -> ASGIApp:
    """Return the API's app; it starts without Redis, as web does."""
    # Here, as in web_app.
    from app.api.app import application
    from app.api.orders import Orders
    from app.web.requests import Proxies

    redis = _for_readers(settings)
    return application(
        redis,
        Orders(redis, settings.companies, ErasedFile(settings.erased_file)),
        requests_per_min=settings.api_requests_per_min,
        proxies=Proxies(settings.trusted_proxies),
        webhook_path=settings.webhook_path,
    )


def ops_app(settings: Settings) -> ASGIApp:
    """Return the app of the ops page; it starts without Redis, as web does. Raises SettingsError without OPS_TOKEN."""
    # Here, as in web_app.
    from app.ops.access import Access
    from app.ops.app import application
    from app.ops.feeder import Feeder
    from app.ops.lists import Lists
    from app.ops.order import OrderScreens
    from app.ops.overview import FirstScreen
    from app.ops.pages import Pages
    from app.ops.plans import PlanPages
    from app.ops.runbook import Runbook
    from app.ops.search import SearchScreen

    if settings.ops_token is None:
        raise SettingsError("OPS_TOKEN: missing; it is the password of the ops page")
    act_token = settings.ops_act_token.get_secret_value() if settings.ops_act_token else None
    redis, pages = _for_readers(settings), Pages()
    feeder = Feeder(partial(worker_redis, settings), event_days=settings.event_days) if act_token else None
    screens = [
        *FirstScreen(pages).screens(),
        *SearchScreen(pages).screens(),
        *OrderScreens(pages, partial(operations, settings, redis)).screens(),
        *Lists(pages).screens(),
        *PlanPages(pages).screens(),
        *Runbook(pages).screens(),
    ]
    access = Access(settings.ops_token.get_secret_value(), act_token)
    return application(redis, settings, pages, screens, access, feeder)


def operations(settings: Settings, redis: Redis, who: str, why: str) -> Operations:
    """Return what one person does to orders by hand, and why."""
    return Operations(ledger(settings, redis), Plans(redis, event_days=settings.event_days), who=who, why=why)


def _for_readers(settings: Settings) -> Redis:
    """Return the client of a process that answers readers: after a restart of Redis each connection fails once."""
    timeouts = {"socket_timeout": WEB_TIMEOUT, "socket_connect_timeout": WEB_TIMEOUT, "retry": Retry(NoBackoff(), 1)}
    return client_of(Redis, settings.redis_url.get_secret_value(), settings.key_prefix, **timeouts)


def tracer(settings: Settings) -> ExportingTracer | None:
    """Return what makes spans, None without OTEL_EXPORTER_OTLP_ENDPOINT.

    Raises SettingsError without the extra `traces`, and for a wrong variable of OpenTelemetry.
    """
    return ExportingTracer(settings.otel) if settings.otel_exporter_otlp_endpoint else None


def configure_log(settings: Settings, out: TextIO | None = None) -> None:
    """Send log lines to `out` (stdout) as the settings say."""
    log.configure(settings.log_level, settings.log_format, out)


def configure_cli_log() -> None:
    """Send only warnings, and to stderr: stdout is for what the command prints."""
    log.configure("WARNING", "console", sys.stderr)


async def redis_checks(settings: Settings) -> list[Check]:
    """Return what the web process would find of its Redis."""
    async with for_web(settings.redis_url.get_secret_value(), settings.key_prefix) as redis:
        inbox = Inbox(redis, dedup_days=settings.dedup_days, event_days=settings.event_days)
        return await Health(inbox.probe, redis).checks()


def worker_redis(settings: Settings) -> Redis:
    return for_worker(settings.redis_url.get_secret_value(), settings.key_prefix)


def configuration(settings: Settings) -> Configuration:
    """Return what a pool with these settings declares."""
    companies = {}
    for one in settings.companies:
        api_key = one.np_api_key.get_secret_value()
        declared = DeclaredCompany(one.slug, one.path, breaker_id(api_key, one.path), key=key_id(api_key))
        companies[one.np_company_id] = declared
    return Configuration(companies, sink_names(settings), f"{settings.np_base_url} {settings.np_api_version}")


def sink_names(settings: Settings) -> tuple[str, ...]:
    return tuple(one.name for one in settings.declared_sinks)


def refuse_other_deployment(settings: Settings) -> None:
    """Raise OtherDeployment if another deployment uses this Redis; web starts without an answer of Redis."""
    url = settings.redis_url.get_secret_value()
    timeouts = {"socket_timeout": WEB_TIMEOUT, "socket_connect_timeout": WEB_TIMEOUT}
    with suppress(RedisError), client_of(Redis, url, settings.key_prefix, **timeouts) as redis:
        refuse_undeclared(configuration(settings), Deployment(redis).companies())


def ledger(settings: Settings, redis: Redis, sinks: Sequence[str] = ()) -> Ledger:
    """Return the ledger; `sinks`: those that a process of the pool declares."""
    return Ledger(
        redis,
        order_days=settings.order_days,
        revisions_kept=settings.revisions_kept,
        fetch_lease=_fetch_lease(settings),
        sinks=sinks,
    )


def erasure(settings: Settings, redis: Redis) -> Erasure:
    return Erasure(redis, order_days=settings.order_days, file=ErasedFile(settings.erased_file))


def rate_limiter(settings: Settings, company: Company, redis: Redis, route: str = "") -> RateLimiter:
    limits = Limits(
        concurrency=settings.upstream_concurrency,
        backfill_concurrency=settings.backfill_concurrency,
        requests_per_window=settings.upstream_requests_per_5_min,
        permit_lease=_fetch_lease(settings),
    )
    api_key = company.np_api_key.get_secret_value()
    return RateLimiter(redis, api_key, company.path, limits, slug=company.slug, route=route)


def http(settings: Settings) -> DeadlineTransport:
    """Return the connections to upstream; raises SettingsError for an SSL_CERT_FILE without a certificate."""
    proxy = None if is_loopback(settings.np_base_url) else settings.np_proxy
    return DeadlineTransport(settings.upstream_timeout, proxy=proxy)


def channel_manager(
    settings: Settings, company: Company, http: DeadlineTransport, tracer: Tracer = OFF
) -> ChannelManager:
    return ChannelManager(http, company, settings.np_api_version, settings.np_base_url, tracer)


def order_list(settings: Settings, company: Company, redis: Redis, http: DeadlineTransport) -> OrderList:
    """Return the order list of a company, read within the limits of its API key."""
    client = channel_manager(settings, company, http)
    limiter = rate_limiter(settings, company, redis, "list_orders")
    erased = ErasedFile(settings.erased_file)
    return OrderList(redis, company.np_company_id, client, limiter, order_days=settings.order_days, erased=erased)


def _fetch_lease(settings: Settings) -> int:
    return settings.upstream_timeout * policy.SECOND + policy.LEASE_MARGIN
