"""What one process counts beside the scripts: kept in memory and added to the shared counters each second.

A kill loses at most the last second of it; the events themselves are counted by accept.lua, in the step that records
them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.store import keys

EVERY: Final = 1.0
"""Seconds between two writes."""


class Tally:
    """Counts in memory, and the task that writes them."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._counts: Counter[str] = Counter()

    def count(self, metric: str, label: str, times: int = 1) -> None:
        """Add to a metric of counters.METRICS that has one label."""
        self._counts[f"{metric}|{label}"] += times

    async def run(self) -> None:
        """Write what was counted, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            await self.flush()

    async def flush(self) -> None:
        """Write what was counted; with Redis away it is kept for the next time."""
        counts, self._counts = self._counts, Counter()
        if not counts:
            return
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                for field, times in counts.items():
                    pipe.hincrby(keys.COUNTERS, field, times)
                await pipe.execute()
        except (RedisError, OSError):
            self._counts.update(counts)
