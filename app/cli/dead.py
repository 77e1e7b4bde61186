"""The commands for dead letters: list, show, requeue, and drop, which discards them."""

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

Reason = Annotated[str | None, typer.Option("--reason", help="Reason code, as `dead list` shows it.")]
OlderThan = Annotated[
    datetime | None,
    typer.Option(
        "--older-than",
        parser=context.time,
        metavar="TIME",
        help="Only dead letters older than this: an age such as 30d, or a time.",
    ),
]
All = Annotated[bool, typer.Option("--all", help="All dead letters.")]

_EVER: Final = datetime.max.replace(tzinfo=UTC)
_LATEST_STEPS: Final = 12
"""Steps of the order's history that `show` prints: enough to see how it ended; `orders explain` prints all."""

cli = console.commands(name="dead", help="Dead letters: orders and deliveries that failed for good.")


@dataclass(frozen=True)
class Selection:
    """The dead letters a command is about: those of `orders`, or if there are none, those that match.

    They are read anew by each iteration: there may be hundreds of thousands. `skipped`: orders that were named and
    have no dead letter.
    """

    here: CommandContext
    query: DeadQuery
    orders: tuple[OrderKey, ...]
    skipped: int

    @classmethod
    def of(cls, here: CommandContext, named: list[str], query: DeadQuery) -> Selection:
        """Return the selection; a named order without a dead letter is reported and stops nothing.

        Raises Stop when none of the named orders has one.
        """
        found: list[OrderKey] = []
        for text in named:
            try:
                order = here.order(text)
            except Stop as stop:
                if stop.code != FOUND:
                    raise
                console.remark(f"{text!r} has no dead letter.")
                continue
            if here.dead_letters.of(order):
                found.append(order)
            elif here.erasure.erased_among([order]):
                console.remark(f"{text!r} was erased: it is no longer fetched.")
            else:
                console.remark(f"{text!r} has no dead letter.")
        if named and not found:
            raise Stop("No dead letter matches.", FOUND)
        return cls(here, query, tuple(dict.fromkeys(found)), len(named) - len(found))

    def __iter__(self) -> Iterator[DeadLetter]:
        if not self.orders:
            return self.here.dead_letters.oldest_first(self.query)
        return filter(self.query.matches, chain.from_iterable(map(self.here.dead_letters.of, self.orders)))

    def words(self) -> str:
        """Return the selection on one line, for the audit."""
        if self.orders:
            return context.about(self.orders)
        until = self.query.until and self.query.until.isoformat(timespec="seconds")
        named = {"company": self.query.company_id, "reason": self.query.reason, "until": until}
        return " ".join(f"{name}={value}" for name, value in named.items() if value is not None)

    def count(self) -> tuple[int, int]:
        """Return how many dead letters have a record, and how many have lost theirs."""
        count = stale = 0
        with console.progress("reading dead letters") as step:
            for letter in self:
                step(1)
                if letter.reason == RECORD_GONE:
                    stale += 1
                else:
                    count += 1
        return count, stale


@cli.command("list", epilog=epilog("ota-receiver dead list --reason order_missing"))
def list_(
    reason: Reason = None,
    company: context.CompanyOption = None,
    since: context.Since = None,
    until: context.Until = None,
    limit: context.Limit = 50,
    as_json: context.Json = False,
) -> None:
    """List dead letters, oldest first. Orders come before deliveries. Exits 0 also if there are none."""
    now = times.now()

    def row(letter: DeadLetter) -> tuple[object, ...]:
        since = (times.age(now - letter.at), times.short(letter.at))
        order = (here.companies.slug(letter.company_id), letter.order_id)
        return (*since, *order, letter.sink, letter.reason, letter.http, letter.status)

    with open_context(company) as here:
        query = DeadQuery(company_id=here.company_id, reason=reason, since=since, until=until or now)
        found = list(islice(here.dead_letters.oldest_first(query), limit + 1))
        console.listing(
            found[:limit],
            as_json,
            columns=("age", f"?since ({console.zone()})", "?company", "=order", "sink", "reason", "#http", "?status"),
            row=row,
            view=lambda letter: _view(here, letter, now),
        )
    if as_json:
        return
    if not found:
        console.say("No dead letters.")
    elif len(found) > limit:
        console.remark(f"More than {limit:,}: --limit shows more, --reason and --company fewer.")


@cli.command(epilog=epilog("ota-receiver dead show CM-4711"))
def show(order: context.Order, company: context.CompanyOption = None, as_json: context.Json = False) -> None:
    """Show why a fetch or a delivery failed for good. Also what was attempted, and what to do."""
    now = times.now()
    with open_context(company) as here:
        key = here.order(order)
        letters = here.dead_letters.of(key)
        if not letters:
            raise Stop(f"{order!r} has no dead letter.", FOUND)
        view = view_of(here, key)
        if as_json:
            for letter in letters:
                console.json_line(view.as_object() | _view(here, letter, now))
            return
    for letter in letters:
        what = f"delivery to {letter.sink}" if letter.sink else "fetch"
        http = f" (HTTP {letter.http})" if letter.http else ""
        since = f"{times.short(letter.at)} ({times.age(now - letter.at)} ago)"
        console.say(f"{what} failed for good {since}: {letter.reason}{http}")
    for line in view.lines(_LATEST_STEPS):
        console.say(line)


@cli.command(epilog=epilog("ota-receiver dead requeue --reason order_missing --dry-run"))
def requeue(
    ids: context.Orders = None,
    reason: Reason = None,
    company: context.CompanyOption = None,
    older_than: OlderThan = None,
    everything: All = False,
    live: Annotated[bool, typer.Option("--live", help="Use the live queue instead of the backfill queue.")] = False,
    dry_run: context.DryRun = False,
    yes: context.Yes = False,
    who: context.Who = "",
    why: context.Why = "",
    as_json: context.Json = False,
) -> None:
    """Requeue dead letters, to fetch or deliver them again.

    Orders without a dead letter are skipped and counted in `not_dead`.
    """
    with open_context(company) as here:
        letters = _select(here, ids, reason, older_than, everything)
        count, stale = letters.count()
        skipped = letters.skipped + stale
        if _confirmed(letters, count, skipped, "requeue", dry_run, yes, who, why, as_json):
            _requeue(here, letters, count, "live" if live else "backfill", skipped, as_json)
    if skipped:
        raise typer.Exit(FOUND)


@cli.command(epilog=epilog("ota-receiver dead drop --older-than 30d --dry-run"))
def drop(
    ids: context.Orders = None,
    reason: Reason = None,
    company: context.CompanyOption = None,
    older_than: OlderThan = None,
    everything: All = False,
    dry_run: context.DryRun = False,
    yes: context.Yes = False,
    who: context.Who = "",
    why: context.Why = "",
    as_json: context.Json = False,
) -> None:
    """Discard dead letters for good.

    They are not fetched or delivered, and expire after ORDER_DAYS. Content that was fetched before stays. A new event
    of the order, or `orders refetch`, fetches it again.
    """
    with open_context(company) as here:
        letters = _select(here, ids, reason, older_than, everything)
        # A dead letter that has lost its record leaves the list only this way.
        count = sum(letters.count())
        if _confirmed(letters, count, letters.skipped, "discard", dry_run, yes, who, why, as_json):
            _discard(here, letters, count, as_json)
    if letters.skipped:
        raise typer.Exit(FOUND)


def _select(
    here: CommandContext, ids: list[str] | None, reason: str | None, older_than: datetime | None, everything: bool
) -> Selection:
    if not (ids or reason or here.company_id or older_than or everything):
        raise Stop("Choose dead letters: orders, --reason, --company, --older-than, or --all.")
    # Without an end, what fails again meanwhile would be selected again. A named order is selected whatever its time.
    until = older_than or (_EVER if ids else times.now())
    return Selection.of(here, ids or [], DeadQuery(company_id=here.company_id, reason=reason, until=until))


def _confirmed(
    letters: Selection,
    count: int,
    skipped: int,
    what: Literal["requeue", "discard"],
    dry_run: bool,
    yes: bool,
    who: str,
    why: str,
    as_json: bool,
) -> bool:
    """Ask and note the action in the audit, or print what a dry run found; return whether to act.

    Raises Stop when nothing is selected, or the answer is no.
    """
    if not count:
        raise Stop("No dead letter matches.", FOUND)
    selected = console.many(count, "dead letter")
    if dry_run:
        done = {"requeue": "requeued", "discard": "discarded"}[what]
        found = {"letters": count, "not_dead": skipped, "dry_run": True}
        console.result(f"{selected} would be {done}.", found, as_json)
        return False
    console.confirm(f"{what.title()} {selected}{' for good' if what == 'discard' else ''}?", yes)
    letters.here.note("drop" if what == "discard" else what, letters.words(), count, who, why)
    return True


def _requeue(
    here: CommandContext,
    letters: Iterable[DeadLetter],
    count: int,
    queue: Literal["live", "backfill"],
    skipped: int,
    as_json: bool,
) -> None:
    queued = waiting = deliveries = 0
    left = (letter for letter in letters if letter.reason != RECORD_GONE)
    with console.progress("requeueing", count) as step:
        while chunk := list(islice(left, CHUNK)):
            orders = [letter.key for letter in chunk if not letter.sink]
            new = here.ledger.request_fetch(orders, queue=queue, reason="requeue")
            queued, waiting = queued + new, waiting + len(orders) - new
            deliveries += sum(here.ledger.retry_delivery(letter.key, letter.sink) for letter in chunk if letter.sink)
            step(len(chunk))
    text = f"{console.many(queued, 'order')} queued, {waiting:,} already waiting"
    due = f"{console.many(deliveries, 'delivery')} due now"
    no_letter = f", {skipped:,} skipped: no dead letter" if skipped else ""
    found = {"queued": queued, "waiting": waiting, "sinks": deliveries, "not_dead": skipped}
    console.result(f"{text}, {due}{no_letter}.", found, as_json)


def _discard(here: CommandContext, letters: Selection, count: int, as_json: bool) -> None:
    discarded = 0
    with console.progress("discarding", count) as step:
        for letter in letters:
            discarded += here.ledger.discard(letter.key, letter.sink)
            step(1)
    found = {"discarded": discarded, "not_dead": letters.skipped + count - discarded}
    console.result(f"{console.many(discarded, 'dead letter')} discarded.", found, as_json)


def _view(here: CommandContext, letter: DeadLetter, now: datetime) -> dict[str, object]:
    age = {"age_s": int((now - letter.at).total_seconds())}
    return {"company": here.companies.slug(letter.company_id)} | msgspec.structs.asdict(letter) | age
