"""The answer of /metrics: counters and a histogram kept in one Redis hash, and gauges from a snapshot.

A field of the hash is `prefix|label value|label value`; METRICS and TIMESTAMPS declare the labels. The counters survive
restarts and add up over processes. The label `company` is the slug of the settings; companies that the settings do not
name are counted together as `other`. What a web process counts itself, it keeps in memory and adds each second: a kill
loses at most that second of counts, and no event, since the accept script counts those in the step that records them.
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
from app.settings import Company
from app.snapshot import Snapshot, SnapshotReader

METRICS: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "events": ("ota_events", ("company", "outcome"), "Authenticated events by outcome."),
    "invalid": ("ota_items_invalid", ("reason",), "Items that were not recorded, by reason code."),
    "requests": ("ota_requests", ("status",), "POSTs to the webhook by HTTP status."),
    "spool": ("ota_spool_events", ("what",), "Events kept on the local disk during a Redis outage, and drained."),
    "rejected": ("ota_items_rejected", ("company",), "Items with a wrong clientState, by the company they name."),
    "reconciles": ("ota_reconciles", ("company", "outcome"), "Reconcile runs by outcome."),
    "discrepancies": (
        "ota_reconcile_discrepancies",
        ("company", "kind"),
        "Orders that reconciling found missing or outdated and queued.",
    ),
    "secrets": ("ota_events_by_secret", ("company", "secret"), "Events by the name of the secret that matched."),
    "dead": ("ota_dead_letters", ("company", "reason"), "Orders that became dead letters, by reason code."),
    "deliveries_dead_lettered": (
        "ota_deliveries_dead_lettered",
        ("sink",),
        "Deliveries that became dead letters.",
    ),
}
"""Field prefix -> name, labels, meaning of every counter kept in Redis."""

TIMESTAMPS: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "reconciled": (
        "ota_reconcile_last_success_timestamp_seconds",
        ("company",),
        "When the whole order list was read last.",
    ),
}
"""Field prefix -> name, labels, meaning of every time kept beside the counters, in ms since 1970."""

GAUGES: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "ota_reconcile_interval_seconds": (("company",), "RECONCILE_EVERY, for companies whose orders can be listed."),
    "ota_redis_up": ((), "1 if Redis answered this scrape; otherwise only this and the spool are shown."),
    "ota_schema_newer": ((), "1 if Redis holds data of another version of this service."),
    "ota_spool_waiting_events": ((), "Events on this machine's disk that wait for Redis."),
    "ota_orders_due": ((), "Unfinished orders: fetches, retries and deliveries."),
    "ota_orders_dead": ((), "Orders in dead letters."),
    "ota_deliveries_dead": ((), "Deliveries in dead letters."),
    "ota_queue_jobs": (("queue",), "Jobs that wait for a worker."),
    "ota_queue_oldest_seconds": (("queue",), "Age of the first job of the queue."),
    "ota_dispatcher_lag_seconds": ((), "How long the order that is due first has not been dispatched."),
    "ota_oldest_pending_fetch_seconds": (
        ("company",),
        "Age of the latest event of the order that has waited longest for its fetch.",
    ),
    "ota_orders_unsettled": (("company",), "Orders that the order list showed unsettled and that are watched."),
    "ota_sink_behind_orders": (
        ("sink",),
        "Orders whose latest revision a sink has not received; at most 400 are looked at.",
    ),
    "ota_sink_failing_orders": (("sink",), "Those of them that the sink has refused at least once."),
    "ota_breaker_open": (("company",), "1 while calls for this company are paused."),
    "ota_last_event_timestamp_seconds": (("company", "secret"), "When the last event with this clientState arrived."),
    "ota_pools": ((), "Worker pools with a heartbeat in the last 15 s."),
    "ota_workers": (("queue",), "Worker processes of these pools."),
    "ota_pool_heartbeat_timestamp_seconds": ((), "The latest heartbeat of any pool."),
    "ota_alert": (("name", "company", "sink"), "1 while the alert is firing."),
}
"""Name -> labels, meaning of every gauge."""

HISTOGRAM: Final = (
    "ota_event_to_fetch_seconds",
    ("company",),
    "From the latest event of an order to its stored content, once per event.",
)

OTHER: Final = "other"
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

EVERY: Final = 1.0
"""Seconds between two writes of a CounterBuffer."""

ALERT_EVERY: Final = 5 * policy.MINUTE
"""A company's `auth.alert` is logged once in this time, however many requests and web processes there are."""

ADVICE: Final = (
    "Events of this company carry an unknown clientState: CLIENT_STATE differs from the subscription's (run:"
    " ota-receiver check), or somebody is guessing. With NP_PARTNER_ID, the orders are fetched through the order list."
)

_LATENCY: Final = "latency"

_log = log.get()


class Sample(NamedTuple):
    """The current value of a gauge, and its label values in the order of GAUGES."""

    gauge: str
    value: float
    labels: tuple[str, ...] = ()


class CounterBuffer:
    """Counts of a web process, kept in memory and written by a task.

    Rejected items also trigger a reconcile here, so a flood of forged requests costs nothing per request.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def count(self, metric: str, label: str, times: int = 1) -> None:
        """Add to a counter of METRICS that has one label."""
        self._counts[f"{metric}|{label}"] += times

    def reject(self, company_id: str, items: int) -> None:
        """Note items with a wrong clientState of a company of the settings."""
        self._rejected[company_id] += items

    async def run(self) -> None:
        """Write the counts each second, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            await self.flush()

    async def flush(self) -> None:
        """Write the counts; while Redis is unavailable they are kept for the next time."""
        counts, self._counts = self._counts, Counter()
        rejected, self._rejected = self._rejected, Counter()
        if not counts and not rejected:
            return
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                # These come first, so that the answers begin with theirs.
                for company_id in rejected:
                    pipe.set(keys.alert(company_id), 1, nx=True, px=ALERT_EVERY)
                    pipe.hincrby(keys.reconcile(company_id), "triggers", 1)
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


class Metrics:
    """The answer of one web process to /metrics.

    `spooled` returns the number of events on its disk, None if it is unknown. `reconcile_every`: slug -> seconds
    between two runs, for companies whose orders can be listed.
    """

    def __init__(
        self,
        redis: Redis,
        reader: SnapshotReader,
        spooled: Callable[[], Awaitable[int | None]] | None,
        reconcile_every: Mapping[str, int],
    ) -> None:
        self._redis = redis
        self._reader = reader
        self._spooled = spooled
        self._reconcile_every = reconcile_every
        self._slugs = {one.np_company_id: one.slug for one in reader.companies}

    async def text(self) -> bytes:
        """Return the Prometheus text; during a Redis outage only what this process knows itself."""
        samples = [
            Sample("ota_reconcile_interval_seconds", seconds, (slug,))
            for slug, seconds in self._reconcile_every.items()
        ]
        if self._spooled and (waiting := await self._spooled()) is not None:
            samples.append(Sample("ota_spool_waiting_events", waiting))
        try:
            saved: Any = await self._redis.hgetall(keys.COUNTERS)
            snapshot = await self._reader.read_async(self._redis)
        except (RedisError, OSError):
            return render({}, [*samples, Sample("ota_redis_up", 0)], self._slugs)
        samples += [Sample("ota_redis_up", 1), *_samples(snapshot, self._reader.companies)]
        return render(saved, samples, self._slugs)


def render(saved: Mapping[bytes, bytes], samples: Iterable[Sample], slugs: Mapping[str, str]) -> bytes:
    """Return the Prometheus text of the hash and the gauges; `slugs`: company id -> slug."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Exposition(saved, tuple(samples), slugs))
    return generate_latest(registry)


def add(redis: SyncRedis, counts: Mapping[tuple[str, ...], int]) -> None:
    """Add to counters of METRICS; a name is the field prefix and the label values."""
    with redis.pipeline(transaction=False) as pipe:
        for name, times in counts.items():
            pipe.hincrby(keys.COUNTERS, "|".join(name), times)
        pipe.execute()


def set_timestamp(redis: SyncRedis, name: tuple[str, ...], now: int) -> None:
    """Set a time of TIMESTAMPS to `now` (ms); a name is the field prefix and the label values."""
    redis.hset(keys.COUNTERS, "|".join(name), str(now))


class _Exposition(Collector):
    def __init__(self, saved: Mapping[bytes, bytes], samples: tuple[Sample, ...], slugs: Mapping[str, str]) -> None:
        self._saved: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
        self._samples = samples
        self._slugs = slugs
        for field, value in saved.items():
            prefix, *labels = field.decode(errors="replace").split("|")
            self._saved[prefix][tuple(labels)] = float(value)

    def collect(self) -> Iterable[Metric]:
        for prefix, (name, labels, meaning) in METRICS.items():
            counter = CounterMetricFamily(name, meaning, labels=labels)
            for values, total in sorted(self._summed(prefix, labels).items()):
                counter.add_metric(values, total)
            yield counter
        for prefix, (name, labels, meaning) in TIMESTAMPS.items():
            times = GaugeMetricFamily(name, meaning, labels=labels)
            for values, at in sorted(self._saved[prefix].items()):
                # The order lists of companies that the settings no longer name are not read.
                if len(values) == len(labels) and values[0] in self._slugs:
                    times.add_metric(self._shown(labels, values), at / 1000)
            yield times
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
        for values, times in self._saved[_LATENCY].items():
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
        for values, total in self._saved[prefix].items():
            if len(values) == len(labels):
                summed[self._shown(labels, values)] += int(total)
        return summed

    def _shown(self, labels: tuple[str, ...], values: tuple[str, ...]) -> tuple[str, ...]:
        named = zip(labels, values, strict=True)
        return tuple(self._slugs.get(value, OTHER) if label == "company" else value for label, value in named)


def _samples(snapshot: Snapshot, companies: Iterable[Company]) -> Iterator[Sample]:
    """Return every gauge but those of the process itself."""
    yield Sample("ota_schema_newer", is_other_schema(snapshot.schema.encode() or None))
    yield Sample("ota_orders_due", snapshot.due)
    yield Sample("ota_orders_dead", snapshot.dead)
    yield Sample("ota_deliveries_dead", snapshot.dead_deliveries)
    yield Sample("ota_dispatcher_lag_seconds", snapshot.dispatcher_lag_ms / 1000)
    for queue in (LIVE, BACKFILL):
        yield Sample("ota_queue_jobs", snapshot.queues[queue].jobs, (queue,))
        yield Sample("ota_queue_oldest_seconds", snapshot.queue_age_ms(queue) / 1000, (queue,))
        yield Sample("ota_workers", snapshot.workers(queue), (queue,))
    for company in companies:
        yield from _of_company(snapshot, company)
    yield Sample("ota_oldest_pending_fetch_seconds", snapshot.elsewhere_oldest_pending_ms / 1000, (OTHER,))
    for name, sink in snapshot.sinks.items():
        yield Sample("ota_sink_behind_orders", sink.behind, (name,))
        yield Sample("ota_sink_failing_orders", sink.failing, (name,))
    yield Sample("ota_pools", len(snapshot.running_pools()))
    if pools := snapshot.heartbeats():
        yield Sample("ota_pool_heartbeat_timestamp_seconds", max(pool.at for pool in pools) / 1000)
    for labels, state in snapshot.alert_states().items():
        yield Sample("ota_alert", state.firing_at > 0, labels)


def _of_company(snapshot: Snapshot, company: Company) -> Iterator[Sample]:
    found, label = snapshot.companies[company.np_company_id], (company.slug,)
    yield Sample("ota_oldest_pending_fetch_seconds", found.oldest_pending_ms / 1000, label)
    yield Sample("ota_orders_unsettled", found.unsettled, label)
    yield Sample("ota_breaker_open", snapshot.breaker_is_open(company.np_company_id), label)
    for secret, at in (("current", found.current_secret_at), ("previous", found.previous_secret_at)):
        if at:
            yield Sample("ota_last_event_timestamp_seconds", at / 1000, (company.slug, secret))
