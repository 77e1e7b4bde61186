"""Lists of orders for people, page by page: by what they are, outstanding, or refused by a sink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from app.ids import OrderKey
from app.ledger import policy
from app.ledger.orders import ON_THE_CLOCK, Archive, OrderQuery
from app.ledger.pages import MOST_READ, Page, page_of, scored_page
from app.ledger.record import OrderRecord
from app.ledger.redis import Redis, Scored


class OrderLists:
    """Reads pages of orders; writes nothing. Every method raises UnknownCursor, and what redis-py raises.

    Where the record of an order is missing or broken, its row has no more than the two ids, and `generation` 0; the
    list of `page` leaves such orders out.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._archive = Archive(redis)

    def page(self, query: OrderQuery, now: datetime, after: str | None = None, limit: int = 50) -> Page[OrderRecord]:
        """Return a page of the orders that match, the one that changed last first.

        Those of a state whose orders all have a fetch outstanding come by the time of their next fetch, soonest first;
        `since` and `until` mean that time then. An order that changes while somebody pages moves to the front, which
        is behind the reader; one whose next fetch moves may come twice, or not at all.
        """
        names = self._redis.names
        is_on_clock = query.state in ON_THE_CLOCK
        zset = names.due if is_on_clock else names.dead if query.state == "dead" else names.orders

        def matches(record: OrderRecord) -> bool:
            # One that has ended its days may stand in the list a little longer.
            return record.generation > 0 and query.matches(record, now)

        return scored_page(
            self._redis,
            [zset],
            partial(self._rows, query.company_id, matches),
            after,
            limit,
            since=query.since,
            until=query.until,
            newest_first=not is_on_clock,
            most=MOST_READ,
        )

    def outstanding(
        self, sink: str = "", after: str | None = None, limit: int = 50, *, company_id: str | None = None
    ) -> Page[OrderRecord]:
        """Return a page of the orders with a fetch outstanding, or with a delivery to a sink, soonest first.

        They are those that the snapshot counts as `due` and `behind`. One whose next attempt moves while somebody pages
        may come twice, or not at all.
        """
        names = self._redis.names
        zset = names.deliveries(sink) if sink else names.due
        return scored_page(self._redis, [zset], partial(self._rows, company_id, _all), after, limit)

    def failing(
        self,
        sink: str,
        now: datetime,
        after: str | None = None,
        limit: int = 50,
        *,
        company_id: str | None = None,
    ) -> Page[OrderRecord]:
        """Return a page of the orders that a sink refused and that wait for their next attempt, soonest first.

        They are those that the snapshot counts as `failing`: of at most policy.SAMPLE orders at either end of its
        clock. The rest is as for `outstanding`.
        """
        client: Any = self._redis
        clock = self._redis.names.deliveries(sink)
        ends = [client.zrange(clock, 0, policy.SAMPLE - 1, desc=desc, withscores=True) for desc in (False, True)]
        entries = {member.decode(): int(score) for end in ends for member, score in end}

        def has_failed(record: OrderRecord) -> bool:
            # The attempt that runs now has been counted, and has not failed.
            return any(
                one.name == sink and one.attempts > (1 if one.lease is not None and one.lease > now else 0)
                for one in record.sinks
            )

        return page_of([*entries.items()], partial(self._rows, company_id, has_failed), after, limit)

    def _rows(
        self, company_id: str | None, matches: Callable[[OrderRecord], bool], entries: Sequence[Scored]
    ) -> list[OrderRecord | None]:
        """Return a row for each entry, None for one of another company and one that does not match."""
        every = [OrderKey.of(member) for member, _ in entries]
        wanted = [order for order in every if company_id in (None, order.company_id)]
        records = dict(zip(wanted, self._archive.records(wanted), strict=True))
        found = [None if order not in records else records[order] or OrderRecord(**order._asdict()) for order in every]
        return [one if one is not None and matches(one) else None for one in found]


def _all(_: OrderRecord) -> bool:
    return True
