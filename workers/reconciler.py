"""Reconciling by itself: the pool looks each second whose list is due, and a child of its own reads it.

A process of its own, since a hanging upstream must not stop the pool's tick, and no RQ job, since workers run
`fetch_order` and nothing else. Between two runs there is none. It may be killed at any instruction.
"""

from __future__ import annotations

import signal
import sys
import time
from multiprocessing.context import ForkProcess
from typing import Final

from redis import Redis

from app import bootstrap, log
from app.errors import UpstreamError
from app.reconcile.survey import Survey
from app.settings import Company, Settings
from app.store import clockwork, counters
from app.store.backlog import Backlog
from app.store.cursor import Cursor
from app.store.holdings import Holdings
from app.store.outage import StoreUnavailable, translated_errors
from app.store.turns import AGAIN_AFTER, Turn, Turns
from app.upstream.client import ChannelManager
from workers import child
from workers.listing import BUSY, Listing
from workers.reconcile import LONGEST, Outcome, Reconcile, Report, Share
from workers.stopwatch import Stopwatch

BUSY_WAIT: Final = 30 * clockwork.SECOND
FAILED_WAIT: Final = 5 * clockwork.MINUTE
"""Until the list is asked for again after upstream failed, or RECONCILE_EVERY if that is less."""

STOP_SECONDS: Final = 2.0

_log = log.get()


class Reconciler:
    """The pool's side: starts a child when a company is due, and has at most one."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self._settings = settings
        self._turns = [turns(settings, company, redis) for company in reconciled(settings)]
        self._child: ForkProcess | None = None

    def tick(self) -> None:
        """Start a child if one is needed; raises what Redis raises."""
        if self._child is not None and not self._child.is_alive():
            # One that failed has logged why; what it did not finish is due again by itself.
            self._child.close()
            self._child = None
        if self._child is None and any(one.due(bootstrap.clock()) for one in self._turns):
            self._child = child.start(_work, self._settings, "reconcile", "reconcile", Stopwatch())

    def stop(self) -> None:
        """End the child, if there is one; what it has not done is left to the next."""
        if self._child is None:
            return
        self._child.terminate()
        self._child.join(STOP_SECONDS)
        if self._child.is_alive():
            self._child.kill()
            self._child.join()
        self._child.close()
        self._child = None


def reconciled(settings: Settings) -> list[Company]:
    """Return the companies whose orders can be listed."""
    return [company for company in settings.companies if company.np_partner_id is not None]


def turns(settings: Settings, company: Company, redis: Redis) -> Turns:
    """Return the times of a company; its lease outlasts the longest run and the page that it began last."""
    last_page = settings.upstream_timeout * clockwork.SECOND + clockwork.LEASE_MARGIN
    return Turns(redis, company.np_company_id, LONGEST + last_page)


def listing(settings: Settings, company: Company, redis: Redis, client: ChannelManager) -> Listing:
    """Return the list of a company, through the budget of its key."""
    return Listing(client, bootstrap.budget(settings, company, redis), company.slug, bootstrap.clock, time.sleep)


def of_company(settings: Settings, company: Company, redis: Redis, client: ChannelManager) -> Reconcile:
    """Return the run of a company, put together."""
    same_key = {
        one.np_company_id
        for one in reconciled(settings)
        if one.np_api_key.get_secret_value() == company.np_api_key.get_secret_value()
    }
    return Reconcile(
        slug=company.slug,
        listing=listing(settings, company, redis, client),
        survey=Survey(Holdings(redis), company.np_company_id, settings.order_days),
        cursor=Cursor(redis, company.np_company_id),
        backlog=Backlog(redis),
        ledger=bootstrap.ledger(settings, redis),
        share=Share(settings.upstream_requests_per_5_min / 5, frozenset(same_key)),
        # Where no worker of ours looks at backfill, what is missing would wait there for ever.
        lane="backfill" if settings.backfill_workers else "live",
        clock=bootstrap.clock,
    )


def _work(settings: Settings, name: str, lane: str, watch: Stopwatch) -> None:
    """Run each company that is due, one after the other, then end."""
    # A stop unwinds: the lease and the slot are given back, and the next pool need not wait for them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    redis = bootstrap.worker_redis(settings)
    try:
        for company in reconciled(settings):
            try:
                run_if_due(settings, company, redis)
            except StoreUnavailable:
                _log.warning("reconcile.failed", company=company.slug, reason="redis_away")
            except Exception as error:
                # A fault of ours with one company's rows costs the others nothing.
                kind, trace = type(error).__name__, log.trace_of(error)
                _log.error("reconcile.failed", company=company.slug, reason="internal_error", error=kind, trace=trace)
    finally:
        redis.close()


def run_if_due(settings: Settings, company: Company, redis: Redis) -> Outcome | None:
    """Read the list of a company if it is due and nobody else does; return how it ended, None if it was not run.

    Raises StoreUnavailable.
    """
    with (
        translated_errors(settings.redis_url.get_secret_value()),
        turns(settings, company, redis).taken(bootstrap.clock()) as turn,
    ):
        if turn is None:
            return None
        started = time.monotonic()
        with bootstrap.http(settings) as http:
            report = of_company(settings, company, redis, bootstrap.channel_manager(settings, company, http)).run()
        _end(settings, company, redis, turn, report, round((time.monotonic() - started) * 1000))
        return report.outcome


def _end(settings: Settings, company: Company, redis: Redis, turn: Turn, report: Report, duration_ms: int) -> None:
    """Say when the next run is due, count, and log."""
    every = settings.reconcile_every * clockwork.SECOND
    now = bootstrap.clock()
    times = turns(settings, company, redis)
    if report.outcome == "complete":
        wait = every
        times.complete(turn, now + wait)
    elif report.error is None:
        wait = AGAIN_AFTER
        times.postpone(now + wait)
    else:
        wait = _after(report.error, every)
        times.again(now + wait)
    _count(redis, company, report, now)
    common = {"company": company.slug, "cause": turn.cause, "pages": report.pages, "queued": report.queued}
    if report.error is not None:
        error = report.error
        _log.error(
            "reconcile.failed", reason=error.reason, http_status=error.http_status, next_in_s=wait // 1000, **common
        )
        return
    _log.info(
        "reconcile.ran",
        outcome=report.outcome,
        rows=report.rows,
        unreadable=report.unreadable,
        never_heard=report.gaps["never_heard"],
        changed=report.gaps["changed"],
        stuck=report.gaps["stuck"],
        duration_ms=duration_ms,
        next_in_s=wait // 1000,
        **common,
    )


def _after(error: UpstreamError, every: int) -> int:
    if error.reason in BUSY or error.http_status == 429:
        return BUSY_WAIT
    return every if error.reason == "breaker_open" else min(every, FAILED_WAIT)


def _count(redis: Redis, company: Company, report: Report, now: int) -> None:
    company_id = company.np_company_id
    counts: dict[tuple[str, ...], int] = {("reconciles", company_id, report.outcome): 1}
    counts |= {("gaps", company_id, kind): times for kind, times in report.gaps.items()}
    counters.add(redis, counts)
    if report.outcome == "complete":
        counters.mark(redis, ("reconciled", company_id), now)
