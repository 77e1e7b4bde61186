"""What /metrics shows, as Prometheus text: counters and a histogram kept in one Redis hash, and gauges of the moment.

A field of the hash is `metric|label value|label value`; the names of the labels are declared in METRICS. They survive
restarts and add up over processes. The label `company` is the slug of the settings; all others together are `other`.

What one process counts beside the scripts: kept in memory and added to the shared counters each second.

A kill loses at most the last second of it; the events themselves are counted by accept.lua, in the step that records
them. Here too goes the mark that asks for a reconcile, so that a flood of forged requests costs nothing per request.

The vital signs as gauges, and the whole answer of /metrics.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app import log
from app.ledger import keys, policy
from app.ledger.ledger import LATENCY_BOUNDS
from app.ledger.redis import is_other_schema
from app.ledger.rq_jobs import BACKFILL, LIVE
from app.snapshot import Subject, Vitals, VitalSigns

METRICS: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "events": ("ota_events", ("company", "outcome"), "Authenticated events by what became of them."),
    "invalid_items": ("ota_items_invalid", ("reason",), "Items that were not recorded, by reason code."),
    "requests": ("ota_requests", ("status",), "POSTs to the webhook by the status they were answered."),
    "spool": (
        "ota_spool_events",
        ("what",),
        "Events kept on the local disk while Redis was away, and drained from it.",
    ),
    "rejected": ("ota_items_rejected", ("company",), "Items with a wrong clientState, by the company they name."),
    "reconciles": ("ota_reconciles", ("company", "outcome"), "Reconcile runs by how they ended."),
    "gaps": ("ota_reconcile_gaps", ("company", "kind"), "Orders that were found missing or outdated, and queued."),
    "secrets": (
        "ota_events_by_secret",
        ("company", "secret"),
        "Events by the name of the secret that matched.",
    ),
    "dead": ("ota_dead_letters", ("company", "reason"), "Orders that were given up, by reason code."),
    "deliveries_dead_lettered": ("ota_deliveries_dead_lettered", ("sink",), "Hand-ons that were given up."),
}
"""Field prefix -> name, labels, meaning of every counter kept in Redis."""

MARKS: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "reconciled": (
        "ota_reconcile_last_success_timestamp_seconds",
        ("company",),
        "When the whole list of orders was read last.",
    ),
}
"""Field prefix -> name, labels, meaning of every moment kept beside the counters, in ms since 1970."""

GAUGES: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "ota_reconcile_interval_seconds": (("company",), "RECONCILE_EVERY, of companies whose list of orders can be read."),
    "ota_redis_up": ((), "1 if Redis answered this scrape; if it did not, only this and the spool are shown."),
    "ota_schema_newer": ((), "1 if a newer version of this service has written to Redis: this one does nothing."),
    "ota_spool_waiting_events": ((), "Events on this machine's disk that wait for Redis."),
    "ota_orders_due": ((), "Orders that somebody must look at again."),
    "ota_orders_dead": ((), "Orders that were given up."),
    "ota_deliveries_dead": ((), "Hand-ons to sinks that were given up."),
    "ota_queue_jobs": (("queue",), "Jobs that wait for a worker."),
    "ota_queue_oldest_seconds": (("queue",), "For how long the first job of the queue has waited."),
    "ota_dispatcher_lag_seconds": ((), "For how long no pool has looked at an order whose time had come."),
    "ota_oldest_pending_fetch_seconds": (
        ("company",),
        "Age of the latest event of the order that waits longest for its fetch.",
    ),
    "ota_orders_unsettled": (("company",), "Orders that the list showed unsettled, and that reconciling looks after."),
    "ota_sink_behind_orders": (
        ("sink",),
        "Orders whose latest revision a sink has not had; at most 400 are looked at.",
    ),
    "ota_sink_failing_orders": (("sink",), "Those of them that the sink has refused at least once."),
    "ota_breaker_open": (("company",), "1 while the API key or address of a company is at fault: nothing is fetched."),
    "ota_last_event_timestamp_seconds": (("company", "secret"), "When an event with this clientState came last."),
    "ota_pools": ((), "Worker pools that have beaten within 15 s."),
    "ota_workers": (("lane",), "Worker processes of these pools."),
    "ota_pool_heartbeat_timestamp_seconds": ((), "When a pool has beaten last."),
    "ota_alert": (("name", "company", "sink"), "1 while the alert is raised."),
}
"""Name -> labels, meaning of every gauge of the moment (app/metrics.py)."""

HISTOGRAM: Final = (
    "ota_event_to_fetch_seconds",
    ("company",),
    "From the latest event of an order to its content in the ledger, once an event.",
)
_LATENCY: Final = "latency"
"""Upper bounds of its buckets in ms; measure.lua says the same."""

OTHER: Final = "other"
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST


class Sample(NamedTuple):
    """The value of a gauge now, and of its labels in the order of GAUGES."""

    gauge: str
    value: float
    labels: tuple[str, ...] = ()


def render(kept: Mapping[bytes, bytes], samples: Iterable[Sample], slugs: Mapping[str, str]) -> bytes:
    """Return the Prometheus text of what is kept in Redis and of the gauges; `slugs`: company id -> slug."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(kept, tuple(samples), slugs))
    return generate_latest(registry)


def add(redis: SyncRedis, counts: Mapping[tuple[str, ...], int]) -> None:
    """Add to counters of METRICS; a name is the field prefix and the label values."""
    with redis.pipeline(transaction=False) as pipe:
        for name, times in counts.items():
            pipe.hincrby(keys.COUNTERS, "|".join(name), times)
        pipe.execute()


def mark(redis: SyncRedis, name: tuple[str, ...], now: int) -> None:
    """Note that something of MARKS was done at `now` (ms); a name is the field prefix and the label values."""
    redis.hset(keys.COUNTERS, "|".join(name), str(now))


class _Snapshot(Collector):
    def __init__(self, kept: Mapping[bytes, bytes], samples: tuple[Sample, ...], slugs: Mapping[str, str]) -> None:
        self._kept: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
        self._samples = samples
        self._slugs = slugs
        for field, value in kept.items():
            prefix, *labels = field.decode(errors="replace").split("|")
            self._kept[prefix][tuple(labels)] = float(value)

    def collect(self) -> Iterable[Metric]:
        for prefix, (name, labels, meaning) in METRICS.items():
            counter = CounterMetricFamily(name, meaning, labels=labels)
            for values, total in sorted(self._summed(prefix, labels).items()):
                counter.add_metric(values, total)
            yield counter
        for prefix, (name, labels, meaning) in MARKS.items():
            moments = GaugeMetricFamily(name, meaning, labels=labels)
            for values, at in sorted(self._kept[prefix].items()):
                # Of companies that the settings no longer name, nobody reads the list.
                if len(values) == len(labels) and values[0] in self._slugs:
                    moments.add_metric(self._shown(labels, values), at / 1000)
            yield moments
        yield self._histogram()
        for name, (labels, meaning) in GAUGES.items():
            gauge = GaugeMetricFamily(name, meaning, labels=labels)
            for sample in self._samples:
                if sample.gauge == name:
                    gauge.add_metric(sample.labels, sample.value)
            yield gauge

    def _histogram(self) -> Metric:
        name, labels, meaning = HISTOGRAM
        family = HistogramMetricFamily(name, meaning, labels=labels)
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for values, times in self._kept[_LATENCY].items():
            if len(values) == 2:
                found[self._slugs.get(values[0], OTHER)][values[1]] += int(times)
        for company, counts in sorted(found.items()):
            so_far, buckets = 0, []
            for bound in LATENCY_BOUNDS:
                so_far += counts[str(bound)]
                buckets.append((str(bound / 1000), float(so_far)))
            buckets.append(("+Inf", float(so_far + counts["inf"])))
            family.add_metric([company], buckets, counts["sum"] / 1000)
        return family

    def _summed(self, prefix: str, labels: tuple[str, ...]) -> Counter[tuple[str, ...]]:
        summed: Counter[tuple[str, ...]] = Counter()
        for values, total in self._kept[prefix].items():
            if len(values) == len(labels):
                summed[self._shown(labels, values)] += int(total)
        return summed

    def _shown(self, labels: tuple[str, ...], values: tuple[str, ...]) -> tuple[str, ...]:
        named = zip(labels, values, strict=True)
        return tuple(self._slugs.get(value, OTHER) if label == "company" else value for label, value in named)


EVERY: Final = 1.0
"""Seconds between two writes."""

ALARM_EVERY: Final = 5 * policy.MINUTE
"""A company's alert is told once in that time, whatever the number of requests and of web processes."""

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

    def alert(self, company_id: str, items: int) -> None:
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
                    pipe.set(keys.alert(company_id), 1, nx=True, px=ALARM_EVERY)
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
                _log.error("auth.alert", company=company_id, items=items, advice=ADVICE)


BEAT_WITHIN: Final = 15 * policy.SECOND
"""A pool beats each second; in so many it has hung, or cannot reach Redis."""

BREAKER_REST: Final = policy.MINUTE
"""After a breaker's time is over its probe comes within so much, if any order is owed; else nobody knows, and it is
taken for closed."""


class Metrics:
    """What one web process answers on /metrics; `spooled` returns how many events wait on its disk, None if unknown.

    `reconcile_every`: seconds between two readings of a company's list, by slug, of those that have one.
    """

    def __init__(
        self,
        redis: Redis,
        signs: VitalSigns,
        spooled: Callable[[], Awaitable[int | None]] | None,
        reconcile_every: Mapping[str, int],
    ) -> None:
        self._redis = redis
        self._signs = signs
        self._spooled = spooled
        self._reconcile_every = reconcile_every
        self._slugs = {one.company_id: one.slug for one in signs.subjects}

    async def text(self) -> bytes:
        """Return the Prometheus text; without Redis what this process knows by itself. Never raises for Redis."""
        samples = [
            Sample("ota_reconcile_interval_seconds", seconds, (slug,))
            for slug, seconds in self._reconcile_every.items()
        ]
        if self._spooled and (waiting := await self._spooled()) is not None:
            samples.append(Sample("ota_spool_waiting_events", waiting))
        try:
            kept: Any = await self._redis.hgetall(keys.COUNTERS)
            found = await self._signs.read_async(self._redis)
        except (RedisError, OSError):
            return render({}, [*samples, Sample("ota_redis_up", 0)], self._slugs)
        samples += [Sample("ota_redis_up", 1), *samples_of(found, self._signs.subjects)]
        return render(kept, samples, self._slugs)


def samples_of(found: Vitals, subjects: Iterable[Subject]) -> Iterator[Sample]:
    """Return every gauge but those of the process itself."""
    yield Sample("ota_schema_newer", is_other_schema(found.schema.encode() or None))
    yield Sample("ota_orders_due", found.due)
    yield Sample("ota_orders_dead", found.dead)
    yield Sample("ota_deliveries_dead", found.dead_deliveries)
    yield Sample("ota_dispatcher_lag_seconds", found.late / 1000)
    for queue in (LIVE, BACKFILL):
        yield Sample("ota_queue_jobs", found.queues[queue].jobs, (queue,))
        yield Sample("ota_queue_oldest_seconds", found.waited(queue) / 1000, (queue,))
    for one in subjects:
        yield from _of_company(found, one)
    yield Sample("ota_oldest_pending_fetch_seconds", found.elsewhere / 1000, (OTHER,))
    for name, sink in found.sinks.items():
        yield Sample("ota_sink_behind_orders", sink.behind, (name,))
        yield Sample("ota_sink_failing_orders", sink.failing, (name,))
    yield from _of_pools(found)
    yield from _of_alerts(found)


def is_open(found: Vitals, company_id: str) -> bool:
    """Tell whether a breaker is open, or half open with a probe still to come."""
    until = found.companies[company_id].breaker_until
    return until > 0 and found.now < until + BREAKER_REST


def _of_company(found: Vitals, one: Subject) -> Iterator[Sample]:
    vitals, label = found.companies[one.company_id], (one.slug,)
    yield Sample("ota_oldest_pending_fetch_seconds", max(vitals.oldest_owed, 0) / 1000, label)
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
        yield Sample("ota_pool_heartbeat_timestamp_seconds", max(pool.beat for pool in pools) / 1000)


def _of_alerts(found: Vitals) -> Iterator[Sample]:
    for labels, state in found.alert_states().items():
        yield Sample("ota_alert", state.raised > 0, labels)
