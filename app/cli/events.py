"""The commands for accepted events: list, show; replay and tail have files of their own."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Annotated

import msgspec
import typer

from app.cli import moment, options, output, replay, tail
from app.cli.exits import FOUND, Stop, epilog
from app.cli.session import Session, session
from app.store.event_log import EventQuery, StoredEvent

events = typer.Typer(name="events", no_args_is_help=True, help="What the Channel Manager has told us.")


def register(cli: typer.Typer) -> None:
    events.command(epilog=epilog("ota-receiver events tail --order CM-4711", codes=tail.CODES))(tail.tail)
    events.command(epilog=replay.EPILOG)(replay.replay)
    cli.add_typer(events)


@events.command("list", epilog=epilog("ota-receiver events list --since 1h --status Issued"))
def list_(
    company: options.Company = None,
    status: options.Status = None,
    outcome: tail.Outcome = None,
    since: options.Since = None,
    until: options.Until = None,
    limit: options.Limit = 50,
    as_json: options.Json = False,
) -> None:
    """List the latest events, newest last. Duplicates are not among them: `orders explain` tells of those."""
    with session() as here:
        query = EventQuery(
            company_id=here.companies.id_of(company), status=status, outcome=outcome, since=since, until=until
        )
        found = deque[StoredEvent]()
        found.extendleft(islice(here.books.events.newest_first(query), limit))
        if as_json:
            for event in found:
                output.json_line(_view(here, event))
        elif found:
            columns = ("=id", f"came ({output.zone()})", "?company", "=order", "status", "?became", "?reference")
            output.table("", columns, (_row(here, event) for event in found))
    if not found:
        raise Stop("No event matches.", FOUND)


@events.command(epilog=epilog("ota-receiver events show 1763803942123-0"))
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
