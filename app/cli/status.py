"""The command for the backlog and its expected end: one page, and an exit code."""

from __future__ import annotations

from datetime import timedelta
from itertools import islice
from statistics import mean
from typing import Final, NamedTuple

import msgspec
import typer

from app import times
from app.cli import console, context
from app.cli.console import DONE, FOUND, epilog
from app.cli.context import CommandContext, open_context
from app.cli.replay import GET_ORDER
from app.intake.spool import waiting
from app.ledger.history import FetchStored
from app.ledger.orders import OrderQuery
from app.ledger.rate_limit import spent
from app.ledger.rq_jobs import BACKFILL, LIVE
from app.snapshot import Snapshot, SnapshotReader

_CODES: Final = {DONE: "no alert is active", FOUND: "an alert is active, or no worker pool runs"}
_FIVE_MINUTES: Final = 300
_LATEST: Final = 20
"""Orders whose getOrders give the average duration."""

cli = console.commands()


class QueueStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs that wait in one queue; the first has waited `waited_s`.

    `rate`: fetches a second that the workers and the limits of the API keys allow. `done_s`: until the queue is empty
    if no event arrives, None if nothing is fetched.
    """

    queue: str
    jobs: int
    waited_s: int
    workers: int
    rate: float
    done_s: int | None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The page. `due`: orders with a fetch, a recheck or a delivery to do; `oldest_pending_s` by company.

    `get_order_s`: average of the latest orders. `spooled`: None without SPOOL_DIR here, or if it cannot be read.
    """

    alerts: tuple[str, ...]
    pools: int
    queues: tuple[QueueStatus, ...]
    due: int
    oldest_pending_s: dict[str, int]
    get_order_s: float
    dead_letters: int
    dead_deliveries: int
    breakers_open: tuple[str, ...]
    spooled: int | None


@cli.command(epilog=epilog("ota-receiver status", codes=_CODES))
def status(as_json: context.Json = False) -> None:
    """Show the backlog and its expected end, failures, worker pools and alerts."""
    with open_context() as here:
        snapshot = SnapshotReader(here.settings.companies, here.settings.sinks).read(here.redis)
        found = _status(here, snapshot, _get_order_seconds(here))
    if as_json:
        console.json_line(found)
    else:
        _print(found)
    if found.alerts or not found.pools:
        raise typer.Exit(FOUND)


def _status(here: CommandContext, snapshot: Snapshot, get_order: float) -> Status:
    companies = here.settings.companies
    shut_out = [one.slug for one in companies if snapshot.breaker_is_open(one.np_company_id)]
    window = _window(here, snapshot.now)
    permits = {LIVE: here.settings.upstream_concurrency, BACKFILL: here.settings.backfill_concurrency}
    queues = []
    for queue, at_once in permits.items():
        workers = snapshot.workers(queue)
        busy = 0 if len(shut_out) == len(companies) else min(workers, window.keys * at_once)
        jobs = snapshot.queues[queue].jobs
        # A burst goes as fast as the permits allow; what the window has no room for goes at the rate of the window.
        speed = busy / get_order
        rate = speed if jobs <= window.room else min(speed, window.rate)
        done = 0 if not jobs else round(max(jobs / speed, (jobs - window.room) / window.rate)) if speed else None
        waited = snapshot.queue_age_ms(queue) // 1000
        queues.append(
            QueueStatus(queue=queue, jobs=jobs, waited_s=waited, workers=workers, rate=round(rate, 2), done_s=done)
        )
    return Status(
        alerts=tuple(_firing(snapshot)),
        pools=len(snapshot.running_pools()),
        queues=tuple(queues),
        due=snapshot.due,
        oldest_pending_s={
            one.slug: snapshot.companies[one.np_company_id].oldest_pending_ms // 1000 for one in companies
        },
        get_order_s=round(get_order, 3),
        dead_letters=snapshot.dead,
        dead_deliveries=snapshot.dead_deliveries,
        breakers_open=tuple(shut_out),
        spooled=waiting(here.settings.spool_dir) if here.settings.spool_dir else None,
    )


class _Window(NamedTuple):
    """The limits of all keys: `room` requests now, then `rate` a second."""

    keys: int
    room: int
    rate: float


def _window(here: CommandContext, now: int) -> _Window:
    api_keys = {one.np_api_key.get_secret_value() for one in here.settings.companies}
    most = here.settings.upstream_requests_per_5_min
    used = sum(spent(here.redis, one, now) for one in api_keys)
    return _Window(len(api_keys), max(len(api_keys) * most - used, 0), len(api_keys) * most / _FIVE_MINUTES)


def _firing(snapshot: Snapshot) -> list[str]:
    return [" ".join(filter(None, labels)) for labels, state in snapshot.alert_states().items() if state.firing_at]


def _get_order_seconds(here: CommandContext) -> float:
    """Return the average duration of the latest getOrders."""
    latest = islice(here.orders.newest_first(OrderQuery(), times.now()), _LATEST)
    histories = [here.orders.history(record.key) for record in latest]
    took = [entry.duration_ms for history in histories for entry in history if isinstance(entry, FetchStored)]
    return max(mean(took), 1) / 1000 if took else GET_ORDER


def _print(found: Status) -> None:
    oldest = (f"{slug} {_age(seconds)}" for slug, seconds in found.oldest_pending_s.items() if seconds)
    facts = (
        ("alerts", ", ".join(found.alerts) or "none"),
        ("worker pools running", found.pools or "0: nothing is fetched; start `ota-receiver worker`"),
        *((f"{one.queue} jobs", _backlog(one)) for one in found.queues),
        ("pending", f"{console.many(found.due, 'order')}: fetches, retries, deliveries"),
        ("oldest pending", ", ".join(oldest) or "none"),
        ("average getOrder", f"{found.get_order_s:g} s"),
        (
            "dead letters",
            f"{console.many(found.dead_letters, 'order')}, failed deliveries {found.dead_deliveries:,}",
        ),
        ("breakers open", ", ".join(found.breakers_open) or "none"),
        ("spooled here", None if found.spooled is None else console.many(found.spooled, "event")),
    )
    console.facts("", facts)


def _backlog(one: QueueStatus) -> str:
    workers = console.many(one.workers, "worker")
    if not one.jobs:
        return f"none; {workers}, up to {one.rate:g}/s"
    end = "fetching is paused" if one.done_s is None else f"done in {_age(one.done_s)}"
    return f"{one.jobs:,}, the first for {_age(one.waited_s)}; {workers}, up to {one.rate:g}/s: {end}"


def _age(seconds: int) -> str:
    return times.age(timedelta(seconds=seconds))
