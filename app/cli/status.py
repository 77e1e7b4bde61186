"""The commands about the whole service: `status` (backlog and its expected end) and `audit` (who changed what)."""

from __future__ import annotations

from datetime import datetime
from itertools import islice
from typing import Annotated, Final

import msgspec
import typer

from app import times
from app.audit import Action, AuditEntry, newest_first
from app.cli import console, context
from app.cli.command import DONE, FOUND, command, commands
from app.cli.context import CommandContext, open_context
from app.explain import overview
from app.explain.overview import LOOKED_AT, Overview, Queue
from app.explain.words import age, many
from app.ledger.policy import JOB_TIMEOUT
from app.ledger.rq_jobs import RESUME

_CODES: Final = {
    DONE: "nothing needs a look",
    FOUND: "an alert is active, a breaker is open, a sink fails or is disabled, no worker pool runs, RQ is suspended,"
    " or orders have no due time or no pool",
}
_LONG: Final = 10
"""Seconds from which a delivery that runs is shown: its sink may hang."""

cli = commands()


@command(cli, "ota-receiver status", codes=_CODES)
def status() -> None:
    """Show the backlog and its expected end, failures, worker pools and alerts."""
    with open_context() as here:
        found, has_spool = overview.read(here), here.settings.spool_dir is not None
    console.facts(found.sentence, _facts(found, has_spool), _as_object(found))
    if found.status == "look":
        raise typer.Exit(FOUND)


def _facts(found: Overview, has_spool: bool) -> dict[str, object]:
    """Return the lines for people, by name."""
    differing = tuple(f"{one.name}: {', '.join(one.differs)}" for one in found.pools if one.differs)
    unknown = "unknown: see `ota-receiver check`" if has_spool else None
    until = [*found.throttled.values(), *(one.probe_at for one in found.breakers.values())]
    # With one company that may be called, nothing as a whole is paused.
    pause = "" if found.suspended or not until or not found.running else f" until {times.short(min(until))}"
    oldest = tuple(f"{slug} {age(seconds)}" for slug, seconds in found.oldest_pending_s.items() if seconds)
    longest = f"to {found.longest_delivery_sink}: has run for {found.longest_delivery_s} s"
    return {
        "alerts": [f"{one.subject}: {one.words(found.now)}; {one.runbook}" for one in found.alerts] or "none",
        "worker pools running": found.running or "0: nothing is fetched or delivered; start `ota-receiver worker`",
        "pools that differ": differing + (("a rolling change, if it ends within 10 minutes",) if differing else ()),
        "no pool declares": found.undeclared,
        "RQ": f"suspended: nothing is fetched or delivered. To go on: {RESUME}" if found.suspended else None,
        **{f"{one.queue} jobs": _backlog(one, pause) for one in found.queues},
        "pending": many(found.due, "order"),
        "without a due time": _without_due_time(found.unscheduled) if found.unscheduled else None,
        "oldest pending": oldest or "none",
        "average getOrder": f"{round(found.get_order_s, 3):g} s",
        "dead letters": f"{many(found.dead_letters, 'order')}, failed deliveries {found.dead_deliveries:,}",
        "upstream breakers": [f"{one.slug}: {one.breaker_words}" for one in found.companies if one.breaker] or "none",
        "throttled": tuple(f"{slug} until {times.short(at)} (Retry-After)" for slug, at in found.throttled.items())
        or None,
        "sinks": [f"{one.sink}: {one.words()}" for one in found.sinks],
        "feed": [f"{one.consumer}: {one.words()}" for one in found.consumers],
        "longest delivery": f"{longest}; a job is interrupted after {JOB_TIMEOUT} s"
        if found.longest_delivery_s >= _LONG
        else None,
        "spooled here": unknown if found.spooled is None else many(found.spooled, "event"),
    }


def _as_object(found: Overview) -> dict[str, object]:
    """Return the same for machines; docs/json.md describes the keys."""
    return {
        "sentence": found.sentence,
        "alerts": found.alerts,
        "pools": found.running,
        "pools_differ": {one.name: one.differs for one in found.pools if one.differs},
        "undeclared": found.undeclared,
        "queues": found.queues,
        "suspended": found.suspended,
        "due": found.due,
        "unscheduled": found.unscheduled,
        "oldest_pending_s": found.oldest_pending_s,
        "get_order_s": round(found.get_order_s, 3),
        "longest_delivery_s": found.longest_delivery_s,
        "longest_delivery_sink": found.longest_delivery_sink,
        "dead_letters": found.dead_letters,
        "dead_deliveries": found.dead_deliveries,
        "breakers": [{"company": slug} | msgspec.structs.asdict(one) for slug, one in found.breakers.items()],
        "sinks": found.sinks,
        "feed": found.consumers,
        "throttled_until": found.throttled,
        "spooled": found.spooled,
    }


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
        selected = (">selected", lambda one: _words(here, one[1]))
        columns = (("@when", "at"), "what", "#orders", "who", selected, ">why", "?=plan")
        console.listing(found, columns, _entry, nothing="The audit has no such entry.")


def _entry(one: tuple[datetime, AuditEntry]) -> dict[str, object]:
    return {"at": one[0]} | msgspec.structs.asdict(one[1])


def _words(here: CommandContext, entry: AuditEntry) -> str:
    """Return a selection as people read it: a single order is stored with the id of its company."""
    order = entry.order
    if order is None:
        return entry.selected
    company = f"of {here.slug(order.company_id)}" if here.are_several else ""
    return " ".join(filter(None, (order.order_id, company, entry.about)))


def _without_due_time(unscheduled: int) -> str:
    orders = f"{many(unscheduled, 'order')} of the {LOOKED_AT} changed last"
    return f"{orders}; a pool finds these and others within the hour. At once: ota-receiver orders refetch ORDER"


def _backlog(one: Queue, pause: str) -> str:
    """Return what waits and when it is done; `pause`: until when nothing is fetched, where that is known."""
    workers, speed = (
        many(one.workers, "worker"),
        f"up to {one.rate:g}/s" if one.rate else f"fetching is paused{pause}",
    )
    if not one.jobs:
        return f"none; {workers}, {speed}"
    end = f": done in {age(one.done_s)}" if one.done_s is not None else ""
    return f"{one.jobs:,}, the first for {age(one.waited_s)}; {workers}, {speed}{end}"
