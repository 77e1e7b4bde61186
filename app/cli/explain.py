"""The command that answers "where is the ticket of this order" on one page: what happened, what is owed, what to do."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated, Final

import msgspec
import typer

from app.cli import moment, options, output, timeline
from app.cli.advice import next_step
from app.cli.exits import FOUND, Stop
from app.cli.lacks import UNREADABLE, Lack, lacks
from app.cli.mask import masked
from app.cli.session import session
from app.cli.spans import Asked, Spans, spans
from app.cli.timeline import Step
from app.errors import UnreadableAnswer
from app.store.record import OrderRecord, State
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
        state, trail = record.state(moment.now()), archive.trail(record.key)
        lacking = tuple(lacks(record, state, archive.due(record.key), here.settings.sinks))
        try:
            fetched = archive.order(record.key)
        except UnreadableAnswer:
            fetched, lacking = None, (*lacking, UNREADABLE)
        found = Explained(
            company=here.companies.slug(record.company_id),
            order_id=record.order_id,
            state=state,
            status=record.known_status,
            complete=not lacking,
            references=(fetched.references if fetched is not None else ()) or tuple(filter(None, [record.reference])),
            status_message=(masked(fetched).status_message or "") if fetched is not None else "",
            content=_content(record, lacking),
            lacks=lacking,
            next=next_step(record, state, lacking, here.name(record.key)),
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


def _content(record: OrderRecord, lacking: Sequence[Lack]) -> str:
    if record.erased:
        return "erased"
    if UNREADABLE in lacking:
        return f"unreadable; revision {record.revision}"
    if not record.revision:
        return "never fetched"
    counts = ((record.wallets, "wallet"), (record.tickets, "ticket"), (record.coupons, "coupon"))
    told = ", ".join(output.many(count, noun) for count, noun in counts)
    return f"{told}, {'a' if record.manifest else 'no'} manifest; revision {record.revision}"


def _page(found: Explained) -> Iterator[str]:
    yield f"order {found.order_id} ({found.company})"
    state = ", ".join(filter(None, (found.state, found.status)))
    yield from _fact("state", ("COMPLETE: " if found.complete else "NOT COMPLETE: ") + state)
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
