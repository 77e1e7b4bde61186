"""Reconciling by itself: the pool looks each second whose list is due, and a child of its own reads it.

A process of its own, since a hanging upstream must not stop the pool's tick, and no RQ job, since workers run
`fetch_order` and nothing else. Between two runs there is none. It may be killed at any instruction.

Looks at the alerts once a minute, in one pool of all, and tells of each in the log.
"""

from __future__ import annotations

import signal
import sys
import time
from functools import partial
from multiprocessing.context import ForkProcess
from typing import Final

from redis import Redis
from redis.exceptions import RedisError

from app import bootstrap, log
from app.alerts import Change, Seen, Watch, judge, read
from app.errors import StoreUnavailable, UpstreamError
from app.ledger import policy
from app.ledger.orders import Backlog, Holdings
from app.ledger.redis import server_time, translated_errors
from app.metrics import add, mark
from app.reconcile.compare import Survey
from app.reconcile.run import BUSY, LONGEST, Listing, Outcome, Reconcile, Report, Share
from app.reconcile.state import AGAIN_AFTER, Cursor, Turn, Turns
from app.settings import Company, Settings
from app.snapshot import Vitals, VitalSigns
from app.upstream.client import ChannelManager
from workers.worker import Stopwatch, start

BUSY_WAIT: Final = 30 * policy.SECOND
FAILED_WAIT: Final = 5 * policy.MINUTE
"""Until the list is asked for again after upstream failed, or RECONCILE_EVERY if that is less."""

STOP_SECONDS: Final = 2.0

_log = log.get()


class Reconciler:
    """The pool's side: starts a child when a company is due, and has at most one."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self._settings = settings
        self._redis = redis
        self._turns = [turns(settings, company, redis) for company in reconciled(settings)]
        self._child: ForkProcess | None = None

    def tick(self) -> None:
        """Start a child if one is needed; raises what Redis raises."""
        if self._child is not None and not self._child.is_alive():
            # One that failed has logged why; what it did not finish is due again by itself.
            self._child.close()
            self._child = None
        if self._child is None and self._is_due():
            self._child = start(_work, self._settings, "reconcile", "reconcile", Stopwatch())

    def _is_due(self) -> bool:
        now = server_time(self._redis)
        return any(one.due(now) for one in self._turns)

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
    last_page = settings.upstream_timeout * policy.SECOND + policy.LEASE_MARGIN
    return Turns(redis, company.np_company_id, LONGEST + last_page)


def listing(settings: Settings, company: Company, redis: Redis, client: ChannelManager) -> Listing:
    """Return the list of a company, through the budget of its key."""
    return Listing(
        client, bootstrap.rate_limiter(settings, company, redis), company.slug, partial(server_time, redis), time.sleep
    )


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
        clock=partial(server_time, redis),
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
        turns(settings, company, redis).taken(server_time(redis)) as turn,
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
    every = settings.reconcile_every * policy.SECOND
    now = server_time(redis)
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
        "reconcile.finished",
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
    add(redis, counts)
    if report.outcome == "complete":
        mark(redis, ("reconciled", company_id), now)


EVERY: Final = 5.0
"""Seconds between two questions whether it is our minute: a pool that dies is followed so soon."""

RUNBOOK: Final = "docs/operations.md#"


class Watchman:
    """Part of each pool; `tick` is called each second. Told before it is kept: killed in between, it is told twice."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self._signs = bootstrap.vital_signs(settings)
        self._watch = Watch(redis)
        self._redis = redis
        self._next = 0.0

    def tick(self) -> None:
        """Look if it is time; raises what Redis raises."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        if not self._watch.take_turn():
            return
        try:
            evaluate(self._watch, self._signs, self._signs.read(self._redis))
        except (RedisError, OSError):
            raise
        except Exception as error:
            # Whatever stands there that we cannot read: orders are fetched all the same.
            _log.error("alert.failed", error=type(error).__name__, trace=log.trace_of(error))


def evaluate(watch: Watch, vital_signs: VitalSigns, vitals: Vitals) -> list[Change]:
    """Compare what is seen with what is known, tell of the changes, and keep what is known from now on."""
    states = watch.states()
    seen = Seen(
        vitals,
        watch.totals(),
        {one.company_id: watch.hours(one.company_id, vitals.now) for one in vital_signs.subjects},
        states,
    )
    after, changes = judge(read(seen, vital_signs.subjects), states, vitals.now)
    for change in changes:
        _tell(change, vitals.now)
    watch.save(after)
    return changes


def _tell(change: Change, now: int) -> None:
    sign = change.sign
    about = {"name": sign.name, "company": sign.company or None, "sink": sign.sink or None}
    runbook = f"{RUNBOOK}{sign.name.replace('_', '-')}"
    if change.what == "cleared":
        _log.info("alert.resolved", lasted_s=round((now - change.since) / 1000), **about)
    elif sign.name == "silence":
        _log.warning(
            "alert.silence",
            company=sign.company,
            reason=sign.reason,
            quiet_s=sign.figure,
            usual=None if sign.usual is None else round(sign.usual),
            runbook=runbook,
        )
    else:
        _log.error("alert.firing", figure=sign.figure, runbook=runbook, **about)
