"""The commands about the whole service: `status` (backlog and its expected end) and `audit` (who changed what)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import islice
from statistics import mean
from typing import Annotated, Final

import msgspec
import typer

from app import times
from app.alerts import SURE, Key, runbook
from app.audit import Action, AuditEntry, newest_first
from app.cli import console, context
from app.cli.command import DONE, FOUND, command, commands
from app.cli.context import CommandContext, open_context
from app.deployment import differences
from app.ids import OrderKey, guid
from app.intake.spool_file import waiting
from app.ledger.history import FetchStored
from app.ledger.orders import OrderQuery
from app.ledger.policy import JOB_TIMEOUT
from app.ledger.rate_limit import spent
from app.ledger.record import OrderRecord
from app.ledger.rq_jobs import BACKFILL, LIVE, RESUME
from app.replay import GET_ORDER
from app.snapshot import AlertState, ConsumerSnapshot, SinkSnapshot, Snapshot, SnapshotReader

_CODES: Final = {
    DONE: "nothing needs a look",
    FOUND: "an alert is active, a breaker is open, a sink fails or is disabled, no worker pool runs, RQ is suspended,"
    " or orders have no due time or no pool",
}
_FIVE_MINUTES: Final = 300
_LATEST: Final = 20
"""Orders whose getOrders give the average duration."""

_LOOKED_AT: Final = 200
"""Orders, the latest changes first, of which `status` looks whether their outstanding work has a due time."""

_LONG: Final = 10
"""Seconds from which a delivery that runs is shown: its sink may hang."""

cli = commands()


class QueueStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs that wait in one queue; the first has waited `waited_s`.

    `rate`: fetches a second that the workers and the limits of the API keys allow now, 0 while none may be used.
    `done_s`: until the queue is empty if no event arrives, None if nothing is fetched.
    """

    queue: str
    jobs: int
    waited_s: int
    workers: int
    rate: float
    done_s: int | None


@command(cli, "ota-receiver status", codes=_CODES)
def status() -> None:
    """Show the backlog and its expected end, failures, worker pools and alerts."""
    with open_context() as here:
        snapshot = SnapshotReader(here.settings.companies).read(here.redis)
        companies, spool, now = snapshot.companies, here.settings.spool_dir, times.from_ms(snapshot.now)
        breakers, throttled = snapshot.open_breakers(), snapshot.throttled()
        records = list(islice(here.orders.newest_first(OrderQuery(), here.now()), _LOOKED_AT))
        latest = [one.key for one in records]
        get_order = _get_order_seconds(here, latest[:_LATEST])
        suspended = snapshot.suspended
        queues = _queues(here, snapshot, get_order)
        unscheduled = len(here.orders.unscheduled(latest))
    slow_sink, longest = _longest_delivery(records, now)
    alerts = [one for one in snapshot.alert_states().items() if one[1].firing_at]
    pools = len(snapshot.running_pools())
    differing = differences(snapshot.running_pools())
    undeclared = tuple(company or sink for company, sink in snapshot.undeclared())
    oldest = {one.slug: one.oldest_pending_ms // 1000 for one in companies.values()}
    oldest |= {company_id: age // 1000 for company_id, age in snapshot.elsewhere.items()}
    spooled = waiting(spool) if spool else None
    unknown = "unknown: see `ota-receiver check`" if spool else None
    until = [*throttled.values(), *(one.probe_at for one in breakers.values())]
    # With one company that may be called, nothing as a whole is paused.
    pause = "" if suspended or not until or not pools else f" until {times.short(min(until))}"
    found = {
        "alerts": [_alert_fields(*one) for one in alerts],
        "pools": pools,
        "pools_differ": differing,
        "undeclared": undeclared,
        "queues": queues,
        "suspended": suspended,
        "due": snapshot.due,
        "unscheduled": unscheduled,
        "oldest_pending_s": oldest,
        "get_order_s": round(get_order, 3),
        "longest_delivery_s": longest,
        "longest_delivery_sink": slow_sink,
        "dead_letters": snapshot.dead,
        "dead_deliveries": snapshot.dead_deliveries,
        "breakers": [{"company": slug} | msgspec.structs.asdict(one) for slug, one in breakers.items()],
        "sinks": [_sink_fields(*one, snapshot.now) for one in snapshot.sinks.items()],
        "feed": [_consumer_fields(*one, snapshot.now) for one in snapshot.consumers.items()],
        "throttled_until": throttled,
        "spooled": spooled,
    }
    facts = {
        "alerts": [_alert(*one, snapshot.now) for one in alerts] or "none",
        "worker pools running": pools or "0: nothing is fetched or delivered; start `ota-receiver worker`",
        "pools that differ": tuple(f"{name}: {', '.join(words)}" for name, words in differing.items())
        + (("a rolling change, if it ends within 10 minutes",) if differing else ()),
        "no pool declares": undeclared,
        "RQ": f"suspended: nothing is fetched or delivered. To go on: {RESUME}" if suspended else None,
        **{f"{one.queue} jobs": _backlog(one, pause) for one in queues},
        "pending": console.many(snapshot.due, "order"),
        "without a due time": _without_due_time(unscheduled) if unscheduled else None,
        "oldest pending": tuple(f"{slug} {_age(seconds)}" for slug, seconds in oldest.items() if seconds) or "none",
        "average getOrder": f"{round(get_order, 3):g} s",
        "dead letters": f"{console.many(snapshot.dead, 'order')}, failed deliveries {snapshot.dead_deliveries:,}",
        "upstream breakers": [f"{slug}: {context.breaker_words(one, now)}" for slug, one in breakers.items()] or "none",
        "throttled": tuple(f"{slug} until {times.short(at)} (Retry-After)" for slug, at in throttled.items()) or None,
        "sinks": [_sink(*one, snapshot.now) for one in snapshot.sinks.items()],
        "feed": [_consumer(*one, snapshot.now) for one in snapshot.consumers.items()],
        "longest delivery": f"to {slow_sink}: has run for {longest} s; a job is interrupted after {JOB_TIMEOUT} s"
        if longest >= _LONG
        else None,
        "spooled here": unknown if spooled is None else console.many(spooled, "event"),
    }
    console.facts("", facts, found)
    fails = any(_needs_a_look(one, snapshot.now) for one in snapshot.sinks.values())
    if alerts or breakers or fails or undeclared or not pools or suspended or unscheduled:
        raise typer.Exit(FOUND)


@command(cli, "ota-receiver audit --what replay --limit 10")
def audit(
    what: Annotated[Action | None, typer.Option("--what", help="Only these actions.")] = None,
    limit: context.Limit = 50,
) -> None:
    """Show who changed something by hand, when, what and why. Newest first, for EVENT_DAYS.

    Each change is noted before it is made, so an interrupted one is listed with all its orders.
    """
    with open_context() as here:
        entries = (one for one in newest_first(here.redis) if what in (None, one[1].what))
        found = list(islice(entries, limit))
        selected = (">selected", lambda one: _words(here, one[1].selected))
        columns = (("@when", "at"), "what", "#orders", "who", selected, ">why", "?=plan")
        console.listing(found, columns, _entry, nothing="The audit has no such entry.")


def _entry(one: tuple[datetime, AuditEntry]) -> dict[str, object]:
    return {"at": one[0]} | msgspec.structs.asdict(one[1])


def _words(here: CommandContext, selected: str) -> str:
    """Return a selection as people read it: a single order is stored with the id of its company."""
    company_id, _, order_id = selected.partition(":")
    if guid(company_id) is None or guid(order_id) is None:
        return selected
    return f"{order_id} of {here.companies.slug(company_id)}" if here.companies.are_several else order_id


def _queues(here: CommandContext, snapshot: Snapshot, get_order: float) -> list[QueueStatus]:
    """Return what waits in each queue, if a getOrder takes `get_order` seconds."""
    held = {**snapshot.open_breakers(), **snapshot.throttled()}
    keys = {one.key for one in snapshot.companies.values() if one.slug not in held} if not snapshot.suspended else set()
    of_key = here.settings.upstream_requests_per_5_min
    room = sum(max(of_key - spent(here.redis, one, snapshot.now), 0) for one in keys)
    permits = {LIVE: here.settings.upstream_concurrency, BACKFILL: here.settings.backfill_concurrency}
    found = []
    for queue, at_once in permits.items():
        # Without backfill workers the live workers take these jobs too.
        workers, jobs = snapshot.workers(queue) or snapshot.workers(LIVE), snapshot.queues[queue].jobs
        speed = min(workers, len(keys) * at_once) / get_order
        # A burst goes as fast as the permits allow; what the window has no room for goes at the rate of the window.
        by_window = len(keys) * of_key / _FIVE_MINUTES
        rate = speed if jobs <= room else min(speed, by_window)
        done = 0 if not jobs else round(max(jobs / speed, (jobs - room) / by_window)) if speed else None
        waited = snapshot.queue_age_ms(queue) // 1000
        found.append(
            QueueStatus(queue=queue, jobs=jobs, waited_s=waited, workers=workers, rate=round(rate, 2), done_s=done)
        )
    return found


def _alert_fields(key: Key, state: AlertState) -> dict[str, object]:
    """Return an alert that fires for machines; docs/json.md describes the keys."""
    name, company, sink = key
    return {
        "name": name,
        "company": company,
        "sink": sink,
        "reason": state.reason,
        "since": times.from_ms(state.since),
        "count": state.risen if state.count >= 0 else None,
        "last_at": times.from_ms(state.last_true_at),
        "runbook": runbook(name),
    }


def _alert(key: Key, state: AlertState, now: int) -> str:
    # What was true at the last evaluation has not ended.
    last = f"last at {times.short(times.from_ms(state.last_true_at))}" if now - state.last_true_at > SURE else ""
    count = console.many(state.risen, "time") if state.count >= 0 else ""
    words = ", ".join(filter(None, (f"for {_age((now - state.since) // 1000)}", count, state.reason, last)))
    return f"{' '.join(filter(None, key))}: {words}; {runbook(key[0])}"


def _needs_a_look(one: SinkSnapshot, now: int) -> bool:
    """Return whether a sink fails, is disabled, or has orders that wait for its breaker."""
    return one.fails(now) or one.disabled_at > 0 or (one.breaker is not None and one.behind > 0)


def _sink_fields(name: str, one: SinkSnapshot, now: int) -> dict[str, object]:
    """Return a sink for machines; docs/json.md describes the keys."""
    found: dict[str, object] = {"sink": name, "behind": one.behind, "fails": one.fails(now)}
    found |= {"failing_s": one.failing_s(now), "attempts": one.failed_attempts, "error": one.error}
    found |= {"breaker": one.breaker, "disabled_at": times.from_ms(one.disabled_at) if one.disabled_at else None}
    return found | {"disabled_reason": one.disabled_reason}


def _sink(name: str, one: SinkSnapshot, now: int) -> str:
    behind = f"{name}: {console.many(one.behind, 'order')} behind"
    if held := context.sink_words(name, one, times.from_ms(now)):
        return f"{behind}; {held}"
    failing_s = one.failing_s(now)
    if failing_s is None:
        return behind
    failed = f"{console.many(one.failed_attempts, 'attempt')} failed, {one.error}"
    return f"{behind}; nothing delivered for {_age(failing_s)}: {failed}"


def _consumer_fields(name: str, one: ConsumerSnapshot, now: int) -> dict[str, object]:
    """Return a consumer of the feed for machines; docs/json.md describes the keys."""
    return {"consumer": name, "behind": one.behind, "waiting_s": one.waiting_s(now)}


def _consumer(name: str, one: ConsumerSnapshot, now: int) -> str:
    oldest = f", the oldest for {_age(one.waiting_s(now))}" if one.behind else ""
    return f"{name}: {console.many(one.behind, 'order')} unacknowledged{oldest}"


def _get_order_seconds(here: CommandContext, orders: Sequence[OrderKey]) -> float:
    """Return the average duration of the getOrders of these orders."""
    histories = map(here.orders.history, orders)
    took = [entry.duration_ms for history in histories for entry in history if isinstance(entry, FetchStored)]
    return max(mean(took), 1) / 1000 if took else GET_ORDER


def _longest_delivery(records: Sequence[OrderRecord], now: datetime) -> tuple[str, int]:
    """Return the sink of the longest delivery of these orders, and for how many seconds it has run; "", 0 if none."""
    running = ((since, name) for one in records for name, since in one.delivering(now).items())
    since, name = min(running, default=(now, ""))
    return name, round((now - since).total_seconds())


def _without_due_time(unscheduled: int) -> str:
    orders = f"{console.many(unscheduled, 'order')} of the {_LOOKED_AT} changed last"
    return f"{orders}; a pool finds these and others within the hour. At once: ota-receiver orders refetch ORDER"


def _backlog(one: QueueStatus, pause: str) -> str:
    """Return what waits and when it is done; `pause`: until when nothing is fetched, where that is known."""
    workers, speed = (
        console.many(one.workers, "worker"),
        f"up to {one.rate:g}/s" if one.rate else f"fetching is paused{pause}",
    )
    if not one.jobs:
        return f"none; {workers}, {speed}"
    end = f": done in {_age(one.done_s)}" if one.done_s is not None else ""
    return f"{one.jobs:,}, the first for {_age(one.waited_s)}; {workers}, {speed}{end}"


def _age(seconds: int) -> str:
    return times.age(timedelta(seconds=seconds))
