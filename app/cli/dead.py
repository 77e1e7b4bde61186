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

from app import times
from app.cli import console, context
from app.cli.console import FOUND, Stop, epilog
from app.cli.context import CommandContext, open_context
from app.cli.order_view import view_of
from app.cli.orders import CHUNK
from app.ids import OrderKey
from app.ledger.dead_letters import RECORD_GONE, DeadLetter, DeadQuery


@dataclass(frozen=True)
class Letters:
    """Read anew each time: there may be hundreds of thousands. `not_dead` of the named orders have no dead letter."""

    here: CommandContext
    query: DeadQuery
    orders: tuple[OrderKey, ...]
    not_dead: int

    def __iter__(self) -> Iterator[DeadLetter]:
        if not self.orders:
            return self.here.dead_letters.oldest_first(self.query)
        return filter(self.query.matches, chain.from_iterable(map(self.here.dead_letters.of, self.orders)))

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


def chosen(here: CommandContext, named: list[str], query: DeadQuery) -> Letters:
    """Return the letters of the orders that are named, or if none is, those that match.

    What is no dead letter (any more) is told, counted, and stops nothing. Raises Stop when none of them is one.
    """
    found: list[OrderKey] = []
    for text in named:
        try:
            order = here.order(text)
        except Stop as stop:
            if stop.code != FOUND:
                raise
        else:
            if here.dead_letters.of(order):
                found.append(order)
                continue
            if here.erasure.erased_among([order]):
                console.remark(f"{text!r} was erased: it is not fetched any more.")
                continue
        console.remark(f"{text!r} has no dead letter.")
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


cli = console.commands(name="dead", help="Dead letters: orders and deliveries that failed for good.")

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ORDER]...", help="orderIds or references.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Reason code, as `dead list` shows it.")]
OlderThan = Annotated[
    datetime | None,
    typer.Option("--older-than", parser=context.time, metavar="TIME", help="Given up before: an age such as 30d."),
]
All = Annotated[bool, typer.Option("--all", help="All dead letters.")]

_SAY_WHICH: Final = "Choose dead letters: orders, --reason, --company, --older-than, or --all."
_EVER: Final = datetime.max.replace(tzinfo=UTC)
_LAST: Final = 12
"""Steps of the order's trail that are shown: enough to see how it ended; `orders explain` shows all."""


@cli.command("list", epilog=epilog("ota-receiver dead list --reason order_missing"))
def list_(
    reason: Reason = None,
    company: context.CompanyOption = None,
    since: context.Since = None,
    until: context.Until = None,
    limit: context.Limit = 50,
    as_json: context.Json = False,
) -> None:
    """List dead letters: orders first, then deliveries to sinks, oldest first. Exits 0 also if there are none."""
    with open_context(company) as here:
        now = times.now()
        query = DeadQuery(company_id=here.company_id, reason=reason, since=since, until=until or now)
        found = islice(here.dead_letters.oldest_first(query), limit + 1)
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


@cli.command(epilog=epilog("ota-receiver dead show CM-4711"))
def show(
    order: Annotated[str, typer.Argument(metavar="ORDER", help="orderId or reference.")],
    company: context.CompanyOption = None,
    as_json: context.Json = False,
) -> None:
    """Show why an order, or a hand-on of it, was given up, what was tried, and what to do."""
    with open_context(company) as here:
        key = here.order(order)
        letters, view = here.dead_letters.of(key), view_of(here, key)
        if not letters or view is None:
            raise Stop(f"{order!r} has no dead letter.", FOUND)
        if as_json:
            for letter in letters:
                console.json_line(view.as_object() | _view(here, letter, times.now()))
            return
        for letter in letters:
            what = f"delivery to {letter.sink}" if letter.sink else "fetch"
            http = f" (HTTP {letter.http})" if letter.http else ""
            failed = f"{times.short(letter.at)} ({times.age(times.now() - letter.at)} ago)"
            console.say(f"{what} failed for good {failed}: {letter.reason}{http}")
        for line in view.lines(_LAST):
            console.say(line)


@cli.command(epilog=epilog("ota-receiver dead requeue --reason order_missing --dry-run"))
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
    """Requeue dead letters: an order is fetched again, a delivery goes to its sink again.

    What is no dead letter (any more) is counted in `not_dead` and stops nothing.
    """
    if not (ids or reason or company or older_than or everything):
        raise Stop(_SAY_WHICH)
    with open_context(company) as here:
        letters = _chosen(here, ids, reason, company, older_than)
        count, stale = letters.count()
        if not count:
            raise Stop("No dead letter matches.", FOUND)
        not_dead = letters.not_dead + stale
        if dry_run:
            text = f"{console.many(count, 'dead letter')} would be requeued."
            console.tell(text, {"letters": count, "not_dead": not_dead, "dry_run": True}, as_json)
        else:
            console.confirm(f"Requeue {console.many(count, 'dead letter')}?", yes)
            here.note("requeue", letters.words(), count, who, why)
            revived = _revive(here, iter(letters), count, "live" if live else "backfill")
            revived = msgspec.structs.replace(revived, not_dead=not_dead)
            console.tell(revived.sentence(), revived, as_json)
    if not_dead:
        raise typer.Exit(FOUND)


@cli.command(epilog=epilog("ota-receiver dead drop --older-than 30d --dry-run"))
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
    """Discard dead letters for good: they are not fetched or delivered, and expire after ORDER_DAYS.

    What was fetched before stays. A new event of the order, or `orders refetch`, fetches it as ever.
    """
    if not (ids or reason or company or older_than or everything):
        raise Stop(_SAY_WHICH)
    with open_context(company) as here:
        letters = _chosen(here, ids, reason, company, older_than)
        # Also those that have lost their record: this is how they leave the list.
        count = sum(letters.count())
        if not count:
            raise Stop("No dead letter matches.", FOUND)
        if dry_run:
            text = f"{console.many(count, 'dead letter')} would be discarded."
            console.tell(text, {"letters": count, "not_dead": letters.not_dead, "dry_run": True}, as_json)
        else:
            console.confirm(f"Discard {console.many(count, 'dead letter')} for good?", yes)
            here.note("drop", letters.words(), count, who, why)
            dropped = _drop(here, iter(letters), count)
            told = {"discarded": dropped, "not_dead": letters.not_dead + count - dropped}
            console.tell(f"{console.many(dropped, 'dead letter')} discarded.", told, as_json)
    if letters.not_dead:
        raise typer.Exit(FOUND)


def _chosen(
    here: CommandContext, ids: list[str] | None, reason: str | None, company: str | None, older_than: datetime | None
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
    not_dead: int = 0

    def sentence(self) -> str:
        orders = f"{console.many(self.queued, 'order')} queued, {self.waiting:,} waiting already"
        not_dead = f", {self.not_dead:,} skipped: no dead letter" if self.not_dead else ""
        return f"{orders}, {self.sinks:,} {'delivery' if self.sinks == 1 else 'deliveries'} due now{not_dead}."


def _revive(
    here: CommandContext, letters: Iterator[DeadLetter], count: int, queue: Literal["live", "backfill"]
) -> Revived:
    """Go through the letters once more instead of keeping them: there may be hundreds of thousands."""
    queued = waiting = sinks = 0
    ledger = here.ledger
    with console.progress("giving new tries", count) as step:
        while chunk := list(islice(letters, CHUNK)):
            known = [letter for letter in chunk if letter.reason != RECORD_GONE]
            orders = [letter.key for letter in known if not letter.sink]
            pushed = ledger.request_fetch(orders, queue=queue, reason="requeue")
            queued, waiting = queued + pushed, waiting + len(orders) - pushed
            sinks += sum(ledger.retry_delivery(letter.key, letter.sink) for letter in known if letter.sink)
            step(len(known))
    return Revived(queued, waiting, sinks)


def _drop(here: CommandContext, letters: Iterator[DeadLetter], count: int) -> int:
    dropped = 0
    with console.progress("giving up for good", count) as step:
        for letter in letters:
            dropped += here.ledger.discard(letter.key, letter.sink)
            step(1)
    return dropped


def _view(here: CommandContext, letter: DeadLetter, now: datetime) -> dict[str, object]:
    age = {"age_s": int((now - letter.at).total_seconds())}
    return {"company": here.companies.slug(letter.company_id)} | msgspec.structs.asdict(letter) | age


def _row(here: CommandContext, letter: DeadLetter, now: datetime) -> tuple[object, ...]:
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
