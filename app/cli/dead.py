"""The commands for what was given up: list, requeue."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import chain, islice
from typing import Annotated, Literal

import msgspec
import typer

from app import bootstrap
from app.cli import moment, options, output
from app.cli.exits import CODES, FOUND, Stop
from app.cli.fetches import CHUNK
from app.cli.session import Session, session
from app.store.dead_letters import RECORD_GONE, DeadLetter, DeadQuery
from app.store.keys import OrderKey

dead = typer.Typer(name="dead", no_args_is_help=True, help="Orders and hand-ons that were given up.")

Reason = Annotated[str | None, typer.Option("--reason", help="Reason code, as `dead list` shows it.")]


def register(cli: typer.Typer) -> None:
    cli.add_typer(dead)


@dead.command("list", epilog=CODES)
def list_(
    reason: Reason = None,
    company: options.Company = None,
    since: options.Since = None,
    until: options.Until = None,
    limit: options.Limit = 50,
    as_json: options.Json = False,
) -> None:
    """List dead letters: orders first, then hand-ons to sinks, each from the oldest on. None at all ends with 0."""
    with session() as here:
        now = moment.now()
        query = DeadQuery(company_id=here.companies.id_of(company), reason=reason, since=since, until=until or now)
        found = islice(here.books.dead.oldest_first(query), limit + 1)
        if as_json:
            for letter in islice(found, limit):
                output.json_line(_view(here, letter, now))
            return
        letters = list(found)
        if not letters:
            output.say("No dead letters.")
            return
        columns = ("age", f"since ({output.zone()})", "company", "order", "sink", "reason", "#http", "status")
        output.table("", columns, (_row(here, letter, now) for letter in letters[:limit]))
    if len(letters) > limit:
        output.remark(f"More than {limit:,}: --limit shows more, --reason and --company fewer.")


@dead.command(epilog=CODES)
def requeue(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ORDER]...", help="orderIds or references.")] = None,
    reason: Reason = None,
    company: options.Company = None,
    everything: Annotated[bool, typer.Option("--all", help="Whatever was given up.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Before the backfill: among the orders that come now.")] = False,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    as_json: options.Json = False,
) -> None:
    """Give dead letters new tries: an order is fetched again, a hand-on goes to its sink again.

    What is no dead letter (any more) is counted as gone and stops nothing.
    """
    if not (ids or reason or company or everything):
        raise Stop("Say which: orders, --reason, --company, or --all.")
    with session() as here:
        # The end of the selection is fixed: what fails again while we work is not requeued again.
        query = DeadQuery(company_id=here.companies.id_of(company), reason=reason, until=moment.now())
        orders, gone = _orders(here, ids or [], query.company_id)
        if ids and not orders:
            raise Stop("No dead letter matches.", FOUND)
        count, stale = _count(_letters(here, query, orders))
        gone += stale
        if not count:
            raise Stop("No dead letter matches.", FOUND)
        if dry_run:
            text = f"{output.many(count, 'dead letter')} would be given new tries."
            output.tell(text, {"letters": count, "gone": gone, "dry_run": True}, as_json)
        else:
            output.confirm(f"Give {output.many(count, 'dead letter')} new tries?", yes)
            revived = _revive(here, _letters(here, query, orders), count, "live" if live else "backfill")
            revived = msgspec.structs.replace(revived, gone=gone)
            output.tell(revived.sentence(), revived, as_json)
    if gone:
        raise typer.Exit(FOUND)


class Revived(msgspec.Struct, frozen=True):
    """What came of it: orders with a new job or one that waited already, hand-ons, and what was no dead letter."""

    queued: int = 0
    waiting: int = 0
    sinks: int = 0
    gone: int = 0

    def sentence(self) -> str:
        orders = f"{output.many(self.queued, 'order')} queued, {self.waiting:,} waiting already"
        gone = f", {self.gone:,} not dead (any more)" if self.gone else ""
        return f"{orders}, {output.many(self.sinks, 'hand-on')} due now{gone}."


def _orders(here: Session, ids: list[str], company_id: str | None) -> tuple[list[OrderKey], int]:
    """Return the orders that have dead letters, and how many of `ids` have none."""
    found: list[OrderKey] = []
    for text in ids:
        try:
            order = here.order(text, company_id)
        except Stop as stop:
            if stop.code != FOUND:
                raise
        else:
            if here.books.dead.of(order):
                found.append(order)
                continue
        output.remark(f"{text!r} is no dead letter.")
    return list(dict.fromkeys(found)), len(ids) - len(found)


def _letters(here: Session, query: DeadQuery, orders: list[OrderKey]) -> Iterator[DeadLetter]:
    if not orders:
        return here.books.dead.oldest_first(query)
    return filter(query.matches, chain.from_iterable(map(here.books.dead.of, orders)))


def _count(letters: Iterable[DeadLetter]) -> tuple[int, int]:
    """Return how many can be given new tries, and how many have lost their record."""
    count = stale = 0
    for letter in output.counted(letters, "reading dead letters"):
        if letter.reason == RECORD_GONE:
            stale += 1
        else:
            count += 1
    return count, stale


def _revive(here: Session, letters: Iterator[DeadLetter], count: int, queue: Literal["live", "backfill"]) -> Revived:
    """Go through the letters once more instead of keeping them: there may be hundreds of thousands."""
    queued = waiting = sinks = 0
    ledger = here.books.ledger
    with output.progress("giving new tries", count) as step:
        while chunk := list(islice(letters, CHUNK)):
            now = bootstrap.clock()
            known = [letter for letter in chunk if letter.reason != RECORD_GONE]
            orders = [letter.key for letter in known if not letter.sink]
            pushed = ledger.want(orders, now, queue=queue, why="requeue")
            queued, waiting = queued + pushed, waiting + len(orders) - pushed
            sinks += sum(ledger.revive_sink(letter.key, letter.sink, now) for letter in known if letter.sink)
            step(len(known))
    return Revived(queued, waiting, sinks)


def _view(here: Session, letter: DeadLetter, now: datetime) -> dict[str, object]:
    age = {"age_s": int((now - letter.at).total_seconds())}
    return {"company": here.companies.slug(letter.company_id)} | msgspec.structs.asdict(letter) | age


def _row(here: Session, letter: DeadLetter, now: datetime) -> tuple[object, ...]:
    return (
        moment.age(now - letter.at),
        moment.short(letter.at),
        here.companies.slug(letter.company_id),
        letter.order_id,
        letter.sink,
        letter.reason,
        letter.http,
        letter.status,
    )
