"""How busy the way upstream is: what reconciling must see before it adds to it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from redis import Redis

from app.store import keys
from app.store.jobs import BACKFILL, queue_key
from app.store.keys import OrderKey

_CHUNK: Final = 500
"""Orders a round trip."""


class Backlog:
    """Reads; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def backfill(self) -> int:
        """Return how many jobs wait in backfill."""
        waiting: Any = self._redis.llen(queue_key(BACKFILL))
        return int(waiting)

    def owes_live(self, company_ids: Collection[str]) -> bool:
        """Return whether any of these companies is owed a fetch on the live lane."""
        at = 0
        while members := self._members(at):
            wanted = [order for order in map(OrderKey.of, members) if order.company_id in company_ids]
            if any(self._is_live(wanted)):
                return True
            at += _CHUNK
        return False

    def _members(self, at: int) -> list[str]:
        # By position: a member that moves meanwhile may be missed, and this is an estimate of one moment anyway.
        found: Any = self._redis.zrange(keys.DUE, at, at + _CHUNK - 1)
        return [member.decode() for member in found]

    def _is_live(self, orders: list[OrderKey]) -> list[bool]:
        with self._redis.pipeline(transaction=False) as pipe:
            for order in orders:
                pipe.hmget(keys.record(order), "wanted", "done", "lane")
            found = pipe.execute()
        return [int(wanted or 0) > int(done or 0) and lane != BACKFILL.encode() for wanted, done, lane in found]
