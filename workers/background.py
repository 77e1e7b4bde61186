"""What a pool does beside fetching: reads the order lists that are due, checks the subscriptions, evaluates the alerts.

Upstream is called by child processes, since a hanging call must not stop the dispatcher, and not by RQ jobs, since
workers run `fetch_order` only. A child ends after each run and may be killed at any instruction.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.context import ForkProcess
from typing import Final

from redis.exceptions import RedisError
from structlog.contextvars import clear_contextvars

from app import bootstrap, log
from app.alerts import AlertStore, Change, conditions, evaluate, runbook
from app.deployment import Deployment
from app.errors import Denied, StoreUnavailable
from app.ledger import policy
from app.ledger.orders import Archive
from app.ledger.redis import Redis, server_time
from app.metrics import add, record_whole_list
from app.reconcile.run import BUSY, LONGEST, Reconcile, Report
from app.reconcile.state import AGAIN_AFTER, DueRun, Schedule
from app.settings import Company, Settings
from app.snapshot import Snapshot, SnapshotReader
from app.subscriptions import ACTIVE, SubscriptionMemory, SubscriptionWatch, log_status
from app.upstream.transport import DeadlineTransport
from workers.worker import fork

BUSY_WAIT: Final = 30 * policy.SECOND
"""Until the next call after the API key had no room for one."""

FAILED_WAIT: Final = 5 * policy.MINUTE
"""Until the next run after upstream failed, or RECONCILE_EVERY if that is less."""

DOWN_WAIT: Final = policy.MINUTE
"""Between two checks of a subscription that does not work: its alert ends soon after the repair."""

STOP_SECONDS: Final = 2.0
"""How long a stopping pool waits for a child; what is not done is due again."""

_log = log.get()


class Child:
    """At most one child process at a time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: ForkProcess | None = None

    def is_alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def start(self, run: Callable[[], None]) -> None:
        self._process = fork(self._name, run)

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.terminate()
            self._process.join(STOP_SECONDS)
            self._process.kill()
            self._process.join()


class ReconcileRunner:
    """Starts its child when the order list of a company is due."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self.child = Child("reconcile")
        self._settings = settings
        self._redis = redis
        self._schedules = [_schedule(settings, company, redis) for company in _reconciled(settings)]

    def tick(self) -> None:
        """Start the child if a list is due; raises what Redis raises."""
        if self.child.is_alive():
            return
        if any(schedule.due(server_time(self._redis)) for schedule in self._schedules):
            self.child.start(partial(_run_due, self._settings))


class SubscriptionRunner:
    """Starts its child when the subscriptions of companies are to be checked, which one pool of all does at a time."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self.child = Child("subscriptions")
        self._settings = settings
        self._memories = {one.slug: SubscriptionMemory(redis, one.np_company_id) for one in settings.companies}
        self._is_off = settings.subscription_check_every == 0

    def tick(self) -> None:
        """Start the child if a subscription is to be checked; raises what Redis raises."""
        if self._is_off:
            for memory in self._memories.values():
                memory.forget()
            self._memories = {}
        if self.child.is_alive():
            return
        every = self._settings.subscription_check_every * policy.SECOND
        due = {slug for slug, memory in self._memories.items() if memory.acquire_turn(every)}
        if companies := [one for one in self._settings.companies if one.slug in due]:
            self.child.start(partial(_check_subscriptions, self._settings, companies))


class AlertEvaluator:
    """Evaluates the alerts every 20 s, in one of all pools, and logs each change."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self._reader = SnapshotReader(settings.companies)
        self._deployment = Deployment(redis)
        self._store = AlertStore(redis)
        self._feed_ack_alert = settings.feed_ack_alert
        self._redis = redis

    def tick(self) -> None:
        """Evaluate the alerts if no pool has done so of late; raises what Redis raises."""
        if not self._store.acquire_turn():
            return
        try:
            snapshot = self._reader.read(self._redis)
            log_alerts(self._store, snapshot, self._feed_ack_alert)
            if retired := self._deployment.retire(snapshot.running_pools()):
                _log.warning("deployment.retired", what=retired)
        except (RedisError, OSError):
            raise
        except Exception as error:
            # Redis holds what we cannot read; fetching goes on.
            _log.error("alert.failed", error=type(error).__name__, trace=log.trace_of(error))


def log_alerts(store: AlertStore, snapshot: Snapshot, feed_ack_alert: int) -> list[Change]:
    """Log what has changed since the last evaluation, then save the new states; return the changes.

    `feed_ack_alert`: FEED_ACK_ALERT in seconds.

    A pool that is killed in between repeats an alert and swallows none.
    """
    hours = {company_id: store.hours(company_id, snapshot.now) for company_id in snapshot.companies}
    found = conditions(snapshot, hours, feed_ack_alert)
    states, changes = evaluate(found, snapshot.alert_states(), snapshot.now)
    for change in changes:
        _log_change(change, snapshot.now)
    store.save(states)
    return changes


def _log_change(change: Change, now: int) -> None:
    found = change.condition
    about = {"name": found.name, "company": found.company or None, "sink": found.sink or None}
    if change.action == "resolved":
        _log.info("alert.resolved", lasted_s=round((now - change.since) / 1000), **about)
    elif found.name == "silence":
        _log.warning(
            "alert.silence",
            company=found.company,
            reason=found.reason,
            quiet_s=found.figure,
            usual=None if found.usual is None else round(found.usual),
            runbook=runbook(found.name),
        )
    else:
        reason, section = found.reason or None, runbook(found.name)
        _log.error("alert.firing", figure=found.figure, reason=reason, runbook=section, **about)


def _reconciled(settings: Settings) -> list[Company]:
    """Return the companies whose orders can be listed."""
    return [company for company in settings.companies if company.np_partner_id is not None]


def _schedule(settings: Settings, company: Company, redis: Redis) -> Schedule:
    """Return the schedule of a company; its lease outlasts the longest run and the page that it began last."""
    last_page = settings.upstream_timeout * policy.SECOND + policy.LEASE_MARGIN
    every = settings.reconcile_every * policy.SECOND
    return Schedule(redis, company.np_company_id, LONGEST + last_page, every)


def _run_due(settings: Settings) -> None:
    """Read the list of each company that is due, one after the other."""
    # A stop raises SystemExit, so the lease and the permit are released and the next pool need not wait for them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with bootstrap.worker_redis(settings) as redis, bootstrap.http(settings) as http:
        for company in _reconciled(settings):
            clear_contextvars()  # each run binds an id of its own
            try:
                _run_if_due(settings, company, redis, http)
            except (RedisError, StoreUnavailable):
                _log.warning("reconcile.failed", company=company.slug, reason="redis_unavailable")
            except Exception as error:
                # One company's rows must not stop the others.
                kind, trace = type(error).__name__, log.trace_of(error)
                _log.error("reconcile.failed", company=company.slug, reason="internal_error", error=kind, trace=trace)


def _run_if_due(settings: Settings, company: Company, redis: Redis, http: DeadlineTransport) -> None:
    """Read the list of a company unless another machine does so; raises what Redis raises."""
    schedule = _schedule(settings, company, redis)
    with schedule.acquire(server_time(redis)) as due:
        if due is None:
            return
        started = time.monotonic()
        report = _reconcile(settings, company, redis, http)
        duration_ms = round((time.monotonic() - started) * 1000)
        now = server_time(redis)
        wait = _schedule_next(schedule, due, report, settings.reconcile_every * policy.SECOND, now)
        counts: dict[tuple[str, ...], int] = {("reconciles", company.np_company_id, report.outcome): 1}
        for kind, times in report.discrepancies.items():
            counts["discrepancies", company.np_company_id, kind] = times
        add(redis, counts)
        if report.outcome == "complete":
            record_whole_list(redis, company.np_company_id, now)
        _log_end(company.slug, due, report, duration_ms, wait)


def _reconcile(settings: Settings, company: Company, redis: Redis, http: DeadlineTransport) -> Report:
    api_key = company.np_api_key.get_secret_value()
    same_key = (one for one in _reconciled(settings) if one.np_api_key.get_secret_value() == api_key)
    return Reconcile(
        company.slug,
        bootstrap.order_list(settings, company, redis, http),
        bootstrap.ledger(settings, redis),
        Archive(redis),
        per_minute=settings.upstream_requests_per_5_min / 5,
        company_ids=frozenset(one.np_company_id for one in same_key),
        queue="backfill",
    ).run()


def _schedule_next(schedule: Schedule, due: DueRun, report: Report, every: int, now: int) -> int:
    """Record when the next run is due and return the ms until then."""
    if report.outcome == "complete":
        schedule.complete(due, now + every)
        return every
    error = report.error
    if error is None:
        schedule.postpone(now + AGAIN_AFTER)
        return AGAIN_AFTER
    if error.reason in BUSY or error.http_status == 429:
        wait = BUSY_WAIT
    else:
        wait = every if error.reason == "breaker_open" else min(every, FAILED_WAIT)
    schedule.retry(now + wait)
    return wait


def _log_end(slug: str, due: DueRun, report: Report, duration_ms: int, wait: int) -> None:
    common = {"company": slug, "cause": due.cause, "pages": report.pages, "queued": report.queued}
    common["next_in_s"] = wait // 1000
    if (error := report.error) is not None:
        _log.error("reconcile.failed", reason=error.reason, http_status=error.http_status, **common)
        return
    _log.info(
        "reconcile.finished",
        outcome=report.outcome,
        rows=report.rows,
        unreadable=report.unreadable,
        duration_ms=duration_ms,
        **{kind: report.discrepancies[kind] for kind in ("no_event", "changed", "stuck", "unscheduled")},
        dead=report.discrepancies["dead"] + report.dead,
        for_good=report.for_good,
        **common,
    )


def _check_subscriptions(settings: Settings, companies: Sequence[Company]) -> None:
    """Check the subscription of each company, one after the other."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as in `_run_due`
    with bootstrap.worker_redis(settings) as redis, bootstrap.http(settings) as http:
        for company in companies:
            try:
                check_subscription(settings, company, redis, http)
            except (RedisError, StoreUnavailable):
                _log.warning("subscription.check_failed", company=company.slug, reason="redis_unavailable")
            except Exception as error:
                # One company's subscriptions must not stop the others.
                kind, trace = type(error).__name__, log.trace_of(error)
                _log.error(
                    "subscription.check_failed", company=company.slug, reason="internal_error", error=kind, trace=trace
                )


def check_subscription(settings: Settings, company: Company, redis: Redis, http: DeadlineTransport) -> None:
    """Check the subscription of a company and record how it is; raises what Redis raises.

    It waits for a permit of backfill, and the next check comes soon if there is none: orders go first.
    """
    memory = SubscriptionMemory(redis, company.np_company_id)
    client = bootstrap.channel_manager(settings, company, http)
    watch = SubscriptionWatch(company, client, settings.webhook_path, settings.webhook_url)
    try:
        with bootstrap.rate_limiter(settings, company, redis, "subscriptions").permit("backfill") as permit:
            found = watch.check(permit)
    except Denied:
        memory.check_in(BUSY_WAIT)
        return
    if memory.record(found):
        log_status(found)
    if memory.state() not in {"", ACTIVE}:
        memory.check_in(min(DOWN_WAIT, settings.subscription_check_every * policy.SECOND))
