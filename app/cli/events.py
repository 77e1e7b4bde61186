"""The commands for accepted events: list, show; replay and tail have files of their own.

`events tail`: follows what comes, and tells of each order what became of it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
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

CODES: Final = {
    DONE: "stopped on request",
    FOUND: "",
    AWAY: "Redis unavailable at the start; later outages are waited out",
}

MOST: Final = 500
"""Orders whose end is waited for; of the oldest beyond them only the event is told."""
POLL_S: Final = 0.5
"""Seconds between two looks at them, and the longest wait for an event."""

_SETTLED: Final = frozenset({"fetched", "deleted_upstream", "dead", "discarded", "erased"})


class Became(msgspec.Struct, frozen=True, kw_only=True, tag_field="what", tag="became"):
    """What became of an order that was told of: `took_ms` since the earliest event that was waiting for it."""

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


@dataclass
class _Waiting:
    since: datetime
    told: State | None = None


def tail(
    order: Annotated[str | None, typer.Option("--order", help="One order, by orderId or reference.")] = None,
    company: context.CompanyOption = None,
    status: context.Status = None,
    outcome: context.OutcomeOption = None,
    since: context.Since = None,
    as_json: context.Json = False,
) -> None:
    """Follow the events as they come, and what becomes of their orders: fetched, deferred, dead, ..., and when.

    Goes on where it was once Redis is back. Events that came again are dropped before they get here: `orders explain`
    shows them. Ctrl-C ends it.
    """
    # Without a handler the first process of a container does not even notice the signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DONE))
    with open_context(company) as here:
        query = EventQuery(company_id=here.company_id, status=status, outcome=outcome)
        start = here.events.last_id() if since is None else _before(since)
        Tail(here, query, _named(here, order, query.company_id), start, as_json).run()


class Tail:
    """Follows the stream; `is_meant` tells whether an event is about the order that was asked for."""

    def __init__(
        self,
        here: CommandContext,
        query: EventQuery,
        is_meant: Callable[[StoredEvent], bool],
        start: str,
        as_json: bool,
    ) -> None:
        self._here = here
        self._query = query
        self._is_meant = is_meant
        self._at = start
        self._as_json = as_json
        self._waiting: dict[OrderKey, _Waiting] = {}
        self._next_look = 0.0
        self._away = False

    def run(self) -> None:
        """Follow until interrupted; Redis may come and go."""
        while True:
            try:
                found, records = self._read()
            except StoreUnavailable as away:
                if not self._away:
                    console.remark(f"{away}. Waiting for it.")
                self._away = True
                time.sleep(POLL_S)
                continue
            if self._away:
                console.remark("Redis is back.")
                self._away = False
            self._tell_ends(records)
            for event in found:
                self._at = event.id
                if self._query.matches(event) and self._is_meant(event):
                    self._tell_event(event)

    def _read(self) -> tuple[list[StoredEvent], dict[OrderKey, OrderRecord | None]]:
        """Return what came, and now and then where the orders stand that are waited for."""
        books = self._here
        with translated_errors(self._here.settings.redis_url.get_secret_value()):
            found = books.events.behind(self._at, round(POLL_S * 1000))
            if not self._waiting or time.monotonic() < self._next_look:
                return found, {}
            self._next_look = time.monotonic() + POLL_S
            orders = list(self._waiting)
            return found, dict(zip(orders, books.orders.records(orders), strict=True))

    def _tell_event(self, event: StoredEvent) -> None:
        slug = self._here.companies.slug(event.company_id)
        text = f"{event.order_id} {slug}: {event.status}, {event.outcome} {event.reference}"
        self._tell(event.at, text, {"what": "event", "company": slug} | msgspec.structs.asdict(event))
        waiting = self._waiting.setdefault(event.key, _Waiting(event.at))
        waiting.told = None
        while len(self._waiting) > MOST:
            del self._waiting[next(iter(self._waiting))]

    def _tell_ends(self, records: dict[OrderKey, OrderRecord | None]) -> None:
        now = times.now()
        for order, record in records.items():
            if record is None:
                del self._waiting[order]
                continue
            state, waiting = record.state(now), self._waiting[order]
            if state in _SETTLED:
                del self._waiting[order]
            elif state != "deferred" or waiting.told == "deferred":
                continue
            waiting.told = state
            self._tell_end(record, state, waiting.since, now)

    def _tell_end(self, record: OrderRecord, state: State, since: datetime, now: datetime) -> None:
        by_itself = {"fetched": record.fetched_at, "dead": record.dead_at, "discarded": record.discarded_at}.get(state)
        at = max(since, by_itself or now)
        became = Became(
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
        counts = f"{became.status}, {became.wallets} wallets, {became.tickets} tickets, {became.coupons} coupons"
        what = counts if state == "fetched" else became.reason
        text = f"{became.order_id} {became.company}: {state} after {times.span(became.took_ms)}"
        self._tell(at, f"{text}: {what}" if what else text, became)

    def _tell(self, at: datetime, text: str, value: Any) -> None:
        console.tell(f"{at.astimezone():%H:%M:%S} {text.rstrip()}", value, self._as_json)


def _before(since: datetime) -> str:
    """Return the last id there can be before this time: what follows it is wanted."""
    return f"{max(1, to_ms(since)) - 1}-{2**64 - 1}"


def _named(here: CommandContext, text: str | None, company_id: str | None) -> Callable[[StoredEvent], bool]:
    """Return the test for the order that `text` names; it need not be here yet."""
    if text is None:
        return lambda _: True
    order_id = guid(text)
    if order_id is not None:
        return lambda event: event.order_id == order_id
    known = set(here.references.orders(text, company_id))
    wanted = text.strip().casefold()
    return lambda event: event.key in known or event.reference.casefold() == wanted


cli = console.commands(name="events", help="Events received from the Channel Manager.")


cli.command(epilog=epilog("ota-receiver events tail --order CM-4711", codes=CODES))(tail)
cli.command(epilog=replay.EPILOG)(replay.replay)


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
    """List the latest events, newest last. Duplicates are not among them: `orders explain` tells of those."""
    with open_context(company) as here:
        query = EventQuery(company_id=here.company_id, status=status, outcome=outcome, since=since, until=until)
        found = deque[StoredEvent]()
        found.extendleft(islice(here.events.newest_first(query), limit))
        if as_json:
            for event in found:
                console.json_line(_view(here, event))
        elif found:
            columns = ("=id", f"came ({console.zone()})", "?company", "=order", "status", "?became", "?reference")
            console.table("", columns, (_row(here, event) for event in found))
    if not found:
        raise Stop("No event matches.", FOUND)


@cli.command(epilog=epilog("ota-receiver events show 1763803942123-0"))
def show(
    event_id: Annotated[str, typer.Argument(metavar="ID", help="Event id, as `events list` shows it.")],
    as_json: context.Json = False,
) -> None:
    """Show one event, and where its order stands."""
    with open_context() as here:
        event = next(iter(here.events.of_ids([event_id])), None)
        if event is None:
            raise Stop(f"No event {event_id!r} is here; it may be older than EVENT_DAYS.", FOUND)
        record = here.orders.record(event.key)
        now = times.now()
        state = record.state(now) if record is not None else "unknown"
        if as_json:
            console.json_line(_view(here, event) | {"order_state": state})
            return
        facts = (
            ("company", here.companies.slug(event.company_id)),
            ("order", event.order_id),
            ("reference", event.reference),
            ("status", event.status),
            ("came", times.short(event.at)),
            ("sent", event.sent),
            ("became", event.outcome),
            ("secret", event.secret),
            ("request", event.request_id),
            ("order is", state),
        )
        console.facts(f"event {event.id}", facts)


def _view(here: CommandContext, event: StoredEvent) -> dict[str, object]:
    return {"company": here.companies.slug(event.company_id)} | msgspec.structs.asdict(event)


def _row(here: CommandContext, event: StoredEvent) -> tuple[object, ...]:
    return (
        event.id,
        times.short(event.at),
        here.companies.slug(event.company_id),
        event.order_id,
        event.status,
        event.outcome,
        event.reference,
    )
