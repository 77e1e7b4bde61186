"""The commands for dead letters: list, show, requeue, and drop, which discards them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice
from typing import Annotated, Final, Literal

import typer

from app import times
from app.cli import console, context
from app.cli.command import FOUND, Stop, command, commands, flags
from app.cli.context import CommandContext, open_context
from app.cli.order_view import lines
from app.explain.order_view import view_of
from app.explain.words import many
from app.ids import OrderKey
from app.ledger.dead_letters import RECORD_GONE, DeadLetter, DeadQuery

Reason = Annotated[str | None, typer.Option("--reason", help="Reason code, as `dead list` shows it.")]
Sink = Annotated[str | None, typer.Option("--sink", help="Only deliveries to this sink.")]
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

cli = commands(name="dead", help="Dead letters: orders and deliveries that failed for good.")


@dataclass(frozen=True)
class Selection:
    """The dead letters that a command is about: those of `orders`, or if there are none, those that match.

    They are read anew by each iteration: there may be hundreds of thousands. To `discard`, also those of orders that
    have lost their record. To requeue, also deliveries that wait for their next attempt, of named orders and of a named
    sink.
    """

    here: CommandContext
    query: DeadQuery
    orders: tuple[OrderKey, ...]
    discard: bool

    def __iter__(self) -> Iterator[DeadLetter]:
        letters, sink = self.here.dead_letters, self.query.sink
        if self.orders:
            found = (letter for one in self.orders for letter in letters.of(one, waiting=not self.discard))
            return filter(self.query.matches, found)
        dead = letters.oldest_first(self.query)
        if self.discard or not sink:
            return dead
        return chain(dead, filter(self.query.matches, letters.waiting(sink)))

    def words(self) -> str:
        """Return the selection on one line, for the audit."""
        if self.orders:
            return context.about(self.orders)
        until = None if self.query.until == _EVER else self.query.until.isoformat(timespec="seconds")
        named = {"company": self.query.company_id, "sink": self.query.sink, "reason": self.query.reason, "until": until}
        return " ".join(f"{name}={value}" for name, value in named.items() if value is not None)


@command(cli, "ota-receiver dead list --reason order_missing", options="company")
def list_(
    reason: Reason = None,
    sink: Sink = None,
    since: context.Since = None,
    until: context.Until = None,
    limit: context.Limit = 50,
) -> None:
    """List dead letters, oldest first. Orders come before deliveries."""
    with open_context() as here:
        now = here.now()
        age = ("age", lambda letter: times.age(now - letter.at))
        query = DeadQuery(company_id=here.company_id, sink=sink, reason=reason, since=since, until=until or now)
        found = list(islice(here.dead_letters.oldest_first(query), limit + 1))
        company, order, since_ = here.company_column(found), ("=order", "order_id"), ("?@since", "at")
        columns = (age, *company, order, "reason", "=reference", ">sink", ("#http", "http_status"), "?status", since_)
        shown = partial(_view, here, now=now)
        console.listing(found[:limit], columns, shown, nothing="No dead letter matches.")
    if len(found) > limit and not flags().as_json:
        console.remark(f"More than {limit:,}: --limit shows more, --reason and --company fewer.")


@command(cli, "ota-receiver dead show CM-4711", options="company")
def show(order: context.Order) -> None:
    """Show why a fetch or a delivery failed for good. Also what was attempted, and what to do."""
    with open_context() as here:
        now, key = here.now(), here.order(order)
        letters = here.dead_letters.of(key)
        if not letters:
            raise Stop(f"{order!r} has no dead letter.", FOUND)
        view = view_of(here, key)
        if flags().as_json:
            for letter in letters:
                console.json_line(view.as_object() | _view(here, letter, now))
            return
    for letter in letters:
        what = f"delivery to {letter.sink}" if letter.sink else "fetch"
        http = f" (HTTP {letter.http_status})" if letter.http_status else ""
        since = f"{times.short(letter.at)} ({times.age(now - letter.at)} ago)"
        console.say(f"{what} failed for good {since}: {letter.reason}{http}")
    for line in lines(view, _LATEST_STEPS):
        console.say(line)


@command(cli, "ota-receiver dead requeue --reason order_missing --dry-run", options="company dry_run yes who why")
def requeue(
    ids: context.Orders = None,
    reason: Reason = None,
    sink: Sink = None,
    older_than: OlderThan = None,
    everything: All = False,
    live: Annotated[bool, typer.Option("--live", help="Use the live queue instead of the backfill queue.")] = False,
) -> None:
    """Requeue dead letters, to fetch or deliver them again.

    Name orders, or choose with --reason, --sink, --company, --older-than or --all. With orders or --sink, deliveries
    that failed and wait for their next attempt are tried now, too. Orders with none of them are skipped and counted in
    `not_dead`. For other orders use `orders refetch` or `events replay`, for missing orders `reconcile`.
    """
    act = partial(_requeue, "live" if live else "backfill")
    _change("requeue", act, ids or [], reason, sink, older_than, everything)


@command(cli, "ota-receiver dead drop --older-than 30d --dry-run", options="company dry_run yes who why")
def drop(
    ids: context.Orders = None,
    reason: Reason = None,
    sink: Sink = None,
    older_than: OlderThan = None,
    everything: All = False,
) -> None:
    """Discard dead letters for good.

    Name orders, or choose with --reason, --sink, --company, --older-than or --all. They are not fetched or delivered,
    and expire after ORDER_DAYS. Content that was fetched before stays. A new event of the order, or `orders refetch`,
    fetches it again.
    """
    _change("discard", _discard, ids or [], reason, sink, older_than, everything)


def _change(
    what: Literal["requeue", "discard"],
    act: Callable[[Selection, int, int], None],
    named: list[str],
    reason: str | None,
    sink: str | None,
    older_than: datetime | None,
    everything: bool,
) -> None:
    """Select dead letters, ask, and call `act`; a dry run prints the numbers instead.

    `act` gets the dead letters, their number, and how many others are skipped: named orders without a dead letter, and
    for requeue those that have lost their record. Raises Stop when nothing is selected, or the answer is no.
    """
    with open_context() as here:
        if not (named or reason or sink or here.company_id or older_than or everything):
            raise Stop("Choose dead letters: orders, --reason, --sink, --company, --older-than, or --all.")
        # Without an end, what fails again meanwhile would be selected again. Named orders are selected at any time, and
        # what waits for a sink has its time in the future.
        until = older_than or (_EVER if named or sink else here.now())
        query = DeadQuery(company_id=here.company_id, sink=sink, reason=reason, until=until)
        found = [order for text in named if (order := _dead_order(here, text, waiting=what == "requeue")) is not None]
        letters = Selection(here, query, tuple(dict.fromkeys(found)), discard=what == "discard")
        kept = Counter[bool]()
        with console.progress("reading dead letters") as step:
            for letter in letters if found or not named else ():
                step(1)
                kept[what == "discard" or letter.reason != RECORD_GONE] += 1
        count, skipped = kept[True], len(named) - len(found) + kept[False]
        if not count and sink and sink not in here.sinks:
            raise here.no_sink(sink, FOUND)
        if not count:
            raise Stop("No dead letter matches.", FOUND)
        text = many(count, "failure" if what == "requeue" and (named or sink) else "dead letter")
        if flags().dry_run:
            view = {"letters": count, "not_dead": skipped, "dry_run": True}
            console.result(f"{text} would be {what.removesuffix('e')}ed.", view)
        else:
            console.confirm(f"{what.title()} {text}{' for good' if what == 'discard' else ''}?")
            act(letters, count, skipped)
    if skipped:
        raise typer.Exit(FOUND)


def _dead_order(here: CommandContext, text: str, *, waiting: bool) -> OrderKey | None:
    """Return the order of this name; None, and a remark, if it has no dead letter, nor a delivery that waits."""
    order = here.only_order(text)
    if order and here.dead_letters.of(order, waiting=waiting):
        return order
    erased = order and here.orders.erased_among([order])
    console.remark(f"{text!r} {'was erased: it is no longer fetched' if erased else 'has no dead letter'}.")
    return None


def _requeue(queue: Literal["live", "backfill"], letters: Selection, count: int, skipped: int) -> None:
    with console.progress("requeueing", count) as step:
        act = letters.here.operations.requeue
        done = act(letters, queue=queue, selected=letters.words(), count=count, step=step)
    queued, waiting = done.fetches.queued, done.fetches.waiting + done.fetches.erased + done.fetches.broken
    text = f"{many(queued, 'order')} queued, {waiting:,} already waiting"
    due = f"{many(done.deliveries, 'delivery')} due now"
    no_letter = f", {skipped:,} skipped: no dead letter" if skipped else ""
    letters.here.warn_of_disabled(done.sinks)
    found = {"queued": queued, "waiting": waiting, "deliveries": done.deliveries, "not_dead": skipped}
    console.result(f"{text}, {due}{no_letter}.", found)


def _discard(letters: Selection, count: int, skipped: int) -> None:
    with console.progress("discarding", count) as step:
        discarded = letters.here.operations.discard(letters, selected=letters.words(), count=count, step=step)
    found = {"discarded": discarded, "not_dead": skipped + count - discarded}
    console.result(f"{many(discarded, 'dead letter')} discarded.", found)


def _view(here: CommandContext, letter: DeadLetter, now: datetime) -> dict[str, object]:
    return here.view(letter) | {"age_s": int((now - letter.at).total_seconds())}
