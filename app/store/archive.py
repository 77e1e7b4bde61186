"""The orders as people look them up: record, content and trail of one, or many of them page by page."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import chain
from typing import Any, Final

import msgspec
from redis import Redis
from redis.exceptions import ResponseError

from app.errors import ReceiverError, UnreadableAnswer
from app.store import keys, pages
from app.store.keys import OrderKey
from app.store.moment import from_ms, to_ms
from app.store.record import OrderRecord, State, parse_record
from app.store.trail import Entry, Unread, parse_line
from app.upstream.order import Order, parse_order

MOST_SORTED: Final = 20_000
"""Orders on the clock that are sorted by their last change; of more, those that are owed are soon met in a walk."""

_ON_THE_CLOCK: Final = frozenset({"owed", "parked", "fetching"})
"""States of an order that stands in `due`."""


class BrokenRecord(ReceiverError):
    """The key of an order's record holds something that none of our scripts has written there."""

    def __init__(self, order: OrderKey) -> None:
        super().__init__(f"The record of order {order.order_id} is unreadable: look at {keys.record(order)} in Redis.")


class OrderQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which orders to list; all conditions must hold.

    `since` and `until` are aware, inclusive, and mean the last change. `status` is the one told last, in any case.
    """

    company_id: str | None = None
    status: str | None = None
    state: State | None = None
    since: datetime | None = None
    until: datetime | None = None

    def matches(self, record: OrderRecord, now: datetime) -> bool:
        return (
            (self.company_id is None or record.company_id == self.company_id)
            and (self.status is None or record.known_status.casefold() == self.status.casefold())
            and (self.state is None or record.state(now) == self.state)
        )


class Archive:
    """Reads orders; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def record(self, order: OrderKey) -> OrderRecord | None:
        """Return the record of one order, None if there is none.

        Raises BrokenRecord.
        """
        (found,) = self._read([order])
        if isinstance(found, BrokenRecord):
            raise found
        return found

    def records(
        self, orders: Sequence[OrderKey], broken: Callable[[BrokenRecord], object] = lambda _: None
    ) -> list[OrderRecord | None]:
        """Return the record of each order, in one round trip; of a broken one `broken` is told, and it is None."""
        found: list[OrderRecord | None] = []
        for one in self._read(orders):
            if isinstance(one, BrokenRecord):
                broken(one)
                found.append(None)
            else:
                found.append(one)
        return found

    def _read(self, orders: Sequence[OrderKey]) -> list[OrderRecord | BrokenRecord | None]:
        with self._redis.pipeline(transaction=False) as pipe:
            for order in orders:
                pipe.hgetall(keys.record(order))
            found = pipe.execute(raise_on_error=False)
        return [_parsed(order, answer) for order, answer in zip(orders, found, strict=True)]

    def order(self, order: OrderKey) -> Order | None:
        """Return the order as it was last fetched, None if it never was.

        Raises UnreadableAnswer if what is stored is no order.
        """
        try:
            packed: Any = self._redis.get(keys.content(order))
            return None if packed is None else parse_order(zlib.decompress(packed))
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
        except zlib.error:
            pass
        raise UnreadableAnswer("unreadable_content")

    def trail(self, order: OrderKey) -> tuple[Entry, ...]:
        """Return what happened to the order, oldest first; the last 200 entries are kept.

        What is not readable is an Unread.
        """
        try:
            lines: list[Any] = self._redis.lrange(keys.trail(order), 0, -1)
        except ResponseError as error:
            if is_wrong_type(error):
                return (Unread(from_ms(0), f"the trail is unreadable: look at {keys.trail(order)} in Redis"),)
            raise
        return tuple(parse_line(line.decode(errors="replace")) for line in lines)

    def due(self, order: OrderKey) -> datetime | None:
        """Return when the order is looked at again, None if nothing is owed or it was given up."""
        score = self._redis.zscore(keys.DUE, order.member)
        return None if score is None else from_ms(int(score))

    def newest_first(
        self, query: OrderQuery, now: datetime, broken: Callable[[BrokenRecord], object] = lambda _: None
    ) -> Iterator[OrderRecord]:
        """Return the orders that match, the one that changed last first; those that are broken `broken` is told."""
        since = None if query.since is None else to_ms(query.since)
        until = None if query.until is None else to_ms(query.until)
        if query.state in _ON_THE_CLOCK and self._redis.zcard(keys.DUE) <= MOST_SORTED:
            found = self._on_the_clock(since, until)
        else:
            # To be given up is a change like another: the few dead letters need no walk through all orders.
            zset = keys.DEAD if query.state == "dead" else keys.ORDERS
            found = pages.newest_first(self._redis, zset, since, until)
        for page in found:
            orders = [OrderKey.of(member) for member, _ in page]
            wanted = [one for one in orders if query.company_id in (None, one.company_id)]
            for record in self.records(wanted, broken):
                # An order that has ended its days may stand in the list a little longer.
                if record is not None and query.matches(record, now):
                    yield record

    def of_companies(self, order_id: str, company_ids: Iterable[str]) -> list[OrderKey]:
        """Return the orders with this id that these companies have."""
        orders = [OrderKey(company_id, order_id) for company_id in company_ids]
        with self._redis.pipeline(transaction=False) as pipe:
            for order in orders:
                pipe.exists(keys.record(order))
            found = pipe.execute()
        return [order for order, exists in zip(orders, found, strict=True) if exists]

    def of_any_company(self, order_id: str) -> list[OrderKey]:
        """Return the orders with this id, also of companies that the settings no longer name.

        Such a company is known by its counters: of each, events were counted, or gaps of its list.
        """
        fields: Any = self._redis.hkeys(keys.COUNTERS)
        counted = (field.decode(errors="replace").split("|") for field in fields)
        companies = {labels[0] for metric, *labels in counted if metric in {"events", "gaps"} and labels}
        return self.of_companies(order_id, sorted(companies))

    def _on_the_clock(self, since: int | None, until: int | None) -> Iterator[list[pages.Scored]]:
        """Return the orders of `due` in pages, the one that changed last first."""
        # One that is looked at later meanwhile comes again at the end of the walk: a dict holds it once.
        members = dict(chain.from_iterable(pages.oldest_first(self._redis, keys.DUE)))
        changed: list[pages.Scored] = []
        left = list(members)
        for at in range(0, len(left), pages.PAGE):
            chunk = left[at : at + pages.PAGE]
            scores: Any = self._redis.zmscore(keys.ORDERS, chunk)
            changed += [
                (member, int(score))
                for member, score in zip(chunk, scores, strict=True)
                if score is not None and (since or 0) <= score and (until is None or score <= until)
            ]
        changed.sort(key=lambda one: one[1], reverse=True)
        return (changed[at : at + pages.PAGE] for at in range(0, len(changed), pages.PAGE))


def is_wrong_type(answer: object) -> bool:
    """Return whether Redis says that one key is not what we took it for: that one order's fault, not Redis's."""
    return isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE")


def _parsed(order: OrderKey, answer: Any) -> OrderRecord | BrokenRecord | None:
    if is_wrong_type(answer):
        return BrokenRecord(order)
    if isinstance(answer, Exception):
        raise answer
    # A `want` or an event always counts `wanted`: a hash without it is what a late command left of an erased order.
    if b"wanted" not in answer:
        return None
    try:
        return parse_record(order, answer)
    except (ValueError, OverflowError):
        return BrokenRecord(order)
