"""Finds orders with outstanding work that are not in `due`, so that no dispatcher would ever see them.

Redis has no rollback, so every script writes `due` before anything else, and no failed step leaves such an order.
Another program, or a hand in redis-cli, can.
"""

from __future__ import annotations

from typing import Any, Final

from app.ids import OrderKey
from app.ledger.orders import Archive
from app.ledger.record import OrderRecord
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
        if not (orders := self._without_end(orders)):
            return 0
        sinks: Any = self._redis.hkeys(self._redis.names.sinks)
        declared = {sink.decode() for sink in sinks}
        lost = [record.key for record in self._archive.records(orders) if record and _is_lost(record, declared)]
        if not lost:
            return 0
        now = server_time(self._redis)
        # NX: what a step has scheduled since it was read was not lost.
        added: Any = self._redis.zadd(self._redis.names.due, {order.member: now for order in lost}, nx=True)
        return int(added)

    def _without_end(self, orders: list[OrderKey]) -> list[OrderKey]:
        """Return those that do not expire, so have work or a dead letter, and are not in `due`."""
        with self._redis.pipeline(transaction=True) as pipe:
            for order in orders:
                pipe.ttl(self._redis.names.record(order))
                pipe.zscore(self._redis.names.due, order.member)
            answers = pipe.execute()
        found = zip(orders, answers[::2], answers[1::2], strict=True)
        return [order for order, ttl, score in found if ttl == -1 and score is None]


def _is_lost(record: OrderRecord, sinks: set[str]) -> bool:
    """Return whether it waits for more than an operator; what exactly, start_fetch.lua decides."""
    if record.is_pending:
        return not record.dead
    behind = [one for one in record.sinks if one.revision < record.revision and not one.dead and one.name in sinks]
    return bool(behind) or not (record.dead or record.dead_sinks)
