"""Giving dead letters up for good: the one way, beside their own success, in which something owed ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from app.store import clockwork, keys, schema
from app.store.keys import OrderKey
from app.store.scripts import source


class Drops:
    """Drops dead letters, one a call; raises NewerData for data of a newer version of ours."""

    def __init__(self, redis: Redis, *, order_days: int, sinks: Sequence[str] = ()) -> None:
        self._keep = order_days * clockwork.DAY
        self._sinks = tuple(sinks)
        self._script = redis.register_script(schema.guarded(source("drop")))

    def drop(self, order: OrderKey, sink: str, now: int) -> bool:
        """Drop the order's fetch (`sink` is "") or one hand-on; return False if it was not given up (any more)."""
        key_names = (keys.record(order), keys.DUE, keys.DEAD, keys.trail(order), keys.DEAD_SINKS, keys.content(order))
        try:
            dropped: Any = self._script(keys=key_names, args=[now, order.member, sink, self._keep, *self._sinks])
        except ResponseError as error:
            raise schema.newer_data(error) or error from None
        return bool(dropped)
