"""The command that answers "where is the ticket of this order" on one page: what happened, what is owed, what to do."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Final

import msgspec
import typer

from app.cli import moment, options, output, timeline
from app.cli.advice import next_step
from app.cli.exits import FOUND, Stop
from app.cli.mask import masked
from app.cli.session import session
from app.cli.spans import Asked, Spans, spans
from app.cli.timeline import Step
from app.store.record import OrderRecord, SinkRecord, State
from app.store.trail import LONGEST

CODES: Final = (
    "Exit codes: 0 complete: fetched, and every sink has it (or it was deleted upstream) · 1 not complete, or not here"
    " · 2 usage or settings · 3 Redis does not answer · 4 its data is of a newer version · 130 interrupted"
)

_NOT_HERE: Final = (
    "No order {text!r} is here: no event of it was accepted, or ORDER_DAYS have passed.",
    "It may not have settled yet: an event comes about a minute after createOrder. Then wait.",
    (
        "Its event may have been lost, or refused for its secret. The Channel Manager's own list of orders shows it"
        " (this needs NP_PARTNER_ID): ota-receiver reconcile --from-zero --apply"
    ),
    "If nothing at all comes, this tells what is wrong with the subscription: ota-receiver check",
    "A reference of an order that was never fetched is only searched among the newest: give the orderId.",
)
_INDENT: Final = 10
_COMMAND: Final = re.compile(r"(ota-receiver .*?)(?:\. (?=If )|$)")


class Lack(msgspec.Struct, frozen=True):
    """Something that an order is without: `next` is when somebody looks again, None if nobody does by itself."""

    what: str
    next: datetime | None


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer; its fields are those of --json."""

    company: str
    order_id: str
    state: State
    status: str
    complete: bool
    references: tuple[str, ...]
    status_message: str
    content: str
    lacks: tuple[Lack, ...]
    next: str
    spans: Spans
    steps: tuple[Step, ...]
    older_steps_lost: bool


def explain(
    order: Annotated[
        str, typer.Argument(metavar="ORDER", help="orderId, or its buyFromOrderReference or sellToOrderReference.")
    ],
    company: options.Company = None,
    as_json: options.Json = False,
) -> None:
    """Tell where an order is: all that happened to it, what is still owed, when it is looked at again, what to do."""
    with session() as here:
        try:
            key = here.order(order, here.companies.id_of(company))
            record = here.books.archive.record(key)
        except Stop as stop:
            if stop.code != FOUND:
                raise
            record = None
        if record is None:
            _not_here(order, as_json)
            raise typer.Exit(FOUND)
        archive = here.books.archive
        state, fetched, trail = record.state(moment.now()), archive.order(record.key), archive.trail(record.key)
        lacks = tuple(_lacks(record, state, archive.due(record.key), here.settings.sinks))
        found = Explained(
            company=here.companies.slug(record.company_id),
            order_id=record.order_id,
            state=state,
            status=record.known_status,
            complete=not lacks,
            references=(fetched.references if fetched is not None else ()) or tuple(filter(None, [record.reference])),
            status_message=(masked(fetched).status_message or "") if fetched is not None else "",
            content=_content(record),
            lacks=lacks,
            next=next_step(record, state),
            spans=spans(trail),
            steps=timeline.steps(trail),
            older_steps_lost=len(trail) >= LONGEST,
        )
    if as_json:
        output.json_line(found)
    else:
        for line in _page(found):
            output.say(line)
    if not found.complete:
        raise typer.Exit(FOUND)


def _not_here(text: str, as_json: bool) -> None:
    told = [line.format(text=text) for line in _NOT_HERE]
    if as_json:
        output.json_line({"order": text, "state": "unknown", "complete": False, "next": " ".join(told)})
        return
    for line in (line for sentence in told for line in _wrapped(sentence, "", "")):
        print(line, file=sys.stderr)  # noqa: T201  # as Stop does: nothing was found


def _lacks(record: OrderRecord, state: State, due: datetime | None, configured: tuple[str, ...]) -> Iterator[Lack]:
    if state == "erased":
        yield Lack("it was erased on request: nothing of it is kept, and no new event fetches it", None)
        return
    if state == "dead":
        yield Lack(f"the fetch was given up: {record.dead}", None)
    elif state == "dropped":
        yield Lack(f"the fetch was given up for good, by hand: {record.error}", None)
    elif state in {"owed", "fetching", "parked"}:
        doing = {"owed": "a fetch is to come", "fetching": "is being fetched", "parked": "the connection is at fault"}
        trouble = f" ({record.error})" if record.error else ""
        yield Lack(f"{doing[state]}{trouble}", due)
    known = {sink.name: sink for sink in record.sinks}
    unheard = SinkRecord(name="", revision=0, tries=0, next=None, dead="")
    for name in dict.fromkeys([*configured, *known]):
        sink = known.get(name, unheard)
        # One that the settings no longer name is owed nothing, unless it left a dead letter.
        if name in configured or sink.dead:
            yield from _sink(name, sink, record.revision, due)


def _sink(name: str, sink: SinkRecord, revision: int, due: datetime | None) -> Iterator[Lack]:
    if sink.dead:
        yield Lack(f"{name} gave up revision {revision}: {sink.dead}", None)
    elif sink.revision < revision:
        tried = f", {sink.tries} tries so far" if sink.tries else ""
        yield Lack(f"{name} has revision {sink.revision} of {revision}{tried}", sink.next or due)
    elif sink.dropped and sink.dropped >= revision:
        yield Lack(f"{name} never had revision {revision}: given up for good, by hand", None)


def _content(record: OrderRecord) -> str:
    if record.erased:
        return "erased"
    if not record.revision:
        return "never fetched"
    counts = ((record.wallets, "wallet"), (record.tickets, "ticket"), (record.coupons, "coupon"))
    told = ", ".join(output.many(count, noun) for count, noun in counts)
    return f"{told}, {'a' if record.manifest else 'no'} manifest; revision {record.revision}"


def _page(found: Explained) -> Iterator[str]:
    yield f"order {found.order_id} ({found.company})"
    yield from _fact("state", ("COMPLETE: " if found.complete else "NOT COMPLETE: ") + f"{found.state}, {found.status}")
    yield from _fact("known as", ", ".join(found.references))
    yield from _fact("content", found.content)
    yield from _fact("message", found.status_message)
    yield ""
    if found.older_steps_lost:
        yield f"(the last {LONGEST} lines of its trail; older ones are gone)"
    yield from timeline.lines(found.steps)
    yield ""
    for name, took in zip(("took", ""), _took(found.spans), strict=False):
        yield from _fact(name, took)
    for lack in found.lacks:
        again = f"; looked at again {moment.short(lack.next)}" if lack.next is not None else ""
        yield from _fact("owed", f"{lack.what}{again}")
    yield from _fact("next", found.next)


def _fact(name: str, text: str) -> list[str]:
    return _wrapped(text, f"{name:<{_INDENT}}", " " * _INDENT)


def _wrapped(text: str, first: str, further: str) -> list[str]:
    """Return the text on lines of 80 columns; a command stands on its own, to be copied."""
    found: list[str] = []
    for part in filter(None, map(str.strip, _COMMAND.split(text))):
        is_command = part.startswith("ota-receiver ")
        indent = "  " if is_command else further
        found += textwrap.wrap(
            part,
            timeline.WIDTH,
            initial_indent=indent if found else first,
            subsequent_indent="    " if is_command else further,
            break_on_hyphens=False,
        )
    return found


def _took(found: Spans) -> Iterator[str]:
    if found.fetched_ms is not None:
        yield f"event to fetched {timeline.span(found.fetched_ms)}{_handed(found)}"
    if (asked := found.asked) is not None and (asked.fetched_ms, asked.handed_ms) != (None, None):
        fetched = "" if asked.fetched_ms is None else f" to fetched {timeline.span(asked.fetched_ms)}"
        yield f"{asked.by}{fetched}{_handed(asked)}"


def _handed(found: Spans | Asked) -> str:
    if found.handed_ms is None:
        return ""
    return f"{'' if found.fetched_ms is None else ','} handed on after {timeline.span(found.handed_ms)}"
