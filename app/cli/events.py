"""The commands for accepted events: list, show, tail; replay has a file of its own."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, Final

import typer

from app import times
from app.cli import console, context, replay
from app.cli.command import AWAY, DONE, FOUND, Stop, command, commands
from app.cli.context import CommandContext, open_context
from app.errors import StoreUnavailable
from app.explain.order_view import assets
from app.ids import OrderKey, beginning, guid
from app.ledger.events import EventQuery, StoredEvent
from app.ledger.record import OrderRecord, State
from app.ledger.redis import translated_errors
from app.times import to_ms

MOST: Final = 500
"""Orders that `tail` waits for; of an older one only the event is shown."""

POLL_S: Final = 0.5
"""Seconds between two reads of their records, and the longest wait for an event."""

_ENDS: Final = frozenset({"fetched", "deleted_upstream", "dead", "discarded", "erased"})
_TAIL_CODES: Final = {
    DONE: "stopped on request",
    FOUND: "",
    AWAY: "Redis unavailable at the start; later outages are waited out",
}

cli = commands(name="events", help="Events received from the Channel Manager.")
command(cli, *replay.EXAMPLES, options="company why who dry_run yes")(replay.replay)


@command(cli, "ota-receiver events list --since 1h --status Issued", options="company")
def list_(
    status: context.Status = None,
    outcome: context.OutcomeOption = None,
    since: context.Since = None,
    until: context.Until = None,
    limit: context.Limit = 50,
) -> None:
    """List the latest events, newest last. Duplicates are not stored: `orders explain` counts them."""
    with open_context() as here:
        query = EventQuery(company_id=here.company_id, status=status, outcome=outcome, since=since, until=until)
        found = list(islice(here.events.newest_first(query), limit))[::-1]
        company, event_id = here.company_column(found), ("?=event", "id")
        columns = (("@received", "at"), *company, ("=order", "order_id"), "status", "=reference", event_id, "?outcome")
        console.listing(found, columns, here.view, nothing="No event matches.")


@command(cli, "ota-receiver events show 1763803942123-0")
def show(event_id: Annotated[str, typer.Argument(metavar="ID", help="Event id; its beginning is enough.")]) -> None:
    """Show one event, and the state of its order."""
    with open_context() as here:
        event = next(iter(here.events.of_ids([here.event_id(event_id)])), None)
        if event is None:
            raise Stop(f"No event {event_id!r} found; it may be older than EVENT_DAYS.", FOUND)
        record = here.orders.record(event.key)
    view = here.view(event) | {"order_state": record.state(here.now()) if record is not None else "unknown"}
    fields = {"company": "company", "order": "order_id", "reference": "reference", "status": "status"}
    fields |= {"received": "at", "sent": "sent", "outcome": "outcome", "secret": "secret", "request": "request_id"}
    fields |= {"order is": "order_state"}
    console.facts(f"event {event.id}", {name: view[field] for name, field in fields.items()}, view)


@command(cli, "ota-receiver events tail --order CM-4711", options="company", codes=_TAIL_CODES)
def tail(
    order: Annotated[str | None, typer.Option("--order", help="One order, by orderId or reference.")] = None,
    status: context.Status = None,
    outcome: context.OutcomeOption = None,
    since: context.Since = None,
) -> None:
    """Follow new events and what happens to their orders.

    It shows when an order is fetched, deferred or dead. It continues after an outage of Redis. Duplicates are not
    stored: `orders explain` counts them. Ctrl-C ends it.
    """
    # Without a handler the first process of a container ignores the signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DONE))
    with open_context() as here:
        query = EventQuery(company_id=here.company_id, status=status, outcome=outcome)
        # The last id that there can be before this time: what follows it is shown.
        start = here.events.last_id() if since is None else f"{max(1, to_ms(since)) - 1}-{2**64 - 1}"
        Tail(here, query, _matcher(here, order), start).run()


@dataclass
class _Waiting:
    since: datetime
    deferred: bool = False


@dataclass
class Tail:
    """Follows the stream after the event `last_id`; `matches` tells whether an event is about the chosen order.

    `now` is the time of Redis at the latest read of the records.
    """

    here: CommandContext
    query: EventQuery
    matches: Callable[[StoredEvent], bool]
    last_id: str
    waiting: dict[OrderKey, _Waiting] = field(default_factory=dict)
    next_look: float = 0.0
    now: datetime = field(init=False)

    def run(self) -> None:
        """Follow until interrupted, also over outages of Redis."""
        available = True
        while True:
            try:
                found, records = self._read()
            except StoreUnavailable as error:
                if available:
                    console.remark(f"{error}. Waiting for it.")
                available = False
                time.sleep(POLL_S)
                continue
            if not available:
                console.remark("Redis is back.")
            available = True
            self._print_outcomes(records)
            for event in found:
                self.last_id = event.id
                if self.query.matches(event) and self.matches(event):
                    self._print_event(event)

    def _read(self) -> tuple[list[StoredEvent], dict[OrderKey, OrderRecord | None]]:
        """Return new events, and at most each POLL_S the records of the orders that are waited for."""
        with translated_errors(self.here.redis):
            found = self.here.events.behind(self.last_id, round(POLL_S * 1000))
            if not self.waiting or time.monotonic() < self.next_look:
                return found, {}
            self.next_look = time.monotonic() + POLL_S
            orders, self.now = list(self.waiting), self.here.now()
            return found, dict(zip(orders, self.here.orders.records(orders), strict=True))

    def _print_event(self, event: StoredEvent) -> None:
        known_as = f" ({event.reference})" if event.reference else ""
        text = f"{self._name(event.key)}{known_as}: {event.status}, {event.outcome}"
        self._print(event.at, text, {"what": "event"} | self.here.view(event))
        self.waiting.setdefault(event.key, _Waiting(event.at)).deferred = False
        while len(self.waiting) > MOST:
            del self.waiting[next(iter(self.waiting))]

    def _print_outcomes(self, records: dict[OrderKey, OrderRecord | None]) -> None:
        for order, record in records.items():
            waiting = self.waiting[order]
            state = None if record is None else record.state(self.now)
            if state is None or state in _ENDS:
                del self.waiting[order]
            elif state != "deferred" or waiting.deferred:
                continue
            if record is not None and state is not None:
                waiting.deferred = True
                self._print_outcome(record, state, waiting.since)

    def _print_outcome(self, record: OrderRecord, state: State, since: datetime) -> None:
        """Print the state that an order reached; `took_ms` since the earliest event that was waiting for it."""
        reached = {"fetched": record.fetched_at, "dead": record.dead_at, "discarded": record.discarded_at}.get(state)
        at = max(since, reached or self.now)
        took = to_ms(at) - to_ms(since)
        slug, status = self.here.slug(record.company_id), record.known_status
        reason = record.dead or (record.error if state != "fetched" else "")
        outcome = {"what": "outcome", "company": slug, **record.key._asdict(), "state": state, "status": status}
        outcome |= {"reason": reason, "took_ms": took}
        outcome |= {name: getattr(record, name) for name in ("revision", "wallets", "tickets", "coupons")}
        detail = f"{status}, {assets(record)}" if state == "fetched" else reason
        text = f"{self._name(record.key)}: {state} after {times.span(took)}"
        self._print(at, f"{text}: {detail}" if detail else text, outcome)

    def _name(self, order: OrderKey) -> str:
        here = self.here
        return f"{order.order_id} {here.slug(order.company_id)}" if here.are_several else order.order_id

    def _print(self, at: datetime, text: str, value: Any) -> None:
        console.result(f"{at.astimezone():%H:%M:%S} {text.rstrip()}", value)


def _matcher(here: CommandContext, text: str | None) -> Callable[[StoredEvent], bool]:
    """Return the test for the order that `text` names; there may be no event of it yet."""
    if text is None:
        return lambda _: True
    order_id = guid(text)
    if order_id is not None:
        return lambda event: event.order_id == order_id
    known: set[OrderKey | None] = set(here.references.orders(text, here.company_id))
    if not known and beginning(text):
        known.add(here.only_order(text))
    reference = text.strip().casefold()
    return lambda event: event.key in known or event.reference.casefold() == reference
