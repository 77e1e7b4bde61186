"""The vital signs as gauges, and the whole answer of /metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.store import clockwork, counters, keys, schema
from app.store.counters import OTHER, Sample
from app.store.jobs import BACKFILL, LIVE
from app.store.vitals import Subject, Vitals, VitalSigns

BEAT_WITHIN: Final = 15 * clockwork.SECOND
"""A pool beats each second; in so many it has hung, or cannot reach Redis."""

BREAKER_REST: Final = clockwork.MINUTE
"""After a breaker's time is over its probe comes within so much, if any order is owed; else nobody knows, and it is
taken for closed."""


class Metrics:
    """What one web process answers on /metrics; `spooled` tells how many events wait on its disk, None without one.

    `reconcile_every`: seconds between two readings of a company's list, by slug, of those that have one.
    """

    def __init__(
        self,
        redis: Redis,
        signs: VitalSigns,
        clock: Callable[[], int],
        spooled: Callable[[], Awaitable[int]] | None,
        reconcile_every: Mapping[str, int],
    ) -> None:
        self._redis = redis
        self._signs = signs
        self._clock = clock
        self._spooled = spooled
        self._reconcile_every = reconcile_every
        self._slugs = {one.company_id: one.slug for one in signs.subjects}

    async def text(self) -> bytes:
        """Return the Prometheus text; without Redis what this process knows by itself. Never raises for Redis."""
        samples = [
            Sample("ota_reconcile_interval_seconds", seconds, (slug,))
            for slug, seconds in self._reconcile_every.items()
        ]
        if self._spooled:
            samples.append(Sample("ota_spool_waiting_events", await self._spooled()))
        try:
            kept: Any = await self._redis.hgetall(keys.COUNTERS)
            found = await self._signs.read_async(self._redis, self._clock())
        except (RedisError, OSError):
            return counters.render({}, [*samples, Sample("ota_redis_up", 0)], self._slugs)
        samples += [Sample("ota_redis_up", 1), *samples_of(found, self._signs.subjects)]
        return counters.render(kept, samples, self._slugs)


def samples_of(found: Vitals, subjects: Iterable[Subject]) -> Iterator[Sample]:
    """Return every gauge but those of the process itself."""
    yield Sample("ota_schema_newer", schema.is_newer(found.schema.encode() or None))
    yield Sample("ota_orders_due", found.due)
    yield Sample("ota_orders_dead", found.dead)
    yield Sample("ota_hand_ons_dead", found.dead_hand_ons)
    yield Sample("ota_ticker_late_seconds", found.late / 1000)
    for queue in (LIVE, BACKFILL):
        yield Sample("ota_queue_jobs", found.queues[queue].jobs, (queue,))
        yield Sample("ota_queue_oldest_seconds", found.waited(queue) / 1000, (queue,))
    for one in subjects:
        yield from _of_company(found, one)
    yield Sample("ota_oldest_owed_seconds", found.elsewhere / 1000, (OTHER,))
    for name, sink in found.sinks.items():
        yield Sample("ota_sink_behind_orders", sink.behind, (name,))
        yield Sample("ota_sink_failing_orders", sink.failing, (name,))
    yield from _of_pools(found)
    yield from _of_alarms(found)


def is_open(found: Vitals, company_id: str) -> bool:
    """Tell whether a breaker is open, or half open with a probe still to come."""
    until = found.companies[company_id].breaker_until
    return until > 0 and found.now < until + BREAKER_REST


def _of_company(found: Vitals, one: Subject) -> Iterator[Sample]:
    vitals, label = found.companies[one.company_id], (one.slug,)
    yield Sample("ota_oldest_owed_seconds", max(vitals.oldest_owed, 0) / 1000, label)
    yield Sample("ota_orders_unsettled", vitals.unsettled, label)
    yield Sample("ota_breaker_open", is_open(found, one.company_id), label)
    for secret, seen in (("current", vitals.current_seen), ("previous", vitals.previous_seen)):
        if seen:
            yield Sample("ota_last_event_timestamp_seconds", seen / 1000, (one.slug, secret))


def _of_pools(found: Vitals) -> Iterator[Sample]:
    pools = found.heartbeats()
    living = [pool for pool in pools if found.now - pool.beat < BEAT_WITHIN]
    yield Sample("ota_pools", len(living))
    for lane in (LIVE, BACKFILL):
        yield Sample("ota_workers", sum(f"-{lane}-" in name for pool in living for name in pool.workers), (lane,))
    if pools:
        yield Sample("ota_pool_last_beat_timestamp_seconds", max(pool.beat for pool in pools) / 1000)


def _of_alarms(found: Vitals) -> Iterator[Sample]:
    for labels, state in found.alarm_states().items():
        yield Sample("ota_alarm", state.raised > 0, labels)
