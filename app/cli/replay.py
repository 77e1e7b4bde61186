"""`events replay`: the orders of stored events once more, as a plan with a rate, an id and an audit."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from app import bootstrap
from app.cli import deeds, moment, options, output, replay_feed, tail
from app.cli.exits import FOUND, Stop, epilog
from app.cli.replay_forecast import Forecast, default_rate
from app.cli.session import Session, session
from app.store.event_log import is_event_id
from app.store.plan import Draft
from app.store.selection import Selected, Selection

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Event ids, as `events list` shows them.")]
Orders = Annotated[list[str] | None, typer.Option("--order", help="An order, by orderId or reference; repeatable.")]
Dead = Annotated[bool, typer.Option("--dead", help="Only orders that were given up.")]
Force = Annotated[bool, typer.Option("--force", help="Also orders whose stored copy is newer than the event.")]
ToSinks = Annotated[
    bool, typer.Option("--to-sinks", help="Hand the stored revision to all SINKS again instead of fetching.")
]
SinkNames = Annotated[list[str] | None, typer.Option("--sink", help="Like --to-sinks, to this one; repeatable.")]
Rate = Annotated[
    float | None,
    typer.Option("--rate", min=0.01, max=5000, help="Orders a second; else what the backfill's budget carries."),
]
Why = Annotated[str, typer.Option("--why", help="For the audit; one line.")]
Who = Annotated[str | None, typer.Option("--who", help="For the audit, instead of user@host.")]

EPILOG: Final = epilog(
    "ota-receiver events replay --since 6h --status Issued --dry-run",
    'ota-receiver events replay --dead --why "venue is back" --yes',
    "ota-receiver events replay --order CM-4711 --force",
    "ota-receiver events replay --since 2d --to-sinks --rate 20",
)


def replay(
    ids: Ids = None,
    order: Orders = None,
    company: options.Company = None,
    status: options.Status = None,
    outcome: tail.Outcome = None,
    since: options.Since = None,
    until: options.Until = None,
    dead: Dead = False,
    force: Force = False,
    to_sinks: ToSinks = False,
    sink: SinkNames = None,
    rate: Rate = None,
    why: Why = "",
    who: Who = None,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    as_json: options.Json = False,
) -> None:
    """Fetch the orders of stored events once more: each order once, oldest first, at a rate, behind the live ones.

    All conditions must hold; event ids and --order together name what is looked through. An order whose stored copy is
    newer than its last selected event is passed over, unless --force. The replay is a plan: Ctrl-C stops it, and
    `replays resume` goes on where it stood, `replays cancel` ends it.
    """
    if not any((ids, order, company, status, outcome, since, until, dead)):
        raise Stop("Say what to replay: event ids, --order, --dead, or a selection; everything is --since 2000-01-01.")
    asks, reason = deeds.who_asks(who), deeds.printable(why, "--why")
    if force and (to_sinks or sink):
        raise Stop("--force is about fetching; --to-sinks fetches nothing.")
    wrong = next((one for one in ids or [] if not is_event_id(one)), None)
    if wrong is not None:
        raise Stop(f"{wrong!r} is no event id. An order is named by --order.")
    with session() as here:
        sinks = _sinks(here, to_sinks, sink or [])
        company_id = here.companies.id_of(company)
        selection = Selection(
            event_ids=tuple(dict.fromkeys(ids or [])),
            orders=tuple(dict.fromkeys(here.order(text, company_id) for text in order or [])),
            company_id=company_id,
            status=status,
            outcome=outcome,
            since=since,
            until=until,
            dead=dead,
        )
        with output.progress("reading events") as step:
            found = here.books.selector.select(selection, step)
        for text in found.missing:
            output.remark(f"No event {text!r} is here.")
        if not found.orders:
            raise Stop("No event matches.", FOUND)
        for member in here.books.selector.erased(found.orders):
            del found.orders[member]
        if not found.orders:
            raise Stop("All orders that match were erased.", FOUND)
        passed = _passed(here, found, force, sinks)
        speed = rate or default_rate(here.settings)
        forecast = Forecast.of(
            found.events,
            len(found.orders),
            len(passed),
            sinks=sinks,
            rate=speed,
            now=moment.now(),
            dry_run=dry_run,
        )
        if dry_run:
            forecast.tell(as_json)
        elif not forecast.to_do:
            output.remark(forecast.passed_over())
            output.tell("Nothing to do.", forecast, as_json)
        else:
            if forecast.passed:
                output.remark(forecast.passed_over())
            output.confirm(f"{forecast.sentence()}?", yes)
            draft = Draft(who=asks, why=reason, selected=selection.words(), rate=speed, sinks=sinks)
            left = ((one, None if force else told) for one, told in found.orders.items() if one not in passed)
            plan = here.books.plans.file(draft, left, bootstrap.clock())
            output.remark(f"Plan {plan.id}; Ctrl-C stops it, and `ota-receiver replays resume {plan.id}` goes on.")
            replay_feed.end(replay_feed.feed(here, plan), as_json)
    if found.missing:
        raise typer.Exit(FOUND)


def _sinks(here: Session, everyone: bool, names: list[str]) -> tuple[str, ...]:
    """Return the sinks that the stored revision goes to, () for a replay that fetches."""
    known = here.settings.sinks
    if (names or everyone) and not known:
        raise Stop("SINKS is empty: there is nobody to hand on to.")
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        raise Stop(f"No sink {wrong!r} in the settings; there is: {', '.join(known)}.")
    return tuple(dict.fromkeys(names)) or (known if everyone else ())


def _passed(here: Session, found: Selected, force: bool, sinks: tuple[str, ...]) -> set[str]:
    if sinks:
        return here.books.selector.without_content(found.orders)
    return set() if force else here.books.selector.up_to_date(found.orders)
