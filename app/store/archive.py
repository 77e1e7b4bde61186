"""The orders as people look them up: record, content and trail of one, or many of them page by page."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import msgspec
from redis import Redis

from app.store import keys, pages
from app.store.keys import OrderKey
from app.store.moment import from_ms, to_ms
from app.store.record import OrderRecord, State, parse_record
from app.store.trail import Entry, parse_line
from app.upstream.order import Order, parse_order


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
        # To be given up is a change like another: the few dead letters need no walk through all orders.
        zset = keys.DEAD if query.state == "dead" else keys.ORDERS
        for page in pages.newest_first(self._redis, zset, since, until):
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
