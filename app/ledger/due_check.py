"""Finds orders with outstanding work that are on no clock, so that no dispatcher would ever see them.

Redis has no rollback, so every script writes the clock before anything else, and no failed step leaves such an order.
Another program, or a hand in redis-cli, can.
"""

from __future__ import annotations

from typing import Any, Final

from app.ids import OrderKey
from app.ledger.orders import Archive
from app.ledger.redis import Redis, server_time

STEPS: Final = 1800
"""Calls of `step` in which all keys are read: half an hour, with a call each second."""

LEAST_KEYS: Final = 200


class DueCheck:
    """Walks over all records, a bounded number a call; any number of pools may do so."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._archive = Archive(redis)
        self._cursor = 0

    def step(self) -> int:
        """Read the next records, make due at once those with outstanding work and no due time; return how many.

        Raises what redis-py raises.
        """
        count = max(LEAST_KEYS, -(-self._redis.dbsize() // STEPS))
        answer: Any = self._redis.scan(self._cursor, match=f"{self._redis.names.records}*", count=count, _type="HASH")
        self._cursor, found = answer
        # Another program may have such a key too.
        members = (key.decode(errors="replace").removeprefix(self._redis.names.records) for key in found)
        orders = [OrderKey.of(member) for member in members if member.count(":") == 1]
        lost = self._archive.unscheduled(orders)
        if not lost:
            return 0
        now = server_time(self._redis)
        with self._redis.pipeline(transaction=False) as pipe:
            for order, clocks in lost.items():
                for clock in clocks:
                    # NX: what a step has scheduled since it was read was not lost.
                    pipe.zadd(clock, {order.member: now}, nx=True)
            return sum(pipe.execute())
