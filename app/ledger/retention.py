"""EVENT_DAYS for the streams: accept.lua trims as events come, this also when none comes any more.

The list of all orders, kept from growing for ever: what has ended its days leaves it.

What a pool does once a minute and not at every tick: a little housekeeping at a time.
"""

from __future__ import annotations

from typing import Any, Final

from redis import Redis
from redis.exceptions import ResponseError

from app.ledger import keys, policy
from app.ledger.redis import guarded, newer_data, source

EVERY: Final = policy.MINUTE


class EachMinute:
    """Remembers when it is time again; a clock that is set back does not make it wait."""

    def __init__(self) -> None:
        self._next = 0

    def is_over(self, now: int) -> bool:
        """Return True once a minute; `now` is ms since 1970."""
        if now < self._next <= now + EVERY:
            return False
        self._next = now + EVERY
        return True


MOST_ENTRIES: Final = 10_000
"""Entries of one stream a minute, some milliseconds of Redis: 14 million a day, more than any receiver takes in."""


class EventDays:
    """Trims the events, the audit and the list of replays a little at a time."""

    def __init__(self, redis: Redis, *, event_days: int) -> None:
        self._keep = event_days * policy.DAY
        self._script = redis.register_script(guarded(source("retain")))
        self._minute = EachMinute()

    def trim(self, now: int) -> int:
        """Return how many entries left; does nothing until a minute (ms `now`) after the last time.

        Raises NewerData.
        """
        if not self._minute.is_over(now):
            return 0
        try:
            removed: Any = self._script(
                keys=[keys.REPLAYS, keys.EVENTS, keys.AUDIT], args=[now, self._keep, MOST_ENTRIES]
            )
        except ResponseError as error:
            raise newer_data(error) or error from None
        return int(removed)


MOST_ORDERS: Final = 500
"""Entries a minute that one pool looks at, 720,000 a day: well below a millisecond, so Redis serves others."""


class OrderList:
    """Trims `ota:orders` a little at a time, and remembers how far it came."""

    def __init__(self, redis: Redis, *, order_days: int) -> None:
        self._keep = order_days * policy.DAY
        self._script = redis.register_script(guarded(source("trim")))
        self._minute = EachMinute()
        self._passed = 0

    def trim(self, now: int) -> int:
        """Return how many entries left; does nothing until a minute (ms `now`) after the last time.

        Raises NewerData.
        """
        if not self._minute.is_over(now):
            return 0
        try:
            answer: Any = self._script(
                keys=[keys.ORDERS], args=[now - self._keep, keys.PREFIX, self._passed, MOST_ORDERS]
            )
        except ResponseError as error:
            raise newer_data(error) or error from None
        looked, removed = answer
        # What is kept (dead letters of years ago) must not hide what comes after it; at the end, from the start again.
        self._passed = self._passed + looked - removed if looked == MOST_ORDERS else 0
        return int(removed)
