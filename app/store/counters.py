"""What /metrics shows, as Prometheus text: counters and a histogram kept in one Redis hash, and gauges of the moment.

A field of the hash is `metric|label value|label value`; the names of the labels are declared in METRICS. They survive
restarts and add up over processes. The label `company` is the slug of the settings; all others together are `other`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from redis import Redis as SyncRedis

from app.store import keys

METRICS: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "events": ("ota_events", ("company", "outcome"), "Authenticated events by what became of them."),
    "aside": ("ota_items_aside", ("reason",), "Items that were not recorded, by reason code."),
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
    "dead_hand_ons": ("ota_dead_hand_ons", ("sink",), "Hand-ons that were given up."),
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
    "ota_hand_ons_dead": ((), "Hand-ons to sinks that were given up."),
    "ota_queue_jobs": (("queue",), "Jobs that wait for a worker."),
    "ota_queue_oldest_seconds": (("queue",), "For how long the first job of the queue has waited."),
    "ota_ticker_late_seconds": ((), "For how long no pool has looked at an order whose time had come."),
    "ota_oldest_owed_seconds": (("company",), "Age of the latest event of the order that waits longest for its fetch."),
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
    "ota_pool_last_beat_timestamp_seconds": ((), "When a pool has beaten last."),
    "ota_alarm": (("name", "company", "sink"), "1 while the alarm is raised."),
}
"""Name -> labels, meaning of every gauge of the moment (app/store/gauges.py)."""

HISTOGRAM: Final = (
    "ota_order_home_seconds",
    ("company",),
    "From the latest event of an order to its content in the ledger, once an event.",
)
_HOME: Final = "home"
BOUNDS: Final = (250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 120000, 300000, 900000, 3600000, 14400000, 86400000)
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
        for values, times in self._kept[_HOME].items():
            if len(values) == 2:
                found[self._slugs.get(values[0], OTHER)][values[1]] += int(times)
        for company, counts in sorted(found.items()):
            so_far, buckets = 0, []
            for bound in BOUNDS:
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
