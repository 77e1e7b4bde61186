"""EVENT_DAYS for the streams: accept.lua trims as events come, this also when none comes any more."""

from __future__ import annotations

from typing import Any, Final

from redis import Redis
from redis.exceptions import ResponseError

from app.store import clockwork, keys, schema
from app.store.minute import EachMinute
from app.store.scripts import source

MOST: Final = 10_000
"""Entries of one stream a minute, some milliseconds of Redis: 14 million a day, more than any receiver takes in."""


class EventDays:
    """Trims the events, the audit and the list of replays a little at a time."""

    def __init__(self, redis: Redis, *, event_days: int) -> None:
        self._keep = event_days * clockwork.DAY
        self._script = redis.register_script(schema.guarded(source("retain")))
        self._minute = EachMinute()

    def trim(self, now: int) -> int:
        """Return how many entries left; does nothing until a minute (ms `now`) after the last time.

        Raises NewerData.
        """
        if not self._minute.is_over(now):
            return 0
        try:
            removed: Any = self._script(keys=[keys.REPLAYS, keys.EVENTS, keys.AUDIT], args=[now, self._keep, MOST])
        except ResponseError as error:
            raise schema.newer_data(error) or error from None
        return int(removed)
