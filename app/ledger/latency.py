"""How long after their events orders are fetched, of each company, in the last hours: numbers, nothing of an order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from app.ledger.ledger import LATENCY_BOUNDS
from app.ledger.redis import Redis

_HOUR: Final = 3_600_000


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Fetches in the time looked at, and within how many ms of their events half of them came, and 95 of 100.

    Each is a bound of LATENCY_BOUNDS: the true value lies between it and the bound below, so of 30,000 one knows that
    it is more than 10,000. None without a fetch, and with `fetches` where it took longer than the last bound, a day.
    """

    p50_ms: int | None
    p95_ms: int | None
    fetches: int


def read_latency(redis: Redis, company_ids: Iterable[str], hours: int, now: int) -> dict[str, Latency]:
    """Return the latency of each company in the clock hour of `now` (ms) and those before it, `hours` in all.

    At most 48: store_fetch.lua keeps an hour for 49. One fetch counts for all events that it answers, from the latest
    of them; a fetch that no event asked for does not count. Raises what redis-py raises.
    """
    companies = list(company_ids)
    current = now // _HOUR
    with redis.pipeline(transaction=False) as pipe:
        for company in companies:
            for hour in range(current - hours + 1, current + 1):
                pipe.hgetall(redis.names.latency(company, hour))
        answers = pipe.execute()
    return {
        company: _latency(answers[number * hours : (number + 1) * hours]) for number, company in enumerate(companies)
    }


def _latency(hashes: Iterable[Any]) -> Latency:
    buckets = Counter[str]()
    for one in hashes:
        buckets.update({bound.decode(): int(count) for bound, count in one.items()})
    fetches = buckets.total()

    def quantile(percent: int) -> int | None:
        seen = 0
        for bound in LATENCY_BOUNDS:
            seen += buckets[str(bound)]
            if fetches and 100 * seen >= percent * fetches:
                return bound
        return None

    return Latency(p50_ms=quantile(50), p95_ms=quantile(95), fetches=fetches)
