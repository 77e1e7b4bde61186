"""Which of many references the ledger knows: the index tells of what was fetched, one walk of all else.

A look-up of one reference searches 20,000 orders at most (reference_index.py); a whole file of them must be told
exactly, so all orders are walked, once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final

from redis import Redis

from app.store import keys, pages
from app.store.holdings import Holdings
from app.store.keys import OrderKey

_CHUNK: Final = 200
"""References a round trip."""


class References:
    """Reads; writes nothing. References are compared in any case."""

    def __init__(self, redis: Redis, company_ids: Collection[str]) -> None:
        self._redis = redis
        self._company_ids = company_ids
        self._holdings = Holdings(redis)

    def indexed(self, references: Iterable[str]) -> set[str]:
        """Return those, as given, by which a fetched order is known."""
        wanted = list(references)
        return {one for at in range(0, len(wanted), _CHUNK) for one in self._indexed(wanted[at : at + _CHUNK])}

    def told(self) -> Iterator[set[str]]:
        """Yield, page by page, the references that events told, also of orders that never came home; case-folded."""
        for page in pages.newest_first(self._redis, keys.ORDERS):
            orders = [order for order in (OrderKey.of(member) for member, _ in page) if self._is_ours(order)]
            with self._redis.pipeline(transaction=False) as pipe:
                for order in orders:
                    pipe.hget(keys.record(order), "reference")
                found: list[Any] = pipe.execute()
            yield {value.decode().casefold() for value in found if value}

    def _indexed(self, wanted: list[str]) -> Iterator[str]:
        with self._redis.pipeline(transaction=False) as pipe:
            for one in wanted:
                pipe.smembers(keys.reference(one))
            found: list[Any] = pipe.execute()
        for one, members in zip(wanted, found, strict=True):
            orders = [order for order in (OrderKey.of(member.decode()) for member in members) if self._is_ours(order)]
            # The index may outlive a record by some days.
            if any(held is not None for held in self._holdings.of(orders)):
                yield one

    def _is_ours(self, order: OrderKey) -> bool:
        return order.company_id in self._company_ids
