"""Reading the accepted events: by id, by order or by time, page by page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from app.ids import OrderKey
from app.ledger.history import EventReceived
from app.ledger.orders import Archive
from app.ledger.pages import Page, StreamEntry, ids_between, stream_page
from app.ledger.redis import PAGE, Redis, stream_pages
from app.times import from_ms

_ID: Final = re.compile(r"\d{1,15}-\d{1,15}")
_DIGITS: Final = 13
"""Of the time in an id, in ms since 1970: until the year 2286."""


class StoredEvent(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename={"company_id": "company", "order_id": "order", "request_id": "request"},
):
    """One accepted event, as the stream has it; `at` is when it was recorded, `sent` its own timestamp as sent.

    `reference` is its buyFromOrderReference, `outcome` queued, coalesced or erased, `secret` the name of the
    clientState that matched; where the stream has neither they are the usual ones. Duplicates are not stored: the
    history of the order has them.
    """

    id: str
    at: datetime
    company_id: str
    order_id: str
    status: str = ""
    reference: str = ""
    sent: str = ""
    outcome: str = "queued"
    secret: str = "current"  # noqa: S105  # a name
    request_id: str = ""

    @property
    def key(self) -> OrderKey:
        return OrderKey(self.company_id, self.order_id)


class EventQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which events; all conditions must hold. `since` and `until` are aware and inclusive, `status` in any case."""

    company_id: str | None = None
    status: str | None = None
    outcome: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def matches(self, event: StoredEvent) -> bool:
        return (
            self.company_id in (None, event.company_id)
            and self.outcome in (None, event.outcome)
            and (self.status is None or event.status.casefold() == self.status.casefold())
            and (self.since is None or event.at >= self.since)
            and (self.until is None or event.at <= self.until)
        )


class EventLog:
    """Reads the stream of events; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def of_ids(self, event_ids: Iterable[str]) -> list[StoredEvent]:
        """Return the events with these ids, oldest first; one that is not there (any more) is left out."""
        ids = sorted({one for one in event_ids if is_event_id(one)}, key=_order_of)
        with self._redis.pipeline(transaction=False) as pipe:
            for one in ids:
                pipe.xrange(self._redis.names.events, one, one)
            return [event for entries in pipe.execute() for event in _page(entries)]

    def beginning_with(self, digits: str) -> list[str]:
        """Return the ids that begin with these digits of their time, oldest first, at most 11."""
        first, last = (digits.ljust(_DIGITS, filler) for filler in "09")
        found: Any = self._redis.xrange(self._redis.names.events, first, last, count=11)
        return [event_id.decode() for event_id, _ in found]

    def of_order(self, order: OrderKey) -> list[StoredEvent]:
        """Return the events of one order, oldest first, as far as its history (200 entries) and EVENT_DAYS reach."""
        entries = Archive(self._redis).history(order)
        return self.of_ids(entry.event_id for entry in entries if isinstance(entry, EventReceived))

    def oldest_first(self, query: EventQuery, step: Callable[[int], object] = lambda _: None) -> Iterator[StoredEvent]:
        """Return the events that match; `step` gets the number of events of each page."""
        for entries in stream_pages(self._redis, self._redis.names.events, *ids_between(query.since, query.until)):
            step(len(entries))
            yield from filter(query.matches, _page(entries))

    def newest_first(self, query: EventQuery) -> Iterator[StoredEvent]:
        """Return the events that match."""
        bounds = ids_between(query.since, query.until)
        for entries in stream_pages(self._redis, self._redis.names.events, *bounds, newest_first=True):
            yield from filter(query.matches, _page(entries))

    def page(self, query: EventQuery, after: str | None = None, limit: int = 50) -> Page[StoredEvent]:
        """Return a page of the events that match, newest first; raises UnknownCursor."""

        def matching(entries: Sequence[StreamEntry]) -> Iterator[StoredEvent | None]:
            return (event if query.matches(event) else None for event in _page(entries))

        names, since, until = self._redis.names, query.since, query.until
        return stream_page(self._redis, names.events, matching, after, limit, since=since, until=until)

    def last_id(self) -> str:
        """Return the id behind which the next event will stand."""
        newest: Any = self._redis.xrevrange(self._redis.names.events, count=1)
        return newest[0][0].decode() if newest else "0-0"

    def behind(self, event_id: str, wait_ms: int) -> list[StoredEvent]:
        """Return the next events behind this id, at most a page; waits up to `wait_ms` for the first."""
        answer: Any = self._redis.xread({self._redis.names.events: event_id}, count=PAGE, block=wait_ms)
        return [event for _, entries in answer for event in _page(entries)]


def is_event_id(text: str) -> bool:
    """Return whether `text` looks like the id of an event: `<ms>-<number>`."""
    return _ID.fullmatch(text) is not None


def _order_of(event_id: str) -> tuple[int, int]:
    ms, _, number = event_id.partition("-")
    return int(ms), int(number)


def _page(entries: Any) -> list[StoredEvent]:
    return [
        msgspec.convert(
            {name.decode(): value.decode() for name, value in fields.items()}
            | {"id": event_id.decode(), "at": from_ms(int(event_id.partition(b"-")[0]))},
            StoredEvent,
        )
        for event_id, fields in entries
    ]
