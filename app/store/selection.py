"""Which orders a replay is about: those that stored events tell of, those named, or those given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, Final

import msgspec
from redis import Redis

from app.store import keys, pages
from app.store.event_log import EventLog, StoredEvent
from app.store.keys import OrderKey
from app.store.moment import to_ms

PAGE: Final = 500
"""Events a call: fewer calls than a list for people needs, and Redis still serves others after a millisecond."""

_CHUNK: Final = 500
"""Records a round trip, of each only the fields that are asked for."""


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which events, and so which orders; all conditions must hold.

    `event_ids` and `orders` together name what is looked through, nothing named means all. `since` and `until` are
    aware and inclusive, `status` in any case, `dead`: only orders that were given up.
    """

    event_ids: tuple[str, ...] = ()
    orders: tuple[OrderKey, ...] = ()
    company_id: str | None = None
    status: str | None = None
    outcome: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    dead: bool = False

    @property
    def named(self) -> bool:
        return bool(self.event_ids or self.orders)

    @property
    def asks_of_events(self) -> bool:
        """Return whether there is a condition that only an event can meet."""
        return any((self.status, self.outcome, self.since, self.until))

    def matches(self, event: StoredEvent) -> bool:
        """Return whether an event that was named meets the other conditions, except `dead`."""
        return (
            self.company_id in (None, event.company_id)
            and (self.status is None or event.status.casefold() == self.status.casefold())
            and self.outcome in (None, event.outcome)
            and (self.since is None or event.at >= self.since)
            and (self.until is None or event.at <= self.until)
        )

    def words(self) -> str:
        """Return the selection on one line, for the audit and for lists of plans."""
        named = [f"{len(self.event_ids)} event ids"] * bool(self.event_ids)
        named += [f"{len(self.orders)} orders"] * bool(self.orders)
        conditions = {
            "company": self.company_id,
            "status": self.status,
            "outcome": self.outcome,
            "since": self.since and self.since.isoformat(timespec="seconds"),
            "until": self.until and self.until.isoformat(timespec="seconds"),
        }
        named += [f"{name}={value}" for name, value in conditions.items() if value]
        return " ".join(named + ["dead"] * self.dead)


class Selected(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; `orders`: member -> ms of its last selected event (0: named, without one), oldest first.

    `missing` are the event ids that are not there (any more).
    """

    events: int
    orders: dict[str, int]
    missing: tuple[str, ...] = ()


class Selector:
    """Reads events and records; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._events = EventLog(redis)

    def select(self, selection: Selection, step: Callable[[int], None]) -> Selected:
        """Return the orders; `step` is told how many events or orders each page held."""
        if selection.named:
            return self._named(selection)
        if selection.dead and not selection.asks_of_events:
            dead = self._dead(selection.company_id, step)
            return Selected(events=0, orders=dict.fromkeys(dead, 0))
        return self._of_the_stream(selection, step)

    def up_to_date(self, told: dict[str, int]) -> set[str]:
        """Return the orders whose stored copy is newer than what was told (fetched later, and nothing is owed)."""
        return {
            member
            for (member, at), (wanted, done, fetched) in zip(
                told.items(), self._fields(told, "wanted", "done", "fetched"), strict=True
            )
            if fetched > at and done >= wanted
        }

    def without_content(self, members: Iterable[str]) -> set[str]:
        """Return the orders of which nothing is stored."""
        asked = list(members)
        found = self._fields(asked, "wanted", "revision")
        return {member for member, values in zip(asked, found, strict=True) if 0 in values}

    def erased(self, members: Iterable[str]) -> set[str]:
        """Return the orders that were erased: they are not brought back."""
        asked = list(members)
        found = self._fields(asked, "erased")
        return {member for member, (at,) in zip(asked, found, strict=True) if at}

    def _named(self, selection: Selection) -> Selected:
        found = self._events.of_ids(selection.event_ids)
        missing = set(selection.event_ids) - {event.id for event in found}
        for order in selection.orders:
            found += self._events.of_order(order)
        found = sorted({event.id: event for event in found}.values(), key=_age)
        told: dict[str, int] = {}
        for event in filter(selection.matches, found):
            told[event.key.member] = to_ms(event.at)
        if not selection.asks_of_events:
            # Its events may be older than EVENT_DAYS, or it came by another way than an event.
            for order in selection.orders:
                if selection.company_id in (None, order.company_id):
                    told.setdefault(order.member, 0)
        if selection.dead:
            dead = set(self._dead(None, lambda _: None))
            told = {member: at for member, at in told.items() if member in dead}
        events = sum(event.key.member in told for event in filter(selection.matches, found))
        return Selected(events=events, orders=told, missing=tuple(one for one in selection.event_ids if one in missing))

    def _of_the_stream(self, selection: Selection, step: Callable[[int], None]) -> Selected:
        """Go through the stretch of time with as little work for each event as can be: there may be millions."""
        dead = set(self._dead(None, lambda _: None)) if selection.dead else None
        company, outcome = _encoded(selection.company_id), _encoded(selection.outcome)
        status = None if selection.status is None else selection.status.casefold()
        told: dict[str, int] = {}
        events = 0
        for page in self._pages(selection):
            for event_id, fields in page:
                if (
                    (company is not None and fields[b"company"] != company)
                    or (outcome is not None and fields.get(b"outcome") != outcome)
                    or (status is not None and fields.get(b"status", b"").decode().casefold() != status)
                ):
                    continue
                member = f"{fields[b'company'].decode()}:{fields[b'order'].decode()}"
                if dead is None or member in dead:
                    events += 1
                    told[member] = int(event_id.partition(b"-")[0])
            step(len(page))
        return Selected(events=events, orders=told)

    def _pages(self, selection: Selection) -> Iterator[Any]:
        """Return the entries of the stretch of time as Redis has them; it ends where the stream ends now."""
        newest: Any = self._redis.xrevrange(keys.EVENTS, count=1)
        if not newest:
            return
        low = "-" if selection.since is None else str(max(0, to_ms(selection.since)))
        high = newest[0][0].decode() if selection.until is None else str(max(0, to_ms(selection.until)))
        while True:
            page: Any = self._redis.xrange(keys.EVENTS, low, high, count=PAGE)
            if not page:
                return
            yield page
            low = f"({page[-1][0].decode()}"

    def _dead(self, company_id: str | None, step: Callable[[int], None]) -> list[str]:
        found: list[str] = []
        # What is given up while we walk comes at the end of the zset, and the walk ends all the same.
        for page in pages.oldest_first(self._redis, keys.DEAD):
            found += [member for member, _ in page if company_id is None or member.startswith(f"{company_id}:")]
            step(len(page))
        return list(dict.fromkeys(found))

    def _fields(self, members: Iterable[str], *names: str) -> Iterator[Sequence[int]]:
        left = iter(members)
        while chunk := list(islice(left, _CHUNK)):
            with self._redis.pipeline(transaction=False) as pipe:
                for member in chunk:
                    pipe.hmget(keys.record(OrderKey.of(member)), *names)
                found = pipe.execute()
            yield from ([int(value or 0) for value in values] for values in found)


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def _age(event: StoredEvent) -> tuple[int, int]:
    ms, _, number = event.id.partition("-")
    return int(ms), int(number)
