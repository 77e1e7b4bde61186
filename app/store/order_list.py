"""The list of all orders, kept from growing for ever: what has ended its days leaves it."""

from __future__ import annotations

from typing import Any, Final

from redis import Redis
from redis.exceptions import ResponseError

from app.store import clockwork, keys, schema
from app.store.minute import EachMinute
from app.store.scripts import source

MOST: Final = 500
"""Entries a minute that one pool looks at, 720,000 a day: well below a millisecond, so Redis serves others."""


class OrderList:
    """Trims `ota:orders` a little at a time, and remembers how far it came."""

    def __init__(self, redis: Redis, *, order_days: int) -> None:
        self._keep = order_days * clockwork.DAY
        self._script = redis.register_script(schema.guarded(source("trim")))
        self._minute = EachMinute()
        self._passed = 0

    def trim(self, now: int) -> int:
        """Return how many entries left; does nothing until a minute (ms `now`) after the last time.

        Raises NewerData.
        """
        if not self._minute.is_over(now):
            return 0
        try:
            answer: Any = self._script(keys=[keys.ORDERS], args=[now - self._keep, keys.PREFIX, self._passed, MOST])
        except ResponseError as error:
            raise schema.newer_data(error) or error from None
        looked, removed = answer
        # What is kept (dead letters of years ago) must not hide what comes after it; at the end, from the start again.
        self._passed = self._passed + looked - removed if looked == MOST else 0
        return int(removed)
