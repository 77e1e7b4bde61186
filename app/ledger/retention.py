"""Deletes old entries of the streams and lists in Redis, a bounded number each minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from app.ledger import policy
from app.ledger.redis import Redis, Script

EVERY_SECONDS: Final = 60.0

MOST_ENTRIES: Final = 10_000
"""Entries of one stream a minute, some milliseconds of Redis: 14 million a day, more than any receiver takes in."""

MOST_ORDERS: Final = 500
"""Entries of the list of orders a minute, 720,000 a day: well below a millisecond, so Redis serves others."""


class Retention:
    """Trims the events, the audit, the list of replays (EVENT_DAYS) and the list of orders (ORDER_DAYS).

    accept.lua trims the events when new ones are recorded; this also works when none are. An order that was kept for a
    longer ORDER_DAYS than now is deleted with its entry.
    """

    def __init__(
        self, redis: Redis, *, event_days: int, order_days: int, clock: Callable[[], int] | None = None
    ) -> None:
        self._names = redis.names
        self._events_keep = event_days * policy.DAY
        self._orders_keep = order_days * policy.DAY
        self._expire = Script(redis, "expire", clock)
        self._next = 0.0
        self._passed = 0

    def trim_each_minute(self) -> None:
        """Trim if the last time was a minute ago; raises OtherSchema."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY_SECONDS
            self.trim()

    def trim(self) -> tuple[int, int]:
        """Return how many entries of the streams, and of the list of orders, were deleted; raises OtherSchema."""
        removed, looked, ended = self._expire(
            events_keep=self._events_keep,
            orders_keep=self._orders_keep,
            streams=[self._names.events, self._names.audit],
            limit=MOST_ENTRIES,
            passed=self._passed,
            orders_limit=MOST_ORDERS,
            late=5 * policy.DAY,
        )
        # Old entries that stay (dead letters) must not hide later ones; after the last entry it starts again.
        self._passed = self._passed + looked - ended if looked == MOST_ORDERS else 0
        return removed, ended
