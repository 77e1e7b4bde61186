"""The commands for accepted events: list, show, tail; replay has a file of its own."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, Final

import msgspec
import typer

from app import times
from app.cli import console, context, replay
from app.cli.console import AWAY, DONE, FOUND, Stop, epilog
from app.cli.context import CommandContext, open_context
from app.errors import StoreUnavailable
from app.ids import OrderKey, guid
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

cli = console.commands(name="events", help="Events received from the Channel Manager.")
cli.command(epilog=replay.EPILOG)(replay.replay)


class Outcome(msgspec.Struct, frozen=True, kw_only=True, tag_field="what", tag="outcome"):
    """The state that an order reached: `took_ms` since the earliest event that was waiting for it."""

    company: str
    company_id: str
    order_id: str
    state: State
    status: str
    reason: str
    took_ms: int
    revision: int
    wallets: int
    tickets: int
    coupons: int


@cli.command("list", epilog=epilog("ota-receiver events list --since 1h --status Issued"))
def list_(
    company: context.CompanyOption = None,
    status: context.Status = None,
    outcome: context.OutcomeOption = None,
    since: context.Since = None,
    until: context.Until = None,
    limit: context.Limit = 50,
    as_json: context.Json = False,
) -> None:
    """List the latest events, newest last. Duplicates are not stored: `orders explain` counts them."""

    def row(event: StoredEvent) -> tuple[str, ...]:
        order = (here.companies.slug(event.company_id), event.order_id)
        return (event.id, times.short(event.at), *order, event.status, event.outcome, event.reference)

    with open_context(company) as here:
        query = EventQuery(company_id=here.company_id, status=status, outcome=outcome, since=since, until=until)
        console.listing(
            list(islice(here.events.newest_first(query), limit))[::-1],
            as_json,
            columns=("=id", f"received ({console.zone()})", "?company", "=order", "status", "?outcome", "?reference"),
            row=row,
            view=lambda event: _view(here, event),
            nothing="No event matches.",
        )


@cli.command(epilog=epilog("ota-receiver events show 1763803942123-0"))
def show(
    event_id: Annotated[str, typer.Argument(metavar="ID", help="Event id, as `events list` shows it.")],
    as_json: context.Json = False,
) -> None:
    """Show one event, and the state of its order."""
    with open_context() as here:
        event = next(iter(here.events.of_ids([event_id])), None)
        if event is None:
            raise Stop(f"No event {event_id!r} found; it may be older than EVENT_DAYS.", FOUND)
        record = here.orders.record(event.key)
    state = record.state(times.now()) if record is not None else "unknown"
    if as_json:
        console.json_line(_view(here, event) | {"order_state": state})
        return
    facts = (
        ("company", here.companies.slug(event.company_id)),
        ("order", event.order_id),
        ("reference", event.reference),
        ("status", event.status),
        ("received", times.short(event.at)),
        ("sent", event.sent),
        ("outcome", event.outcome),
        ("secret", event.secret),
        ("request", event.request_id),
        ("order is", state),
    )
    console.facts(f"event {event.id}", facts)


@cli.command(epilog=epilog("ota-receiver events tail --order CM-4711", codes=_TAIL_CODES))
def tail(
    order: Annotated[str | None, typer.Option("--order", help="One order, by orderId or reference.")] = None,
    company: context.CompanyOption = None,
    status: context.Status = None,
    outcome: context.OutcomeOption = None,
    since: context.Since = None,
    as_json: context.Json = False,
) -> None:
    """Follow new events and what happens to their orders.

    It shows when an order is fetched, deferred or dead. It continues after an outage of Redis. Duplicates are not
    stored: `orders explain` counts them. Ctrl-C ends it.
    """
    # Without a handler the first process of a container ignores the signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DONE))
    with open_context(company) as here:
        query = EventQuery(company_id=here.company_id, status=status, outcome=outcome)
        # The last id that there can be before this time: what follows it is shown.
        start = here.events.last_id() if since is None else f"{max(1, to_ms(since)) - 1}-{2**64 - 1}"
        Tail(here, query, _matcher(here, order), start, as_json).run()


@dataclass
class _Waiting:
    since: datetime
    deferred: bool = False


class Tail:
    """Follows the stream; `matches` says whether an event is about the order that was asked for."""

    def __init__(
        self,
        here: CommandContext,
        query: EventQuery,
        matches: Callable[[StoredEvent], bool],
        start: str,
        as_json: bool,
    ) -> None:
        self._here = here
        self._query = query
        self._matches = matches
        self._last_id = start
        self._as_json = as_json
        self._waiting: dict[OrderKey, _Waiting] = {}
        self._next_look = 0.0

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
                self._last_id = event.id
                if self._query.matches(event) and self._matches(event):
                    self._print_event(event)

    def _read(self) -> tuple[list[StoredEvent], dict[OrderKey, OrderRecord | None]]:
        """Return new events, and at most each POLL_S the records of the orders that are waited for."""
        with translated_errors(self._here.settings.redis_url.get_secret_value()):
            found = self._here.events.behind(self._last_id, round(POLL_S * 1000))
            if not self._waiting or time.monotonic() < self._next_look:
                return found, {}
            self._next_look = time.monotonic() + POLL_S
            orders = list(self._waiting)
            return found, dict(zip(orders, self._here.orders.records(orders), strict=True))

    def _print_event(self, event: StoredEvent) -> None:
        slug = self._here.companies.slug(event.company_id)
        text = f"{event.order_id} {slug}: {event.status}, {event.outcome} {event.reference}"
        self._print(event.at, text, {"what": "event"} | _view(self._here, event))
        self._waiting.setdefault(event.key, _Waiting(event.at)).deferred = False
        while len(self._waiting) > MOST:
            del self._waiting[next(iter(self._waiting))]

    def _print_outcomes(self, records: dict[OrderKey, OrderRecord | None]) -> None:
        now = times.now()
        for order, record in records.items():
            waiting = self._waiting[order]
            state = None if record is None else record.state(now)
            if state is None or state in _ENDS:
                del self._waiting[order]
            if record is None or state is None:
                continue
            if state in _ENDS or (state == "deferred" and not waiting.deferred):
                self._print_outcome(record, state, waiting.since, now)
                waiting.deferred = True

    def _print_outcome(self, record: OrderRecord, state: State, since: datetime, now: datetime) -> None:
        reached = {"fetched": record.fetched_at, "dead": record.dead_at, "discarded": record.discarded_at}.get(state)
        at = max(since, reached or now)
        outcome = Outcome(
            company=self._here.companies.slug(record.company_id),
            company_id=record.company_id,
            order_id=record.order_id,
            state=state,
            status=record.known_status,
            reason=record.dead or (record.error if state != "fetched" else ""),
            took_ms=to_ms(at) - to_ms(since),
            revision=record.revision,
            wallets=record.wallets,
            tickets=record.tickets,
            coupons=record.coupons,
        )
        detail = outcome.reason
        if state == "fetched":
            counts = ((record.wallets, "wallet"), (record.tickets, "ticket"), (record.coupons, "coupon"))
            detail = ", ".join([outcome.status, *(console.many(count, noun) for count, noun in counts)])
        text = f"{outcome.order_id} {outcome.company}: {state} after {times.span(outcome.took_ms)}"
        self._print(at, f"{text}: {detail}" if detail else text, outcome)

    def _print(self, at: datetime, text: str, value: Any) -> None:
        console.result(f"{at.astimezone():%H:%M:%S} {text.rstrip()}", value, self._as_json)


def _matcher(here: CommandContext, text: str | None) -> Callable[[StoredEvent], bool]:
    """Return the test for the order that `text` names; there may be no event of it yet."""
    if text is None:
        return lambda _: True
    order_id = guid(text)
    if order_id is not None:
        return lambda event: event.order_id == order_id
    known = set(here.references.orders(text, here.company_id))
    reference = text.strip().casefold()
    return lambda event: event.key in known or event.reference.casefold() == reference


def _view(here: CommandContext, event: StoredEvent) -> dict[str, object]:
    return {"company": here.companies.slug(event.company_id)} | msgspec.structs.asdict(event)
