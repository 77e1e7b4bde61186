"""The commands for accepted events: list, show, replay."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Annotated

import msgspec
import typer

from app.cli import moment, options, output
from app.cli.exits import CODES, FOUND, Stop
from app.cli.fetches import ask_for
from app.cli.session import Session, session
from app.store.event_log import EventQuery, StoredEvent, is_event_id
from app.store.keys import OrderKey

events = typer.Typer(name="events", no_args_is_help=True, help="What the Channel Manager has told us.")

_IDS_HELP = "Event ids, as `events list` shows them."


def register(cli: typer.Typer) -> None:
    cli.add_typer(events)


@events.command("list", epilog=CODES)
def list_(
    company: options.Company = None,
    status: options.Status = None,
    since: options.Since = None,
    until: options.Until = None,
    limit: options.Limit = 50,
    as_json: options.Json = False,
) -> None:
    """List the latest events, newest last. Duplicates are not among them: `orders show` tells of those."""
    with session() as here:
        query = EventQuery(company_id=here.companies.id_of(company), status=status, since=since, until=until)
        found = deque[StoredEvent]()
        found.extendleft(islice(here.books.events.newest_first(query), limit))
        if as_json:
            for event in found:
                output.json_line(_view(here, event))
        elif found:
            columns = ("id", f"came ({output.zone()})", "company", "order", "status", "became", "reference")
            output.table("", columns, (_row(here, event) for event in found))
    if not found:
        raise Stop("No event matches.", FOUND)


@events.command(epilog=CODES)
def show(
    event_id: Annotated[str, typer.Argument(metavar="ID", help="Event id, as `events list` shows it.")],
    as_json: options.Json = False,
) -> None:
    """Show one event, and where its order stands."""
    with session() as here:
        event = next(iter(here.books.events.of_ids([event_id])), None)
        if event is None:
            raise Stop(f"No event {event_id!r} is here; it may be older than EVENT_DAYS.", FOUND)
        record = here.books.archive.record(event.key)
        now = moment.now()
        state = record.state(now) if record is not None else "unknown"
        if as_json:
            output.json_line(_view(here, event) | {"order_state": state})
            return
        facts = (
            ("company", here.companies.slug(event.company_id)),
            ("order", event.order_id),
            ("reference", event.reference),
            ("status", event.status),
            ("came", moment.short(event.at)),
            ("sent", event.sent),
            ("became", event.outcome),
            ("secret", event.secret),
            ("request", event.request_id),
            ("order is", state),
        )
        output.facts(f"event {event.id}", facts)


@events.command(epilog=CODES)
def replay(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help=_IDS_HELP)] = None,
    order: Annotated[list[str] | None, typer.Option("--order", help="An order, by orderId or reference.")] = None,
    company: options.Company = None,
    status: options.Status = None,
    since: options.Since = None,
    until: options.Until = None,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    as_json: options.Json = False,
) -> None:
    """Fetch the orders of stored events once more, each order once, oldest first, behind the live ones.

    Give event ids, --order, or a selection: --company, --status, --since, --until.
    """
    named, selected = bool(ids or order), any((status, since, until))
    if named and selected:
        raise Stop("Give ids and --order, or a selection by --status, --since and --until, not both.")
    if not named and not selected and company is None:
        raise Stop("Say what to replay: event ids, --order, or a selection; everything is --since 2000-01-01.")
    with session() as here:
        company_id = here.companies.id_of(company)
        if named:
            orders, missing = _named(here, ids or [], order or [], company_id)
        else:
            query = EventQuery(company_id=company_id, status=status, since=since, until=until or moment.now())
            found = output.counted(here.books.events.oldest_first(query), "reading events")
            # A dict keeps the order in which each order was first told of.
            orders, missing = list(dict.fromkeys(event.key for event in found)), []
        for text in missing:
            output.remark(f"No event {text!r} is here.")
        if not orders:
            raise Stop("No event matches.", FOUND)
        if dry_run:
            text = f"{output.many(len(orders), 'order')} would be fetched once more (one getOrder each)."
            output.tell(text, {"orders": len(orders), "dry_run": True}, as_json)
        else:
            output.confirm(f"Fetch {output.many(len(orders), 'order')} once more (one getOrder each)?", yes)
            asked = ask_for(here, orders, queue="backfill", why="replay")
            output.tell(asked.sentence(), asked, as_json)
    if missing:
        raise typer.Exit(FOUND)


def _named(
    here: Session, ids: list[str], orders: list[str], company_id: str | None
) -> tuple[list[OrderKey], list[str]]:
    wrong = next((one for one in ids if not is_event_id(one)), None)
    if wrong is not None:
        raise Stop(f"{wrong!r} is no event id. An order is named by --order.")
    found = here.books.events.of_ids(ids)
    there = {event.id for event in found}
    asked_for = [here.order(text, company_id) for text in orders]
    in_turn = dict.fromkeys([*(event.key for event in found), *asked_for])
    return list(in_turn), [one for one in ids if one not in there]


def _view(here: Session, event: StoredEvent) -> dict[str, object]:
    return {"company": here.companies.slug(event.company_id)} | msgspec.structs.asdict(event)


def _row(here: Session, event: StoredEvent) -> tuple[object, ...]:
    return (
        event.id,
        moment.short(event.at),
        here.companies.slug(event.company_id),
        event.order_id,
        event.status,
        event.outcome,
        event.reference,
    )
