"""Compares, order by order, what was sent with the sandbox's getOrder calls and with what the receiver stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from app.dev.demo import gaps
from app.dev.sandbox.webhooks import Event
from app.dev.simulator.sender import Answer
from app.ids import OrderKey
from app.ledger.events import EventLog, EventQuery
from app.ledger.orders import Archive
from app.ledger.record import OrderRecord
from app.upstream.models import Order

Name = tuple[str, str, str]
"""The identity of an event: order id, status, timestamp."""


class Calls(msgspec.Struct, frozen=True):
    """The getOrder calls of an order at the sandbox, and those answered with the order."""

    gets: int = 0
    answered: int = 0


class Stored(msgspec.Struct, frozen=True):
    """What the receiver stored of an order."""

    record: OrderRecord | None
    order: Order | None


@dataclass(frozen=True)
class Expected:
    """One order: its genuine events by settlement, and how often they are repeated."""

    order_id: str
    events: tuple[Event, ...]
    repeats: int = 0

    @property
    def status(self) -> str:
        return self.events[-1].payload.status


@dataclass(frozen=True)
class Evidence:
    """The results of a run, by order id; None: not known for this receiver.

    `recorded` counts the events in the receiver's log, and `tickets` are upstream's ticket numbers. With `exact`
    nothing was killed: one getOrder per settlement, and each repeat is recognised.
    """

    answers: Sequence[Answer]
    calls: Mapping[str, Calls]
    exact: bool
    stored: Mapping[str, Stored] | None = None
    recorded: Mapping[Name, int] | None = None
    tickets: Mapping[str, list[str]] | None = None


@dataclass(frozen=True)
class StoredOrders:
    """What a receiver stored of one company."""

    archive: Archive
    log: EventLog
    company_id: str

    def orders(self, ids: Iterable[str]) -> dict[str, Stored]:
        """Return the record and the order of each id; a broken record is None."""
        keys = [OrderKey(self.company_id, order_id) for order_id in ids]
        return {key.order_id: Stored(self.archive.records([key])[0], self.archive.order(key)) for key in keys}

    def recorded(self) -> Counter[Name]:
        """Return how often each event is in the log."""
        return Counter((one.order_id, one.status, one.sent) for one in self.log.oldest_first(EventQuery()))


def name(event: Event) -> Name:
    """Return what identifies an event."""
    return event.payload.order_id, event.payload.status, event.timestamp


def calls_by_order(listed: Sequence[Mapping[str, Any]]) -> dict[str, Calls]:
    """Return the counts of the sandbox's admin API by order id."""
    return {row["order_id"]: Calls(row["gets"], row["answered"]) for row in listed}


def acknowledged(answers: Iterable[Answer]) -> set[Event]:
    """Return the genuine events that were answered 2xx at least once: from then on their orders must be fetched."""
    return {shot.event for one in answers if one.ok for shot in one.post.shots if shot.kind != "forged"}


def audit(orders: Iterable[Expected], evidence: Evidence) -> dict[str, list[str]]:
    """Return all that is wrong, by order id; an order without a fault is not in it."""
    accepted = acknowledged(evidence.answers)
    results: dict[str, list[str]] = {}
    for one in evidence.answers:
        for order_id in {shot.order_id for shot in one.post.shots if shot.kind != "forged"}:
            results.setdefault(order_id, []).append(one.result)
    found = {}
    for order in orders:
        problems = [
            *_sending(order, accepted, results.get(order.order_id, ["not sent"]), evidence),
            *_storing(order, results.get(order.order_id, []), evidence),
            *_recording(order, evidence),
        ]
        if problems:
            found[order.order_id] = problems
    return found


def forgeries(ghosts: Iterable[str], evidence: Evidence) -> dict[str, list[str]]:
    """Return what is wrong with forged events, by order id; `ghosts` are the ids that only these name."""
    ghosts = set(ghosts)
    accepted = {shot.order_id for one in evidence.answers if one.ok and one.post.forged for shot in one.post.shots}
    found = {}
    for order_id in sorted(ghosts | accepted):
        problems = ["forged, but acknowledged"] if order_id in accepted else []
        if order_id in ghosts and evidence.calls.get(order_id, Calls()).gets:
            problems.append("forged, but fetched")
        if order_id in ghosts and evidence.stored is not None and evidence.stored[order_id].record is not None:
            problems.append("forged, but recorded")
        if problems:
            found[order_id] = problems
    return found


def _sending(order: Expected, accepted: set[Event], results: list[str], evidence: Evidence) -> Iterator[str]:
    if not any(event in accepted for event in order.events):
        yield f"never acknowledged: {', '.join(results)}"
        return
    calls, settlements = evidence.calls.get(order.order_id, Calls()), len(order.events)
    if not calls.answered:
        yield f"acknowledged, but never fetched ({calls.gets} getOrders without an order)"
    elif evidence.exact and calls.answered > settlements:
        yield f"{calls.answered} getOrders for {'one settlement' if settlements == 1 else f'{settlements} settlements'}"


def _storing(order: Expected, results: list[str], evidence: Evidence) -> Iterator[str]:
    if evidence.stored is None:
        return
    record, stored = evidence.stored[order.order_id].record, evidence.stored[order.order_id].order
    if record is None:
        yield "it has no record"
        return
    if record.dead:
        yield f"dead letter: {record.dead}"
    if record.fetched_generation < record.generation:
        yield f"pending: fetched {record.fetched_generation} of {record.generation}"
    if record.generation != len(order.events):
        yield f"{record.generation} settlements counted of {len(order.events)}"
    if stored is None or not record.revision:
        yield "no content is stored"
        return
    if record.status != order.status:
        yield f"stored as {record.status}, settled as {order.status}"
    yield from gaps(stored, order.status)
    if evidence.tickets is not None and order.order_id in evidence.tickets:
        numbers = sorted(str(ticket.reference_number) for ticket in stored.tickets)
        if numbers != evidence.tickets[order.order_id]:
            yield "an older settlement is stored"
    # A POST that was repeated may have been recorded the first time.
    sent_once = all(one.isdecimal() and one < "500" for one in results)
    if evidence.exact and sent_once and record.duplicates != order.repeats:
        yield f"{record.duplicates} duplicates recognised of {order.repeats}"


def _recording(order: Expected, evidence: Evidence) -> Iterator[str]:
    if evidence.recorded is None:
        return
    for event in order.events:
        if not (count := evidence.recorded.get(name(event), 0)):
            yield f"its event {event.payload.status} {event.timestamp} is not recorded"
        elif count > 1:
            yield f"its event {event.payload.status} {event.timestamp} is recorded {count} times"
