"""Finding orders by a reference of either side, or by request id.

store_fetch.lua indexes the references of an order; one that was never fetched has the buyFromOrderReference of its
event in its record alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Final

from app.ids import OrderKey
from app.ledger.orders import MOST_SEARCHED, read_fields
from app.ledger.redis import Redis, newest_first

_REFERENCES_A_CALL: Final = 200


class References:
    """Finds orders by reference, in any case; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def orders(self, reference: str, company_id: str | None = None, most: int = MOST_SEARCHED) -> list[OrderKey]:
        """Return the orders that have this buyFromOrderReference, sellToOrderReference or request_id, sorted.

        `company_id` leaves out those of other companies. A blank reference names no order. What is not in the index is
        searched among the newest `most` of each list.
        """
        if not reference.strip():
            return []
        ((_, indexed),) = self._indexed([reference])
        found = [order for order in indexed if company_id in (None, order.company_id)]
        return sorted(found or self._searched(reference.strip().casefold(), company_id, most))

    def of_fetched(self, reference: str) -> list[OrderKey]:
        """Return the fetched orders that have this reference of either side, sorted."""
        ((_, indexed),) = self._indexed([reference])
        return sorted(indexed)

    def fetched(self, references: Iterable[str], company_ids: Collection[str]) -> set[str]:
        """Return those, as given, that a fetched order of these companies has."""
        wanted = list(references)
        return {
            one
            for at in range(0, len(wanted), _REFERENCES_A_CALL)
            for one, orders in self._indexed(wanted[at : at + _REFERENCES_A_CALL])
            if any(order.company_id in company_ids for order in orders)
        }

    def of_events(self, company_ids: Collection[str]) -> Iterator[set[str]]:
        """Yield, page by page, the case-folded references of events, also of orders that were never fetched."""
        for page in newest_first(self._redis, self._redis.names.orders):
            orders = [order for member, _ in page if (order := OrderKey.of(member)).company_id in company_ids]
            yield set(self._event_references(orders)) - {""}

    def _indexed(self, references: Sequence[str]) -> list[tuple[str, list[OrderKey]]]:
        with self._redis.pipeline(transaction=False) as pipe:
            for one in references:
                pipe.smembers(self._redis.names.reference(one))
            found = [[OrderKey.of_packed(member.decode()) for member in members] for members in pipe.execute()]
        # An entry of the index may outlive its record by some days.
        every = list(dict.fromkeys(chain.from_iterable(found)))
        held = read_fields(self._redis, every, "generation")
        stored = {order for order, (generation,) in zip(every, held, strict=True) if generation}
        return [(one, [key for key in orders if key in stored]) for one, orders in zip(references, found, strict=True)]

    def _searched(self, reference: str, company_id: str | None, most: int) -> set[OrderKey]:
        # The outstanding and the dead too: after a long outage they are not among the newest.
        zsets = (self._redis.names.due, self._redis.names.dead, self._redis.names.orders)
        pages = (islice(chain.from_iterable(newest_first(self._redis, zset)), most) for zset in zsets)
        every = map(OrderKey.of, {member for member, _ in chain.from_iterable(pages)})
        orders = [order for order in every if company_id in (None, order.company_id)]
        names = read_fields(self._redis, orders, "reference", "request_id")
        known = zip(orders, ([_folded(one) for one in both] for both in names), strict=True)
        return {order for order, texts in known if reference in texts}

    def _event_references(self, orders: Sequence[OrderKey]) -> Iterator[str]:
        return (_folded(text) for (text,) in read_fields(self._redis, orders, "reference"))


def _folded(text: bytes | None) -> str:
    return (text or b"").decode(errors="replace").casefold()
