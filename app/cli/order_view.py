"""One order as people read it: its state, what is outstanding, its history, how long it took, what to do next.

`orders explain`, `orders show` and `dead show` print this view; each adds only what is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from app import times
from app.cli import console
from app.cli.console import FOUND, Stop
from app.cli.context import CommandContext
from app.cli.mask import masked
from app.cli.order_history import Durations, Requested, durations, step_lines, steps
from app.errors import UnreadableAnswer
from app.ids import OrderKey
from app.ledger.history import LONGEST, Entry
from app.ledger.record import OrderRecord, SinkRecord, State
from app.upstream.models import UNSETTLED, Item, Order

_INDENT: Final = 10


class Outstanding(msgspec.Struct, frozen=True):
    """Something that the order still lacks; `next` is the next automatic attempt, None if there is none."""

    what: str
    next: datetime | None


UNREADABLE: Final = Outstanding("its content is unreadable", None)


class OrderView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known about one order.

    `name` identifies it on a command line. `order` is its latest content, masked unless --reveal is given; None if it
    was never fetched or cannot be read. `sinks` includes configured sinks without any attempt. `history` is oldest
    first. `due` is the next automatic attempt.
    """

    company: str
    name: str
    record: OrderRecord
    state: State
    due: datetime | None
    order: Order | None
    sinks: tuple[SinkRecord, ...]
    outstanding: tuple[Outstanding, ...]
    history: tuple[Entry, ...]

    @property
    def complete(self) -> bool:
        """Return whether the order is fetched and every sink has it."""
        return not self.outstanding

    @property
    def references(self) -> tuple[str, ...]:
        return (self.order.references if self.order else ()) or tuple(filter(None, [self.record.reference]))

    @property
    def status_message(self) -> str:
        return (self.order.status_message or "") if self.order else ""

    @property
    def content(self) -> str:
        """Return what is stored of the order, in words."""
        record = self.record
        if record.erased_at:
            return "erased"
        if UNREADABLE in self.outstanding:
            return f"unreadable; revision {record.revision}"
        if not record.revision:
            return "never fetched"
        counts = ((record.wallets, "wallet"), (record.tickets, "ticket"), (record.coupons, "coupon"))
        parts = ", ".join(console.many(count, noun) for count, noun in counts)
        return f"{parts}, {'a' if record.manifest else 'no'} manifest; revision {record.revision}"

    @property
    def error(self) -> str:
        """Return the latest error of the fetch with its counts, "" if there is none."""
        record = self.record
        if not (record.error or record.dead):
            return ""
        counts = (
            (record.attempts, "attempt"),
            (record.rechecks, "recheck"),
            (record.deferrals, "deferral"),
            (record.crashes, "worker crash"),
        )
        parts = [record.dead or record.error, f"HTTP {record.http}" if record.http else ""]
        parts += [console.many(count, noun) for count, noun in counts if count]
        return ", ".join(filter(None, parts))

    def as_object(self) -> dict[str, Any]:
        """Return the view for machines: the record's fields, and what is derived from them."""
        return msgspec.structs.asdict(self.record) | {
            "company": self.company,
            "state": self.state,
            "status": self.record.known_status,
            "complete": self.complete,
            "references": self.references,
            "status_message": self.status_message,
            "content": self.content,
            "due": self.due,
            "outstanding": self.outstanding,
            "next": next_step(self),
            "durations": durations(self.history),
            "steps": steps(self.history),
            "older_steps_lost": len(self.history) >= LONGEST,
        }

    def lines(self, latest: int | None = None) -> Iterator[str]:
        """Return the page for people; `latest` limits the steps shown to so many."""
        yield f"order {self.record.order_id} ({self.company})"
        state = ", ".join(filter(None, (self.state, self.record.known_status)))
        yield from _fact("state", ("COMPLETE: " if self.complete else "NOT COMPLETE: ") + state)
        yield from _fact("known as", ", ".join(self.references))
        yield from _fact("content", self.content)
        yield from _fact("message", self.status_message)
        yield from _fact("error", self.error)
        for sink in self.sinks:
            yield from _fact("sink", f"{sink.name}: {_delivery(sink, self.record.revision)}")
        yield ""
        if len(self.history) >= LONGEST:
            yield f"(only the latest {LONGEST} history entries are kept; older ones are gone)"
        found = steps(self.history)
        yield from step_lines(found if latest is None else found[-latest:])
        yield ""
        for name, text in zip(("took", ""), _took(durations(self.history)), strict=False):
            yield from _fact(name, text)
        for one in self.outstanding:
            attempt = f"; next attempt {times.short(one.next)}" if one.next is not None else ""
            yield from _fact("pending", f"{one.what}{attempt}")
        yield from _fact("next", next_step(self))


def view_of(here: CommandContext, key: OrderKey, *, reveal: bool = False) -> OrderView:
    """Return the view of an order; `reveal` leaves names, numbers and links in it. Raises Stop without a record."""
    record = here.orders.record(key)
    if record is None:
        raise Stop(f"Order {key.order_id} has no record.", FOUND)
    state, due = record.state(times.now()), here.orders.due(key)
    outstanding = tuple(_outstanding(record, state, due, here.settings.sinks))
    try:
        order = here.orders.order(key)
    except UnreadableAnswer:
        order, outstanding = None, (*outstanding, UNREADABLE)
    return OrderView(
        company=here.companies.slug(key.company_id),
        name=here.name(key),
        record=record,
        state=state,
        due=due,
        order=order if order is None or reveal else masked(order),
        sinks=tuple(_sinks(record, here.settings.sinks)) if record.revision else record.sinks,
        outstanding=outstanding,
        history=here.orders.history(key),
    )


def asset_rows(items: Sequence[Item]) -> Iterator[tuple[object, ...]]:
    """Return wallets, tickets and coupons as rows: line, visit, wallet, guest, asset, number, item, description."""
    for item in items:
        visit = " ".join(str(part) for part in (item.visit_date, item.visit_time) if part is not None)
        for wallet in item.wallets:
            number, link = wallet.wallet_reference_number, wallet.manifest_url
            yield (item.line_no, visit, wallet.external_reference_number, wallet.name, "wallet", number, "", link)
            for one in wallet.assets:
                yield ("", "", "", "", one.type, one.reference_number, one.item_number, one.description)


def _outstanding(
    record: OrderRecord, state: State, due: datetime | None, configured: tuple[str, ...]
) -> Iterator[Outstanding]:
    if state == "erased":
        yield Outstanding("it was erased on request: no content is kept, and new events do not fetch it", None)
        return
    if state == "dead":
        yield Outstanding(f"the fetch is a dead letter: {record.dead}", None)
    elif state == "discarded":
        yield Outstanding(f"the fetch was discarded by hand: {record.error}", None)
    elif state in {"pending", "fetching", "deferred"}:
        fetch = {
            "pending": "fetch queued",
            "fetching": "fetch running",
            "deferred": "fetch deferred",
        }
        error = f" ({record.error})" if record.error else ""
        yield Outstanding(f"{fetch[state]}{error}", due)
    for sink in _sinks(record, configured):
        what = f"{sink.name}: {_delivery(sink, record.revision)}"
        if sink.dead or _is_discarded(sink, record.revision):
            yield Outstanding(what, None)
        elif sink.revision < record.revision:
            yield Outstanding(what, sink.next_at or due)


def _sinks(record: OrderRecord, configured: tuple[str, ...]) -> Iterator[SinkRecord]:
    """Return the state of each configured sink, and of others that have a dead letter."""
    known = {sink.name: sink for sink in record.sinks}
    for name in dict.fromkeys([*configured, *known]):
        sink = known.get(name) or SinkRecord(name=name, revision=0, attempts=0, next_at=None, dead="")
        if name in configured or sink.dead:
            yield sink


def _is_discarded(sink: SinkRecord, revision: int) -> bool:
    return bool(sink.discarded) and sink.discarded >= revision


def _delivery(sink: SinkRecord, revision: int) -> str:
    if sink.dead:
        return f"delivery of revision {revision} is a dead letter: {sink.dead}"
    if _is_discarded(sink, revision):
        return f"delivery of revision {revision} was discarded by hand"
    if sink.revision >= revision:
        return f"has revision {sink.revision}"
    attempts = f" ({console.many(sink.attempts, 'attempt')})" if sink.attempts else ""
    return f"revision {revision} not delivered yet{attempts}"


_BY_STATUS: Final = {
    "Issued": "Nothing: the tickets are here.",
    "Draft": (
        "When it is paid: ota-receiver orders confirm {id} --payment-reference REF."
        " If it will not be paid: ota-receiver orders cancel {id}"
    ),
    "Error": (
        "Read the status message. Then replace the order upstream (an event follows),"
        " or cancel it: ota-receiver orders cancel {id}"
    ),
    "Cancelled": "Nothing: it was cancelled.",
}

_BY_REASON: Final = {
    "order_missing": "Upstream does not have this order. If it should, ask NaviPartner",
    "kills_worker": "Fetching it crashed several workers: see pool.worker_died in the logs",
    "unsettled": "Upstream never finished it: check its job there",
    "bad_request": "Upstream answers 400: ask NaviPartner, with the order's id",
    "unreadable_answer": "Upstream's answer is not an order: ask NaviPartner, with the order's id",
}


def next_step(view: OrderView) -> str:
    """Return what a person should do about the order, or that there is nothing to do."""
    record, state, name = view.record, view.state, view.name
    error = f" (last error: {record.error})" if record.error else ""
    if state == "erased":
        return "Nothing: it was erased on request, and is no longer fetched or delivered."
    if state == "dead":
        return f"{_BY_REASON.get(record.dead, f'Fix the cause ({record.dead})')}. {_then('dead requeue', name)}"
    if state == "deferred":
        return f"Nothing for this order: its fetch is deferred ({record.error or 'busy'}). See: ota-receiver check"
    if state in {"pending", "fetching"}:
        return f"Nothing: it will be fetched{error}."
    if record.dead_sinks:
        return f"Fix the sink that failed ({record.dead_sinks[0].dead}). {_then('dead requeue', name)}"
    if UNREADABLE in view.outstanding:
        return f"The stored content is unreadable. {_then('orders refetch', name)}"
    found = _when_fetched(record, state, name)
    # "Nothing" would sound as if every sink had it.
    return (_delivery_step(view) or found) if found.startswith("Nothing") else found


def _when_fetched(record: OrderRecord, state: State, name: str) -> str:
    if state == "deleted_upstream":
        return "Nothing: it was deleted upstream."
    if state == "discarded":
        return f"Nothing: it was discarded by hand ({record.error}). To fetch it: ota-receiver orders refetch {name}"
    if record.status == "Issued" and not record.manifest:
        return "Nothing, if this partner has no design template: without one there is no manifest."
    if record.status in UNSETTLED:
        return f"It is not settled. {_then('orders refetch', name)}"
    unknown = f"Unknown status: check the order upstream. {_then('orders refetch', name)}"
    return _BY_STATUS.get(record.status, unknown).format(id=name)


def _delivery_step(view: OrderView) -> str:
    attempts = [one.next for one in view.outstanding if one.next is not None]
    if attempts:
        return f"Nothing: delivery is attempted at {times.short(min(attempts))}."
    if not view.outstanding or view.state == "discarded":
        return ""
    return f"No attempt is planned. To deliver it: ota-receiver events replay --order {view.name} --to-sinks"


def _then(command: str, name: str) -> str:
    return f"Then: ota-receiver {command} {name}"


def _took(found: Durations) -> Iterator[str]:
    event = Requested("event", found.fetched_ms, found.delivered_ms)
    for one in filter(None, (event if found.fetched_ms is not None else None, found.requested)):
        fetched = "" if one.fetched_ms is None else f"fetched after {times.span(one.fetched_ms)}"
        delivered = "" if one.delivered_ms is None else f"delivered after {times.span(one.delivered_ms)}"
        if took := ", ".join(filter(None, (fetched, delivered))):
            yield f"{one.by}: {took}"


def _fact(name: str, text: str) -> list[str]:
    return console.wrapped(text, f"{name:<{_INDENT}}", " " * _INDENT)
