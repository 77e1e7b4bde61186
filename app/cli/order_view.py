"""The command that answers "where is the ticket of this order" on one page: what happened, what is owed, what to do.

How an order is shown: a row of a list, or a page of its own.

What an order is without: a fetch, a hand-on to a sink, content that can be read; and when somebody looks again.

What to do next, in a sentence: for an order, by where it stands and why.

The trail of an order in sentences.

What happened to an order as steps in time: repeats folded, each with the time since the step before.

How long an order took, read off its trail: its event until it was fetched and handed on, and apart from it a wish.

A fetch covers what was asked for before it began (its `begin`): an event that comes while it runs is the next one's.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import Annotated, Final, assert_never

import msgspec
import typer

from app import times
from app.cli import console, context
from app.cli.console import FOUND, Stop
from app.cli.context import session
from app.cli.mask import masked
from app.errors import UnreadableAnswer
from app.ledger.history import (
    LONGEST,
    Begun,
    Dropped,
    Entry,
    Erased,
    Failed,
    GaveUp,
    HandedOn,
    Heard,
    Refused,
    Rehanded,
    Repeated,
    Revived,
    Stored,
    Unread,
    Wanted,
)
from app.ledger.orders import OrderRecord, SinkRecord, State
from app.upstream.models import UNSETTLED, Item, Order, Wallet


class Lack(msgspec.Struct, frozen=True):
    """Something that an order is without: `next` is when somebody looks again, None if nobody does by itself."""

    what: str
    next: datetime | None


UNREADABLE: Final = Lack("its content is unreadable", None)


def lacks(record: OrderRecord, state: State, due: datetime | None, configured: tuple[str, ...]) -> Iterator[Lack]:
    """Return what the order is without; `due` is when it is looked at again, `configured` the sinks of the settings."""
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
    for sink in sinks(record, configured):
        yield from _of_sink(sink, record.revision, due)


def sinks(record: OrderRecord, configured: tuple[str, ...]) -> Iterator[SinkRecord]:
    """Return how far each sink is, also one that was never tried.

    One that the settings no longer name is owed nothing, unless it left a dead letter.
    """
    known = {sink.name: sink for sink in record.sinks}
    for name in dict.fromkeys([*configured, *known]):
        sink = known.get(name) or SinkRecord(name=name, revision=0, tries=0, next=None, dead="")
        if name in configured or sink.dead:
            yield sink


def _of_sink(sink: SinkRecord, revision: int, due: datetime | None) -> Iterator[Lack]:
    if sink.dead:
        yield Lack(f"{sink.name} gave up revision {revision}: {sink.dead}", None)
    elif sink.revision < revision:
        tried = f", tried {console.many(sink.tries, 'time')} so far" if sink.tries else ""
        yield Lack(f"{sink.name} has revision {sink.revision} of {revision}{tried}", sink.next or due)
    elif sink.dropped and sink.dropped >= revision:
        yield Lack(f"{sink.name} never had revision {revision}: given up for good, by hand", None)


_BY_STATUS: Final = {
    "Issued": "Nothing: the tickets are here.",
    "Draft": (
        "Once it is paid: ota-receiver orders confirm {id} --payment-reference REF."
        " If it will not be: ota-receiver orders cancel {id}"
    ),
    "Error": (
        "Read the status message, then replace the order upstream (an event follows),"
        " or: ota-receiver orders cancel {id}"
    ),
    "Cancelled": "Nothing: it was cancelled.",
}

_BY_REASON: Final = {
    "order_missing": "Upstream knows no such order. If it should, ask NaviPartner",
    "kills_worker": "Its fetch ended its workers: look at pool.worker_died in the logs",
    "unsettled": "Upstream never finished it: look for its job there",
    "bad_request": "Upstream answers 400: ask NaviPartner with the order's id",
    "unreadable_answer": "Upstream's answer is no order: ask NaviPartner with the order's id",
}


def next_step(record: OrderRecord, state: State, lacks: Sequence[Lack], name: str) -> str:
    """Return what a person should do about an order, or that it is nothing.

    `lacks` is what it is without, `name` what names it, and no other, on a command line (`Session.name`).
    """
    if state == "erased":
        return "Nothing: it was erased on request, and is neither fetched nor handed on any more."
    if state == "dead":
        return f"{_BY_REASON.get(record.dead, f'Mend the cause ({record.dead})')}. {_then('dead requeue', name)}"
    if state == "parked":
        return f"Nothing for this order; the connection holds it up ({record.error or 'busy'}): ota-receiver check"
    if state in {"owed", "fetching"}:
        return "Nothing: it will be fetched" + (f", last trouble: {record.error}." if record.error else ".")
    if record.dead_sinks:
        return f"Mend the sink that gave it up ({record.dead_sinks[0].dead}). {_then('dead requeue', name)}"
    if UNREADABLE in lacks:
        return f"What is kept of it is unreadable. {_then('orders refetch', name)}"
    told = _at_rest(record, state, name)
    # Whoever is told that there is nothing to do believes that all is done.
    return (_handed_on(lacks, state, name) or told) if told.startswith("Nothing") else told


def _at_rest(record: OrderRecord, state: State, name: str) -> str:
    if state == "gone":
        return "Nothing: it was deleted upstream."
    if state == "dropped":
        again = f"a new event fetches it, or: ota-receiver orders refetch {name}"
        return f"Nothing: it was given up for good ({record.error}); {again}"
    if record.status == "Issued" and not record.manifest:
        return "Nothing, if this partner has no design template: that is why there is no manifest."
    if record.status in UNSETTLED:
        return f"It has not settled. {_then('orders refetch', name)}"
    told = _BY_STATUS.get(record.status, f"We do not know this status: look upstream. {_then('orders refetch', name)}")
    return told.format(id=name)


def _handed_on(lacks: Sequence[Lack], state: State, name: str) -> str:
    moments = [lack.next for lack in lacks if lack.next is not None]
    if moments:
        return f"Nothing: it is handed on at {times.short(min(moments))}."
    if not lacks or state == "dropped":
        return ""
    return f"Nobody looks again by itself. To hand it on: ota-receiver events replay --order {name} --to-sinks"


def _then(command: str, name: str) -> str:
    return f"Then: ota-receiver {command} {name}"


_VERDICTS = {
    "again": "will be tried again",
    "park": "parked, no try is burnt",
    "missing": "not there yet",
    "dead": "given up",
    "gone": "deleted upstream",
}


def sentence(entry: Entry) -> str:
    """Return what an entry says."""
    match entry:
        case Heard():
            return f"event {entry.event_id}: {entry.status}, {entry.outcome} (secret {entry.secret})"
        case Repeated():
            return f"the same event again: {entry.status}, dropped (secret {entry.secret})"
        case Wanted():
            return f"asked for by {entry.why}, queue {entry.queue}"
        case Begun():
            return f"fetch {entry.fence} begun by {entry.worker}"
        case Stored():
            answer = f"{entry.status}, revision {entry.revision}"
            return f"fetch {entry.fence} stored: {answer}{_call(entry.http, entry.duration_ms)}"
        case Refused():
            return f"fetch {entry.fence} came too late: a later one has taken over"
        case Failed():
            what = _VERDICTS.get(entry.verdict, entry.verdict)
            return f"fetch {entry.fence} failed: {entry.reason}{_call(entry.http, entry.duration_ms)}, {what}"
        case GaveUp():
            return f"given up: {entry.reason}"
        case HandedOn():
            why = f" ({entry.reason})" if entry.reason else ""
            return f"revision {entry.revision} to {entry.sink}: {entry.outcome}{why}, {entry.duration_ms} ms"
        case Revived():
            return f"new tries for {entry.sink}"
        case Rehanded():
            return f"the stored revision is owed to {entry.sink} once more, by replay {entry.plan}"
        case Dropped():
            what = f"the hand-on to {entry.sink}" if entry.sink else "the fetch"
            return f"{what} given up for good, by hand ({entry.reason})"
        case Erased():
            return "erased: all else that was known of it"
        case Unread():
            return entry.text
        case _:
            assert_never(entry)


def _call(http: int | None, duration_ms: int) -> str:
    if http is not None:
        return f" (HTTP {http} in {duration_ms} ms)"
    # No call at all was made: no slot was free, or the breaker was open.
    return f" (no answer in {duration_ms} ms)" if duration_ms else ""


WIDTH: Final = 80
_STEP_INDENT: Final = 24
_MS: Final = timedelta(milliseconds=1)
_UNITS: Final = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"))


class Step(msgspec.Struct, frozen=True):
    """One thing that happened at `at`, or `times` times the same until `until`; `since_ms` since the step before."""

    at: datetime
    since_ms: int | None
    what: str
    text: str
    times: int
    until: datetime


def steps(trail: Sequence[Entry]) -> tuple[Step, ...]:
    """Return the entries of a trail, oldest first, as steps."""
    # The begin of a fetch that failed says nothing that its end does not.
    failed = {entry.fence for entry in trail if isinstance(entry, Failed | Refused)}
    told = [entry for entry in trail if not (isinstance(entry, Begun) and entry.fence in failed)]
    found: list[Step] = []
    before: datetime | None = None
    for _, group in groupby(enumerate(told), key=_likeness):
        entries = [entry for _, entry in group]
        first, last = entries[0], entries[-1]
        since = None if before is None else round((first.at - before) / _MS)
        before = last.at
        what = first.__struct_config__.tag
        found.append(Step(first.at, since, str(what), sentence(last), len(entries), last.at))
    return tuple(found)


def lines(found: Iterable[Step]) -> Iterator[str]:
    """Return the steps for a screen of 80 columns: local time, time since the step before, and what happened."""
    day = None
    for step in found:
        local = step.at.astimezone()
        if local.date() != day:
            day = local.date()
            yield f"{day.isoformat()} ({local.tzname()})"
        clock = f"{local:%H:%M:%S}.{local.microsecond // 1000:03}"
        since = "" if step.since_ms is None else f"+{span(step.since_ms)}"
        text = step.text if step.times == 1 else f"{step.text}; {step.times} times until {_until(step)}"
        yield from textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"{clock}{since:>10}  ",
            subsequent_indent=" " * _STEP_INDENT,
            break_on_hyphens=False,
        )


def span(milliseconds: int) -> str:
    """Return a span as people read it: `84 ms`, `1.2 s`, `12 min`."""
    for size, unit in _UNITS:
        if milliseconds >= size:
            amount = milliseconds / size
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{milliseconds} ms"


def _until(step: Step) -> str:
    local = step.until.astimezone()
    same_day = local.date() == step.at.astimezone().date()
    return f"{local:%H:%M:%S}" if same_day else f"{local:%m-%d %H:%M:%S}"


def _likeness(numbered: tuple[int, Entry]) -> tuple[object, ...]:
    """Return what neighbours must share to be one step; what must not be folded has its own number."""
    number, entry = numbered
    match entry:
        case Repeated():
            return (Repeated, entry.status, entry.secret)
        case Heard(outcome="coalesced"):
            return (Heard, entry.status, entry.secret)
        case Failed(verdict="park" | "missing"):
            return (Failed, entry.reason, entry.http)
        case HandedOn(outcome="again"):
            return (HandedOn, entry.sink, entry.revision, entry.reason)
    return (number,)


class Asked(msgspec.Struct, frozen=True):
    """What people, a replay or reconciling asked for, `by` whom, and how long that took; None = not (yet)."""

    by: str
    fetched_ms: int | None = None
    handed_ms: int | None = None


class Spans(msgspec.Struct, frozen=True):
    """From the event that was fetched last until it was fetched, and handed on; None = not.

    `asked`: what was asked for since, or to bring that event home after all (a requeue).
    """

    fetched_ms: int | None = None
    handed_ms: int | None = None
    asked: Asked | None = None


def spans(trail: Sequence[Entry]) -> Spans:
    """Return how long it took, as far as the trail, oldest first, reaches."""
    reading = _Reading()
    for entry in trail:
        reading.read(entry)
    return reading.spans


class _Reading:
    """The trail read so far."""

    def __init__(self) -> None:
        self.spans = Spans()
        self._asks: list[Heard | Wanted] = []
        self._dones = 0
        # Fence -> how many had asked, from the first on, when that fetch began. One whose begin the trail has lost
        # covers nothing that it still shows.
        self._begun: dict[int, int] = {}
        self._event = self._wish = datetime.max
        self._revision = 0
        self._rehanded: set[str] = set()

    def read(self, entry: Entry) -> None:
        match entry:
            case Heard() | Wanted():
                self._asks.append(entry)
            case Begun():
                self._begun[entry.fence] = len(self._asks)
            case Stored():
                self._stored(entry)
            case Failed(verdict="gone"):
                self._dones = max(self._dones, self._begun.get(entry.fence, 0))
            case Dropped(sink=""):
                self._dones = len(self._asks)
            case Rehanded():
                if not self._rehanded:
                    self._wish = entry.at
                    self.spans = msgspec.structs.replace(self.spans, asked=Asked(f"replay:{entry.plan}"))
                self._rehanded.add(entry.sink)
            case HandedOn(outcome="done"):
                self._handed(entry)

    def _stored(self, entry: Stored) -> None:
        end = self._begun.get(entry.fence, 0)
        covered = self._asks[self._dones : end]
        event = next((one for one in covered if isinstance(one, Heard)), None)
        wish = next((one for one in covered if isinstance(one, Wanted)), None)
        if event is not None:
            self._event, self._revision = event.at, entry.revision
            self.spans = Spans(_between(event.at, entry.at))
        if wish is not None:
            self._wish = wish.at
            asked = Asked(wish.why, _between(wish.at, entry.at))
            self.spans = msgspec.structs.replace(self.spans, asked=asked)
        self._rehanded.clear()
        # Not settled, it is owed still, and its next fetch counts from the same event.
        if entry.status not in UNSETTLED:
            self._dones = max(self._dones, end)

    def _handed(self, entry: HandedOn) -> None:
        asked = self.spans.asked
        if entry.sink in self._rehanded or (asked is not None and entry.revision > self._revision):
            asked = asked and msgspec.structs.replace(asked, handed_ms=_between(self._wish, entry.at))
            self.spans = msgspec.structs.replace(self.spans, asked=asked)
        elif self.spans.fetched_ms is not None and entry.revision == self._revision:
            self.spans = msgspec.structs.replace(self.spans, handed_ms=_between(self._event, entry.at))


def _between(start: datetime, end: datetime) -> int:
    return round((end - start) / _MS)


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
    company: context.CompanyOption = None,
    as_json: context.Json = False,
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
        state, trail = record.state(times.now()), archive.trail(record.key)
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
            steps=steps(trail),
            older_steps_lost=len(trail) >= LONGEST,
        )
    if as_json:
        console.json_line(found)
    else:
        for line in _page(found):
            console.say(line)
    if not found.complete:
        raise typer.Exit(FOUND)


def _not_here(text: str, as_json: bool) -> None:
    told = [line.format(text=text) for line in _NOT_HERE]
    if as_json:
        console.json_line({"order": text, "state": "unknown", "complete": False, "next": " ".join(told)})
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
    told = ", ".join(console.many(count, noun) for count, noun in counts)
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
    yield from lines(found.steps)
    yield ""
    for name, took in zip(("took", ""), _took(found.spans), strict=False):
        yield from _fact(name, took)
    for lack in found.lacks:
        again = f"; looked at again {times.short(lack.next)}" if lack.next is not None else ""
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
            WIDTH,
            initial_indent=indent if found else first,
            subsequent_indent="    " if is_command else further,
            break_on_hyphens=False,
        )
    return found


def _took(found: Spans) -> Iterator[str]:
    if found.fetched_ms is not None:
        yield f"event to fetched {span(found.fetched_ms)}{_handed(found)}"
    if (asked := found.asked) is not None and (asked.fetched_ms, asked.handed_ms) != (None, None):
        fetched = "" if asked.fetched_ms is None else f" to fetched {span(asked.fetched_ms)}"
        yield f"{asked.by}{fetched}{_handed(asked)}"


def _handed(found: Spans | Asked) -> str:
    if found.handed_ms is None:
        return ""
    return f"{'' if found.fetched_ms is None else ','} handed on after {span(found.handed_ms)}"


def columns() -> tuple[str, ...]:
    """Return the headings of `row`."""
    changed = f"changed ({console.zone()})"
    counts = ("#wallets", "#tickets", "#coupons")
    return (changed, "?company", "=order", "state", "status", *counts, "?reference", "trouble")


def row(record: OrderRecord, slug: str, now: datetime) -> tuple[object, ...]:
    """Return an order as one row."""
    sinks = ", ".join(sink.dead for sink in record.dead_sinks)
    return (
        times.short(record.changed),
        slug,
        record.order_id,
        record.state(now),
        record.known_status,
        record.wallets,
        record.tickets,
        record.coupons,
        record.reference,
        record.dead or record.error or sinks,
    )


@dataclass(frozen=True)
class OrderPage:
    """All that is known of one order; `order` has been masked already, if it was to be.

    `sinks`: also those that were never tried; `name`: what names the order on a command line.
    """

    slug: str
    record: OrderRecord
    state: State
    due: datetime | None
    order: Order | None
    lacks: tuple[Lack, ...]
    sinks: tuple[SinkRecord, ...]
    name: str
    trail: tuple[Entry, ...]

    def as_object(self) -> dict[str, object]:
        """Return the page for machines; the order's own fields are named as upstream names them."""
        about = {"company": self.slug, "state": self.state, "next": self._next(), "due": self.due}
        return about | msgspec.structs.asdict(self.record) | {"order": self.order, "trail": self.trail}

    def print(self) -> None:
        """Print the page for people."""
        record, order = self.record, self.order
        console.facts(
            f"order {record.order_id}",
            [
                ("company", self.slug),
                ("state", self.state),
                ("next", self._next()),
                ("status", record.known_status),
                ("status message", order.status_message if order else None),
                ("our reference", order.sell_to_order_reference if order else None),
                ("their reference", record.reference or (order.buy_from_order_reference if order else None)),
                ("content", self._content()),
                ("manifest", order.manifest_url if order else None),
                ("fetched", times.short(record.fetched)),
                ("erased", times.short(record.erased)),
                ("looked at again", times.short(self.due)),
                ("trouble", self._trouble()),
                *((f"sink {sink.name}", _sink(sink, record.revision)) for sink in self.sinks),
            ],
        )
        if order is not None and order.wallets:
            headings = ("line", "visit", "wallet", "guest", "asset", "number", "item", "description")
            console.table("", headings, (cells for item in order.items for cells in _assets(item)))
        console.table("", (f"when ({console.zone()})", "what"), ((times.short(e.at), sentence(e)) for e in self.trail))

    def _next(self) -> str:
        return next_step(self.record, self.state, self.lacks, self.name)

    def _content(self) -> str:
        record = self.record
        if record.erased:
            return "erased"
        if UNREADABLE in self.lacks:
            return f"unreadable, revision {record.revision}"
        if not record.revision:
            return "never fetched"
        counts = ((record.wallets, "wallet"), (record.tickets, "ticket"), (record.coupons, "coupon"))
        parts = ", ".join(console.many(count, what) for count, what in counts)
        return f"{parts}, revision {record.revision}, " + ("with a manifest" if record.manifest else "no manifest")

    def _trouble(self) -> str:
        record = self.record
        if not (record.error or record.dead):
            return ""
        counts = (
            (record.tries, "try", "tries"),
            (record.looks, "look", "looks"),
            (record.parks, "wait", "waits"),
            (record.crashes, "crash", "crashes"),
        )
        told = [f"{count} {one if count == 1 else several}" for count, one, several in counts if count]
        return ", ".join([record.dead or record.error, *([f"HTTP {record.http}"] if record.http else []), *told])


def _sink(sink: SinkRecord, revision: int) -> str:
    if sink.dead:
        return f"given up at revision {sink.revision} of {revision}: {sink.dead}"
    if sink.dropped and sink.dropped >= revision:
        return f"never had revision {revision}: given up for good, by hand"
    if sink.revision >= revision:
        return f"has revision {sink.revision}"
    again = f", tried {console.many(sink.tries, 'time')}, next {times.short(sink.next) or 'now'}" if sink.tries else ""
    return f"has revision {sink.revision} of {revision}{again}"


def _assets(item: Item) -> list[tuple[object, ...]]:
    visit = " ".join(str(part) for part in (item.visit_date, item.visit_time) if part is not None)
    rows: list[tuple[object, ...]] = []
    for wallet in item.wallets:
        rows.append((item.line_no, visit, *_wallet(wallet)))
        rows += [
            ("", "", "", "", asset.type, asset.reference_number, asset.item_number, asset.description)
            for asset in wallet.assets
        ]
    return rows


def _wallet(wallet: Wallet) -> tuple[object, ...]:
    return (
        wallet.external_reference_number,
        wallet.name,
        "wallet",
        wallet.wallet_reference_number,
        "",
        wallet.manifest_url,
    )
