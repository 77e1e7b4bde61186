"""Counters that survive restarts and add up over processes: fields of one Redis hash, shown as Prometheus text.

A field is `metric|label value|label value`; the names of the labels are declared in METRICS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.asyncio import Redis

from app.store import keys
from app.store.outage import translated_errors

METRICS: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "events": ("ota_events", ("company", "outcome"), "Authenticated events by what became of them."),
    "aside": ("ota_items_aside", ("reason",), "Items that were not recorded, by reason code."),
    "requests": ("ota_requests", ("status",), "POSTs to the webhook by the status they were answered."),
    "secrets": (
        "ota_events_by_secret",
        ("company", "secret"),
        "Events by the name of the secret that matched.",
    ),
}
"""Field prefix -> name, labels, meaning of every counter kept in Redis."""

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST


def render(counters: Mapping[bytes, bytes], gauges: Mapping[str, tuple[str, float]]) -> bytes:
    """Return the Prometheus text of the counters and of `gauges` (name -> meaning, value)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(counters, gauges))
    return generate_latest(registry)


async def read(redis: Redis) -> bytes:
    """Return the Prometheus text of what Redis holds now.

    Raises StoreUnavailable.
    """
    with translated_errors(""):
        async with redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.COUNTERS)
            pipe.zcard(keys.DUE)
            pipe.zcard(keys.DEAD)
            found, due, dead = await pipe.execute()
    gauges = {
        "ota_orders_due": ("Orders that somebody must look at again.", float(due)),
        "ota_orders_dead": ("Orders that were given up.", float(dead)),
    }
    return render(found, gauges)


class _Snapshot(Collector):
    def __init__(self, counters: Mapping[bytes, bytes], gauges: Mapping[str, tuple[str, float]]) -> None:
        self._counters = counters
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        families = {
            prefix: CounterMetricFamily(name, meaning, labels=labels)
            for prefix, (name, labels, meaning) in METRICS.items()
        }
        for field, value in sorted(self._counters.items()):
            prefix, *labels = field.decode().split("|")
            if prefix in families and len(labels) == len(METRICS[prefix][1]):
                families[prefix].add_metric(labels, float(value))
        yield from families.values()
        for name, (meaning, gauge) in self._gauges.items():
            yield GaugeMetricFamily(name, meaning, value=gauge)
