"""The answer of /metrics: counters and histograms kept in one Redis hash, and gauges from a snapshot.

A field of the hash is `prefix|label value|label value`; METRICS declares the labels. The counters survive
restarts and add up over processes. The label `company` is the slug of the settings or of a pool; companies that neither
names are counted together as `other`. What a web process counts itself, it keeps in memory and adds each second: a kill
loses at most that second of counts, and no event, since the accept script counts those in the step that records them.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from app import log
from app.intake.auth import UNKNOWN
from app.ledger import policy
from app.ledger.ledger import CALL_BOUNDS, LATENCY_BOUNDS
from app.ledger.redis import AsyncRedis as Redis
from app.ledger.redis import Redis as SyncRedis
from app.ledger.redis import is_other_schema
from app.settings import Company
from app.snapshot import Snapshot, SnapshotReader

if TYPE_CHECKING:
    from app.intake.spool import SpoolState

METRICS: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "events": ("ota_events", ("company", "outcome"), "Authenticated events by outcome."),
    "invalid": ("ota_items_invalid", ("reason",), "Items that were not recorded, by reason code."),
    "broken": ("ota_orders_broken", ("step",), "Due orders that were set aside since a key of theirs is broken."),
    "requests": ("ota_requests", ("status",), "POSTs to the webhook by HTTP status."),
    "spool": ("ota_spool_events", ("what",), "Events kept on the local disk during a Redis outage, and drained."),
    "rejected": ("ota_items_rejected", ("company",), "Items with a wrong clientState, by the company they name."),
    "reconciles": ("ota_reconciles", ("company", "outcome"), "Reconcile runs by outcome."),
    "discrepancies": ("ota_reconcile_discrepancies", ("company", "kind"), "Orders that reconciling found and queued."),
    "secrets": ("ota_events_by_secret", ("company", "secret"), "Events by the name of the secret that matched."),
    "throttled": ("ota_upstream_throttled", ("call",), "Answers 429 of the Channel Manager, by call."),
    "dead": ("ota_dead_letters", ("company", "reason"), "Orders that became dead letters, by reason code."),
    "deliveries_dead_lettered": ("ota_deliveries_dead_lettered", ("sink",), "Deliveries that became dead letters."),
}
"""Field prefix -> name, labels, meaning of every counter kept in Redis."""

GAUGES: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "ota_reconcile_last_success_timestamp_seconds": (("company",), "When the whole order list was read last."),
    "ota_reconcile_interval_seconds": (("company",), "RECONCILE_EVERY, for companies whose orders can be listed."),
    "ota_redis_up": ((), "1 if Redis answered this scrape; otherwise only this and the spool are shown."),
    "ota_other_schema": ((), "1 if Redis holds data of another version of this service."),
    "ota_spool_up": ((), "1 if the spool of this machine could take an event at this scrape."),
    "ota_spool_waiting_events": ((), "Events on this machine's disk that wait for Redis."),
    "ota_orders_due": ((), "Orders with a pending fetch."),
    "ota_orders_dead": ((), "Orders in dead letters."),
    "ota_deliveries_dead": ((), "Deliveries in dead letters."),
    "ota_queue_jobs": (("queue",), "Jobs that wait for a worker."),
    "ota_queue_oldest_seconds": (("queue",), "Age of the first job of the queue."),
    "ota_dispatcher_lag_seconds": ((), "How long the order that is due first has not been dispatched."),
    "ota_oldest_pending_fetch_seconds": (("company",), "Age of the event that has waited longest for its fetch."),
    "ota_orders_unsettled": (("company",), "Orders that the order list showed unsettled and that are watched."),
    "ota_sink_behind_orders": (("sink",), "Orders whose latest revision a sink has not received."),
    "ota_sink_failing_orders": (("sink",), "Those of them, of 400 at most, that the sink has refused at least once."),
    "ota_feed_unacknowledged_orders": (("consumer",), "Orders that a consumer of the feed has not acknowledged."),
    "ota_feed_oldest_unacknowledged_seconds": (("consumer",), "For how long the oldest of them has waited."),
    "ota_breaker_open": (("company",), "1 while calls for this company are paused."),
    "ota_last_event_timestamp_seconds": (("company", "secret"), "When the last event with this clientState arrived."),
    "ota_pools": ((), "Worker pools with a heartbeat in the last 15 s."),
    "ota_workers": (("queue",), "Worker processes of these pools."),
    "ota_pool_heartbeat_timestamp_seconds": ((), "The latest heartbeat of any pool."),
    "ota_alert": (("name", "company", "sink"), "1 while the alert is firing."),
}
"""Name -> labels, meaning of every gauge."""


class Histogram(NamedTuple):
    """A histogram kept in Redis: `bounds` are the upper bounds of its buckets, in units of 1/`per_second` seconds."""

    name: str
    labels: tuple[str, ...]
    meaning: str
    bounds: tuple[int, ...]
    per_second: int


HISTOGRAMS: Final = {
    "latency": Histogram(
        "ota_event_to_fetch_seconds",
        ("company",),
        "From an order's latest event to its stored content.",
        LATENCY_BOUNDS,
        1000,
    ),
    "get_order": Histogram("ota_get_order_seconds", ("company", "outcome"), "One call of getOrder.", CALL_BOUNDS, 1000),
    "webhook": Histogram(
        "ota_webhook_seconds",
        ("status",),
        "From the head of a request for the webhook to its answer.",
        (2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000),
        1_000_000,
    ),
}
"""Field prefix -> histogram; the name of a bucket (its bound, `inf`, or `sum`) stands at the end of a field."""

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

Samples = Mapping[tuple[str, ...], float]
"""A gauge and its label values in the order of GAUGES -> its current value."""

_LABELS: Final[dict[str, tuple[str, ...]]] = {
    **{prefix: labels for prefix, (_, labels, _) in METRICS.items()},
    **{prefix: (*one.labels, "bucket") for prefix, one in HISTOGRAMS.items()},
}
"""Field prefix -> what stands after it; a company's id comes first, if there is one."""

_log = log.get()


class CounterBuffer:
    """Counts of a web process, kept in memory and written by a task.

    Rejected items also trigger a reconcile here, so a flood of forged requests costs nothing per request.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._counts: Counter[tuple[str, str]] = Counter()
        self._bounds = HISTOGRAMS["webhook"].bounds
        # By status; in a list, since a tuple of texts for each request would cost 2 % of the time of a small one.
        self._requests: defaultdict[int, list[int]] = defaultdict(lambda: [0] * (len(self._bounds) + 2))

    def count(self, metric: str, label: str, times: int = 1) -> None:
        """Add to a counter of METRICS that has one label."""
        self._counts[metric, label] += times

    def count_request(self, status: int, seconds: float) -> None:
        """Count a request for the webhook that was answered with this status after so many seconds."""
        took = round(seconds * HISTOGRAMS["webhook"].per_second)
        counts = self._requests[status]
        counts[bisect_left(self._bounds, took)] += 1
        counts[-1] += took

    async def run(self) -> None:
        """Write the counts each second, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            await self.flush()

    async def flush(self) -> None:
        """Write the counts; while Redis is unavailable they are kept for the next time."""
        counts, self._counts = self._counts, Counter()
        for status, (*buckets, took) in self._requests.items():
            counts["requests", str(status)] += sum(buckets)
            for name, number in zip((*self._bounds, "inf", "sum"), (*buckets, took), strict=True):
                if number:
                    counts["webhook", f"{status}|{name}"] += number
        self._requests.clear()
        if not counts:
            return
        rejected = {label: items for (name, label), items in counts.items() if name == "rejected" and label != UNKNOWN}
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                # These come first, so that the answers begin with theirs.
                for company_id in rejected:
                    pipe.set(self._redis.names.alert(company_id), 1, nx=True, px=ALERT_EVERY)
                for company_id in rejected:
                    pipe.hincrby(self._redis.names.reconcile(company_id), "triggers", 1)
                for name, times in counts.items():
                    pipe.hincrby(self._redis.names.counters, "|".join(name), times)
                answers = await pipe.execute()
        except (RedisError, OSError):
            self._counts.update(counts)
            return
        for (company_id, items), is_first in zip(rejected.items(), answers, strict=False):
            if is_first:
                _log.error("auth.alert", company=company_id, items=items, advice=ADVICE)


@dataclass(frozen=True)
class Metrics:
    """The answer of one web process to /metrics.

    `spool` returns the state of the spool of its machine. `reconcile_every`: RECONCILE_EVERY.
    """

    redis: Redis
    reader: SnapshotReader
    companies: Sequence[Company]
    spool: Callable[[], Awaitable[SpoolState]] | None
    reconcile_every: int

    async def text(self) -> bytes:
        """Return the Prometheus text; during a Redis outage only what this process knows itself."""
        slugs = {one.np_company_id: one.slug for one in self.companies}
        listed = (one.slug for one in self.companies if one.np_partner_id is not None)
        samples: dict[tuple[str, ...], float] = {
            ("ota_reconcile_interval_seconds", slug): self.reconcile_every for slug in listed
        }
        if self.spool is not None:
            problem, waiting = await self.spool()
            samples["ota_spool_up",] = not problem
            if waiting is not None:
                samples["ota_spool_waiting_events",] = waiting
        try:
            snapshot = await self.reader.read_async(self.redis)
        except (RedisError, OSError):
            return render({}, {**samples, ("ota_redis_up",): 0}, slugs)
        slugs = {company_id: one.slug for company_id, one in snapshot.companies.items()}
        # Prometheus sees no increase in a counter that begins above 0, and the first 503 must page.
        counters = {"requests|503": "0", **snapshot.counters}
        return render(counters, {**samples, **_samples(snapshot)}, slugs)


def render(counters: Mapping[str, str], samples: Samples, slugs: Mapping[str, str]) -> bytes:
    """Return the Prometheus text of the counters and the gauges; `slugs`: company id -> slug."""
    saved: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for field, value in counters.items():
        prefix, *values = field.split("|")
        labels = _LABELS.get(prefix)
        if labels is None or len(values) != len(labels):
            continue
        if labels[0] == "company":
            values[0] = slugs.get(values[0], OTHER)
        saved[prefix][tuple(values)] += int(value)
    totals = {
        prefix: CounterMetricFamily(name, text, labels=labels) for prefix, (name, labels, text) in METRICS.items()
    }
    for prefix, family in totals.items():
        for key, total in sorted(saved[prefix].items()):
            family.add_metric(key, total)
    gauges = {name: GaugeMetricFamily(name, text, labels=labels) for name, (labels, text) in GAUGES.items()}
    for (name, *labelled), sample in samples.items():
        gauges[name].add_metric(labelled, sample)
    histograms = (_family(one, saved[prefix]) for prefix, one in HISTOGRAMS.items())
    return generate_latest(_Families([*totals.values(), *histograms, *gauges.values()]))


def add(redis: SyncRedis, counts: Mapping[tuple[str, ...], int]) -> None:
    """Add to counters of METRICS; a name is the field prefix and the label values."""
    with redis.pipeline(transaction=False) as pipe:
        for name, times in counts.items():
            pipe.hincrby(redis.names.counters, "|".join(name), times)
        pipe.execute()


def record_whole_list(redis: SyncRedis, company_id: str, now: int) -> None:
    """Record that the order list of a company was read to its end at `now` (ms)."""
    redis.hset(redis.names.counters, f"reconciled|{company_id}", str(now))


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _family(histogram: Histogram, saved: Counter[tuple[str, ...]]) -> Metric:
    name, labels, meaning, bounds, per_second = histogram
    family = HistogramMetricFamily(name, meaning, labels=labels)
    for key in sorted({key[:-1] for key in saved}):
        so_far, buckets = 0, []
        for bound in bounds:
            so_far += saved[*key, str(bound)]
            buckets.append((str(bound / per_second), float(so_far)))
        buckets.append(("+Inf", float(so_far + saved[*key, "inf"])))
        family.add_metric(key, buckets, saved[*key, "sum"] / per_second)
    return family


def _samples(snapshot: Snapshot) -> Samples:
    """Return every gauge but those of the process itself."""
    found: dict[tuple[str, ...], float] = {
        ("ota_redis_up",): 1,
        ("ota_other_schema",): is_other_schema(snapshot.schema.encode() or None),
        ("ota_orders_due",): snapshot.due,
        ("ota_orders_dead",): snapshot.dead,
        ("ota_deliveries_dead",): snapshot.dead_deliveries,
        ("ota_dispatcher_lag_seconds",): snapshot.dispatcher_lag_ms / 1000,
        ("ota_oldest_pending_fetch_seconds", OTHER): max(snapshot.elsewhere.values(), default=0) / 1000,
        ("ota_pools",): len(snapshot.running_pools()),
    }
    for queue, waiting in snapshot.queues.items():
        found["ota_queue_jobs", queue] = waiting.jobs
        found["ota_queue_oldest_seconds", queue] = snapshot.queue_age_ms(queue) / 1000
        found["ota_workers", queue] = snapshot.workers(queue)
    for company_id, of_company in snapshot.companies.items():
        slug = of_company.slug
        found["ota_oldest_pending_fetch_seconds", slug] = of_company.oldest_pending_ms / 1000
        found["ota_orders_unsettled", slug] = of_company.unsettled
        found["ota_breaker_open", slug] = snapshot.breaker_is_open(company_id)
        if read_at := snapshot.total("reconciled", company_id):
            found["ota_reconcile_last_success_timestamp_seconds", slug] = read_at / 1000
        for secret, at in (("current", of_company.current_secret_at), ("previous", of_company.previous_secret_at)):
            if at:
                found["ota_last_event_timestamp_seconds", slug, secret] = at / 1000
    for name, sink in snapshot.sinks.items():
        found["ota_sink_behind_orders", name] = sink.behind
        found["ota_sink_failing_orders", name] = sink.failing
    for name, consumer in snapshot.consumers.items():
        found["ota_feed_unacknowledged_orders", name] = consumer.behind
        found["ota_feed_oldest_unacknowledged_seconds", name] = consumer.waiting_s(snapshot.now)
    if pools := snapshot.heartbeats():
        found["ota_pool_heartbeat_timestamp_seconds",] = max(pool.at for pool in pools) / 1000
    for labels, state in snapshot.alert_states().items():
        found["ota_alert", *labels] = state.firing_at > 0
    return found
