"""What one process counts beside the scripts: kept in memory and added to the shared counters each second.

A kill loses at most the last second of it; the events themselves are counted by accept.lua, in the step that records
them. Here too goes the mark that asks for a reconcile, so that a flood of forged requests costs nothing per request.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from app import log
from app.store import clockwork, keys

EVERY: Final = 1.0
"""Seconds between two writes."""

ALARM_EVERY: Final = 5 * clockwork.MINUTE
"""A company's alarm is told once in that time, whatever the number of requests and of web processes."""

ADVICE: Final = (
    "Events of this company carry a clientState that is none of ours: somebody tries, or the subscription and"
    " CLIENT_STATE differ (run: ota-receiver check). With NP_PARTNER_ID set, orders are brought home through the list."
)

_log = log.get()


class Tally:
    """Counts in memory, and the task that writes them."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def count(self, metric: str, label: str, times: int = 1) -> None:
        """Add to a metric of counters.METRICS that has one label."""
        self._counts[f"{metric}|{label}"] += times

    def alarm(self, company_id: str, items: int) -> None:
        """Note items with a wrong clientState of a company of the settings: its list of orders must be read soon."""
        self._rejected[company_id] += items

    async def run(self) -> None:
        """Write what was counted, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            await self.flush()

    async def flush(self) -> None:
        """Write what was counted; with Redis away it is kept for the next time."""
        counts, self._counts = self._counts, Counter()
        rejected, self._rejected = self._rejected, Counter()
        if not counts and not rejected:
            return
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                # First, so that the answers begin with theirs.
                for company_id in rejected:
                    pipe.set(keys.alarm(company_id), 1, nx=True, px=ALARM_EVERY)
                    pipe.hincrby(keys.reconcile(company_id), "asks", 1)
                for field, times in counts.items():
                    pipe.hincrby(keys.COUNTERS, field, times)
                answers = await pipe.execute()
        except (RedisError, OSError):
            self._counts.update(counts)
            self._rejected.update(rejected)
            return
        for (company_id, items), is_first in zip(rejected.items(), answers[: 2 * len(rejected) : 2], strict=True):
            if is_first:
                _log.error("auth.alarm", company=company_id, items=items, advice=ADVICE)
