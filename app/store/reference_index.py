"""Orders by the references that people know them by: an index of those that were fetched, and a search for the rest.

`finish` writes both references of an order into the index. One that was never fetched is known by the
buyFromOrderReference of its event alone, which its record holds; it is owed, or dead, or went without ever coming home.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

from redis import Redis

from app.store import keys, pages
from app.store.archive import is_wrong_type
from app.store.keys import OrderKey

MOST_SEARCHED: Final = 15_000
"""Orders of each list that are looked through for a reference that is not in the index: a look-up must end at once."""


class ReferenceIndex:
    """Reads; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def orders(self, reference: str, company_id: str | None = None) -> list[OrderKey]:
        """Return the orders that have this buyFromOrderReference or sellToOrderReference, in any case.

        `company_id` leaves out those of other companies. Sorted; an order that is here no more is not among them.
        A blank reference names none, not those that have no reference.
        """
        if not reference.strip():
            return []
        return self._indexed(reference, company_id) or sorted(self._searched(reference.strip().casefold(), company_id))

    def _indexed(self, reference: str, company_id: str | None) -> list[OrderKey]:
        members: Any = self._redis.smembers(keys.reference(reference))
        orders = sorted(OrderKey.of(member.decode()) for member in members)
        # The index may outlive a record by some days, and knows nothing of one that was erased.
        wanted = self._fields([one for one in orders if company_id in (None, one.company_id)], "wanted")
        return [order for order, count in wanted if count]

    def _searched(self, wanted: str, company_id: str | None) -> set[OrderKey]:
        found: set[OrderKey] = set()
        # The owed and the dead first: after a long outage they may be older than the newest of all.
        for zset in (keys.DUE, keys.DEAD, keys.ORDERS):
            found |= set(self._in(zset, wanted, company_id))
            if found:
                break
        return found

    def _in(self, zset: str, wanted: str, company_id: str | None) -> Iterator[OrderKey]:
        searched = 0
        for page in pages.newest_first(self._redis, zset):
            orders = [OrderKey.of(member) for member, _ in page]
            asked = [order for order in orders if company_id in (None, order.company_id)]
            yield from (order for order, said in self._fields(asked, "reference") if said.casefold() == wanted)
            searched += len(page)
            if searched >= MOST_SEARCHED:
                return

    def _fields(self, orders: Collection[OrderKey], name: str) -> list[tuple[OrderKey, str]]:
        with self._redis.pipeline(transaction=False) as pipe:
            for order in orders:
                pipe.hget(keys.record(order), name)
            found = pipe.execute(raise_on_error=False)
        return [(order, _text(value)) for order, value in zip(orders, found, strict=True)]


def _text(value: Any) -> str:
    # A broken record has no reference; the others are to be found all the same.
    if is_wrong_type(value):
        return ""
    if isinstance(value, Exception):
        raise value
    return (value or b"").decode(errors="replace")
