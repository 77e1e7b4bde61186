"""The orders as people look them up: record, content and trail of one, or many of them page by page."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
from redis import Redis

from app.store import keys, pages
from app.store.keys import OrderKey
from app.store.moment import from_ms, to_ms
from app.store.record import OrderRecord, State, parse_record
from app.store.trail import Entry, parse_line
from app.upstream.order import Order, parse_order

MOST_SEARCHED: Final = 20_000
"""Orders looked through for a reference, newest first: there is no index, and a look-up must end in seconds."""


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
        """Return the record of one order, None if there is none."""
        return self.records([order])[0]

    def records(self, orders: Sequence[OrderKey]) -> list[OrderRecord | None]:
        """Return the record of each order, in one round trip."""
        with self._redis.pipeline(transaction=False) as pipe:
            for order in orders:
                pipe.hgetall(keys.record(order))
            found = pipe.execute()
        # A `want` or an event always counts `wanted`: a hash without it is what a late command left of an erased order.
        return [
            parse_record(order, fields) if b"wanted" in fields else None
            for order, fields in zip(orders, found, strict=True)
        ]

    def order(self, order: OrderKey) -> Order | None:
        """Return the order as it was last fetched, None if it never was."""
        packed: Any = self._redis.get(keys.content(order))
        return None if packed is None else parse_order(zlib.decompress(packed))

    def trail(self, order: OrderKey) -> tuple[Entry, ...]:
        """Return what happened to the order, oldest first; the last 200 entries are kept."""
        lines: list[Any] = self._redis.lrange(keys.trail(order), 0, -1)
        return tuple(parse_line(line.decode()) for line in lines)

    def due(self, order: OrderKey) -> datetime | None:
        """Return when the order is looked at again, None if nothing is owed or it was given up."""
        score = self._redis.zscore(keys.DUE, order.member)
        return None if score is None else from_ms(int(score))

    def newest_first(self, query: OrderQuery, now: datetime) -> Iterator[OrderRecord]:
        """Return the orders that match, the one that changed last first."""
        since = None if query.since is None else to_ms(query.since)
        until = None if query.until is None else to_ms(query.until)
        for page in pages.newest_first(self._redis, keys.ORDERS, since, until):
            orders = [OrderKey.of(member) for member, _ in page]
            wanted = [one for one in orders if query.company_id in (None, one.company_id)]
            for record in self.records(wanted):
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
        """Return the orders with this id, also of companies that the settings no longer name; walks all orders."""
        members = self._redis.zscan_iter(keys.ORDERS, match=f"*:{order_id}", count=1000)
        return sorted({OrderKey.of(member.decode()) for member, _ in members})

    def by_reference(self, reference: str) -> list[OrderKey]:
        """Return the orders whose buyFromOrderReference, or else sellToOrderReference, is `reference`, in any case.

        Looks through the MOST_SEARCHED that changed last.
        """
        wanted = reference.casefold()
        return self._search(self._bought_as, wanted) or self._search(self._sold_as, wanted)

    def _search(self, references: Callable[[list[OrderKey]], list[str]], wanted: str) -> list[OrderKey]:
        found: list[OrderKey] = []
        searched = 0
        for page in pages.newest_first(self._redis, keys.ORDERS):
            orders = [OrderKey.of(member) for member, _ in page]
            said = references(orders)
            found += [order for order, text in zip(orders, said, strict=True) if text.casefold() == wanted]
            searched += len(page)
            if searched >= MOST_SEARCHED:
                break
        return found

    def _bought_as(self, orders: list[OrderKey]) -> list[str]:
        with self._redis.pipeline(transaction=False) as pipe:
            for order in orders:
                pipe.hget(keys.record(order), "reference")
            return [(value or b"").decode() for value in pipe.execute()]

    def _sold_as(self, orders: list[OrderKey]) -> list[str]:
        with self._redis.pipeline(transaction=False) as pipe:
            for order in orders:
                pipe.get(keys.content(order))
            return [_sold_to(packed) for packed in pipe.execute()]


class _Sold(msgspec.Struct, rename="camel"):
    """The one field of an order that the search reads; the rest is not even decoded."""

    sell_to_order_reference: str = ""


_sold = msgspec.json.Decoder(_Sold)


def _sold_to(packed: bytes | None) -> str:
    if packed is None:
        return ""
    try:
        return _sold.decode(zlib.decompress(packed)).sell_to_order_reference
    except ValueError:  # an odd field: it is no reference that anybody could type
        return ""
