"""The commands for what was given up: list, show, requeue, drop.

The dead letters that a command is about: those of orders that were named, or a selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Annotated, Final, Literal

import msgspec
import typer

from app import bootstrap, times
from app.cli import console, context
from app.cli.console import FOUND, Stop, epilog
from app.cli.context import Session, session
from app.cli.order_view import lines, next_step, steps
from app.cli.orders import CHUNK
from app.ids import OrderKey
from app.ledger.dead_letters import RECORD_GONE, DeadLetter, DeadQuery


@dataclass(frozen=True)
class Letters:
    """Read anew each time: there may be hundreds of thousands. `gone` of the named orders have no dead letter."""

    here: Session
    query: DeadQuery
    orders: tuple[OrderKey, ...]
    gone: int

    def __iter__(self) -> Iterator[DeadLetter]:
        if not self.orders:
            return self.here.books.dead.oldest_first(self.query)
        return filter(self.query.matches, chain.from_iterable(map(self.here.books.dead.of, self.orders)))

    def words(self) -> str:
        """Return the selection on one line, for the audit."""
        if self.orders:
            return context.about(self.orders)
        query = self.query
        named = {"company": query.company_id, "reason": query.reason, "until": query.until}
        return " ".join(
            f"{name}={value if isinstance(value, str) else value.isoformat(timespec='seconds')}"
            for name, value in named.items()
            if value is not None
        )

    def count(self) -> tuple[int, int]:
        """Return how many have their record, and how many have lost it."""
        return _count(console.counted(self, "reading dead letters"))


def chosen(here: Session, named: list[str], query: DeadQuery) -> Letters:
    """Return the letters of the orders that are named, or if none is, those that match.

    What is no dead letter (any more) is told, counted, and stops nothing. Raises Stop when none of them is one.
    """
    found: list[OrderKey] = []
    for text in named:
        try:
            order = here.order(text, query.company_id)
        except Stop as stop:
            if stop.code != FOUND:
                raise
        else:
            if here.books.dead.of(order):
                found.append(order)
                continue
            if here.books.erasure.erased_among([order]):
                console.remark(f"{text!r} was erased: it is not fetched any more.")
                continue
        console.remark(f"{text!r} is no dead letter.")
    if named and not found:
        raise Stop("No dead letter matches.", FOUND)
    return Letters(here, query, tuple(dict.fromkeys(found)), len(named) - len(found))


def _count(letters: Iterable[DeadLetter]) -> tuple[int, int]:
    count = stale = 0
    for letter in letters:
        if letter.reason == RECORD_GONE:
            stale += 1
        else:
            count += 1
    return count, stale


dead = typer.Typer(name="dead", no_args_is_help=True, help="Orders and hand-ons that were given up.")

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ORDER]...", help="orderIds or references.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Reason code, as `dead list` shows it.")]
OlderThan = Annotated[
    datetime | None,
    typer.Option("--older-than", parser=context.time, metavar="TIME", help="Given up before: an age such as 30d."),
]
All = Annotated[bool, typer.Option("--all", help="Whatever was given up.")]

_SAY_WHICH: Final = "Say which: orders, --reason, --company, --older-than, or --all."
_EVER: Final = datetime.max.replace(tzinfo=UTC)
_LAST: Final = 12
"""Steps of the order's trail that are shown: enough to see how it ended; `orders explain` shows all."""


def register(cli: typer.Typer) -> None:
    cli.add_typer(dead)


@dead.command("list", epilog=epilog("ota-receiver dead list --reason order_missing"))
def list_(
    reason: Reason = None,
    company: context.CompanyOption = None,
    since: context.Since = None,
    until: context.Until = None,
    limit: context.Limit = 50,
    as_json: context.Json = False,
) -> None:
    """List dead letters: orders first, then hand-ons to sinks, each from the oldest on. None at all ends with 0."""
    with session() as here:
        now = times.now()
        query = DeadQuery(company_id=here.companies.id_of(company), reason=reason, since=since, until=until or now)
        found = islice(here.books.dead.oldest_first(query), limit + 1)
        if as_json:
            for letter in islice(found, limit):
                console.json_line(_view(here, letter, now))
            return
        letters = list(found)
        if not letters:
            console.say("No dead letters.")
            return
        columns = ("age", f"?since ({console.zone()})", "?company", "=order", "sink", "reason", "#http", "?status")
        console.table("", columns, (_row(here, letter, now) for letter in letters[:limit]))
    if len(letters) > limit:
        console.remark(f"More than {limit:,}: --limit shows more, --reason and --company fewer.")


@dead.command(epilog=epilog("ota-receiver dead show CM-4711"))
def show(
    order: Annotated[str, typer.Argument(metavar="ORDER", help="orderId or reference.")],
    company: context.CompanyOption = None,
    as_json: context.Json = False,
) -> None:
    """Show why an order, or a hand-on of it, was given up, what was tried, and what to do."""
    with session() as here:
        key = here.order(order, here.companies.id_of(company))
        letters, record = here.books.dead.of(key), here.books.archive.record(key)
        if not letters or record is None:
            raise Stop(f"{order!r} is no dead letter.", FOUND)
        state, happened = record.state(times.now()), steps(here.books.archive.trail(key))
        step = next_step(record, state, (), here.name(key))
        if as_json:
            for letter in letters:
                console.json_line(_view(here, letter, times.now()) | {"next": step, "steps": happened})
            return
        for letter in letters:
            facts = (
                ("order", letter.order_id),
                ("company", here.companies.slug(letter.company_id)),
                ("reference", letter.reference),
                ("status", letter.status),
                ("sink", letter.sink),
                ("reason", letter.reason),
                ("HTTP", letter.http),
                ("given up", f"{times.short(letter.at)} ({times.age(times.now() - letter.at)} ago)"),
            )
            console.facts("", facts)
        console.say("")
        for line in lines(happened[-_LAST:]):
            console.say(line)
        console.say("")
        console.say(f"next: {step}")


@dead.command(epilog=epilog("ota-receiver dead requeue --reason order_missing --dry-run"))
def requeue(
    ids: Ids = None,
    reason: Reason = None,
    company: context.CompanyOption = None,
    older_than: OlderThan = None,
    everything: All = False,
    live: Annotated[bool, typer.Option("--live", help="Before the backfill: among the orders that come now.")] = False,
    dry_run: context.DryRun = False,
    yes: context.Yes = False,
    who: context.Who = None,
    why: context.Why = "",
    as_json: context.Json = False,
) -> None:
    """Give dead letters new tries: an order is fetched again, a hand-on goes to its sink again.

    What is no dead letter (any more) is counted as gone and stops nothing.
    """
    if not (ids or reason or company or older_than or everything):
        raise Stop(_SAY_WHICH)
    with session() as here:
        letters = _chosen(here, ids, reason, company, older_than)
        count, stale = letters.count()
        if not count:
            raise Stop("No dead letter matches.", FOUND)
        gone = letters.gone + stale
        if dry_run:
            text = f"{console.many(count, 'dead letter')} would be given new tries."
            console.tell(text, {"letters": count, "gone": gone, "dry_run": True}, as_json)
        else:
            console.confirm(f"Give {console.many(count, 'dead letter')} new tries?", yes)
            context.note(here, "requeue", letters.words(), count, who, why)
            revived = _revive(here, iter(letters), count, "live" if live else "backfill")
            revived = msgspec.structs.replace(revived, gone=gone)
            console.tell(revived.sentence(), revived, as_json)
    if gone:
        raise typer.Exit(FOUND)


@dead.command(epilog=epilog("ota-receiver dead drop --older-than 30d --dry-run"))
def drop(
    ids: Ids = None,
    reason: Reason = None,
    company: context.CompanyOption = None,
    older_than: OlderThan = None,
    everything: All = False,
    dry_run: context.DryRun = False,
    yes: context.Yes = False,
    who: context.Who = None,
    why: context.Why = "",
    as_json: context.Json = False,
) -> None:
    """Give dead letters up for good: nobody looks at them any more, and they end with ORDER_DAYS.

    What was fetched before stays. A new event of the order, or `orders refetch`, fetches it as ever.
    """
    if not (ids or reason or company or older_than or everything):
        raise Stop(_SAY_WHICH)
    with session() as here:
        letters = _chosen(here, ids, reason, company, older_than)
        # Also those that have lost their record: this is how they leave the list.
        count = sum(letters.count())
        if not count:
            raise Stop("No dead letter matches.", FOUND)
        if dry_run:
            text = f"{console.many(count, 'dead letter')} would be given up for good."
            console.tell(text, {"letters": count, "gone": letters.gone, "dry_run": True}, as_json)
        else:
            console.confirm(f"Give {console.many(count, 'dead letter')} up for good?", yes)
            context.note(here, "drop", letters.words(), count, who, why)
            dropped = _drop(here, iter(letters), count)
            told = {"dropped": dropped, "gone": letters.gone + count - dropped}
            console.tell(f"{console.many(dropped, 'dead letter')} given up for good.", told, as_json)
    if letters.gone:
        raise typer.Exit(FOUND)


def _chosen(
    here: Session, ids: list[str] | None, reason: str | None, company: str | None, older_than: datetime | None
) -> Letters:
    # The end of the selection is fixed: what fails again while we work is not taken again. One that was named is
    # meant whenever it died, even by a clock that is ahead of ours.
    until = older_than or (_EVER if ids else times.now())
    query = DeadQuery(company_id=here.companies.id_of(company), reason=reason, until=until)
    return chosen(here, ids or [], query)


class Revived(msgspec.Struct, frozen=True):
    """What came of it: orders with a new job or one that waited already, hand-ons, and what was no dead letter."""

    queued: int = 0
    waiting: int = 0
    sinks: int = 0
    gone: int = 0

    def sentence(self) -> str:
        orders = f"{console.many(self.queued, 'order')} queued, {self.waiting:,} waiting already"
        gone = f", {self.gone:,} not dead (any more)" if self.gone else ""
        return f"{orders}, {console.many(self.sinks, 'hand-on')} due now{gone}."


def _revive(here: Session, letters: Iterator[DeadLetter], count: int, queue: Literal["live", "backfill"]) -> Revived:
    """Go through the letters once more instead of keeping them: there may be hundreds of thousands."""
    queued = waiting = sinks = 0
    ledger = here.books.ledger
    with console.progress("giving new tries", count) as step:
        while chunk := list(islice(letters, CHUNK)):
            now = bootstrap.clock()
            known = [letter for letter in chunk if letter.reason != RECORD_GONE]
            orders = [letter.key for letter in known if not letter.sink]
            pushed = ledger.want(orders, now, queue=queue, why="requeue")
            queued, waiting = queued + pushed, waiting + len(orders) - pushed
            sinks += sum(ledger.revive_sink(letter.key, letter.sink, now) for letter in known if letter.sink)
            step(len(known))
    return Revived(queued, waiting, sinks)


def _drop(here: Session, letters: Iterator[DeadLetter], count: int) -> int:
    dropped = 0
    with console.progress("giving up for good", count) as step:
        for letter in letters:
            dropped += here.books.drops.drop(letter.key, letter.sink, bootstrap.clock())
            step(1)
    return dropped


def _view(here: Session, letter: DeadLetter, now: datetime) -> dict[str, object]:
    age = {"age_s": int((now - letter.at).total_seconds())}
    return {"company": here.companies.slug(letter.company_id)} | msgspec.structs.asdict(letter) | age


def _row(here: Session, letter: DeadLetter, now: datetime) -> tuple[object, ...]:
    return (
        times.age(now - letter.at),
        times.short(letter.at),
        here.companies.slug(letter.company_id),
        letter.order_id,
        letter.sink,
        letter.reason,
        letter.http,
        letter.status,
    )
