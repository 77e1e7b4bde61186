"""The counters of Redis and the gauges become text that Prometheus reads."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.metrics import GAUGES, HISTOGRAMS, METRICS, Samples, render

MUSEUM = "22222222-2222-4222-8222-222222222222"
LARGE = 9007199254740991
SLUGS = {MUSEUM: "museum"}

Shown = tuple[str, frozenset[tuple[str, str]]]


def shown(saved: dict[str, str], gauges: Samples | None = None) -> dict[Shown, float]:
    text = render(saved, gauges or {}, SLUGS).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labels(**values: str) -> frozenset[tuple[str, str]]:
    return frozenset(values.items())


def test_a_field_is_shown_with_its_labels_and_the_slug_of_its_company() -> None:
    found = shown({f"events|{MUSEUM}|queued": "3", f"secrets|{MUSEUM}|previous": "2", "requests|200": str(LARGE)})

    assert found == {
        ("ota_events_total", labels(company="museum", outcome="queued")): 3,
        ("ota_events_by_secret_total", labels(company="museum", secret="previous")): 2,
        ("ota_requests_total", labels(status="200")): LARGE,
    }


def test_companies_that_the_settings_do_not_name_are_counted_together() -> None:
    """Otherwise invented companies would add any number of labels."""
    found = shown({"rejected|unknown": "3", 'rejected|a"b\\c\n': "1", f"rejected|{MUSEUM}": "2"})

    assert found == {
        ("ota_items_rejected_total", labels(company="other")): 4,
        ("ota_items_rejected_total", labels(company="museum")): 2,
    }


def test_gauges_are_shown_with_their_labels() -> None:
    found = shown({}, {("ota_orders_due",): 7, ("ota_queue_jobs", "live"): 2})

    assert found == {("ota_orders_due", labels()): 7, ("ota_queue_jobs", labels(queue="live")): 2}


def test_histograms_have_the_labels_and_the_unit_of_their_fields() -> None:
    saved = {"webhook|200|5000": "2", "webhook|200|sum": "7500", "webhook|401|inf": "1", "webhook|401|sum": "3000000"}
    calls = {f"get_order|{MUSEUM}|throttled|100": "1", f"get_order|{MUSEUM}|throttled|sum": "20"}
    found = shown(saved | calls)

    webhook = "ota_webhook_seconds"
    assert found[f"{webhook}_bucket", labels(status="200", le="0.0025")] == 0
    assert found[f"{webhook}_bucket", labels(status="200", le="0.005")] == 2
    assert found[f"{webhook}_sum", labels(status="200")] == 0.0075
    assert (found[f"{webhook}_count", labels(status="401")], found[f"{webhook}_sum", labels(status="401")]) == (1, 3)
    assert found["ota_get_order_seconds_count", labels(company="museum", outcome="throttled")] == 1


def test_the_buckets_of_the_histogram_are_cumulative() -> None:
    saved = {"500": "2", "2500": "1", "inf": "1", "sum": "100000123"}
    found = shown({f"latency|{MUSEUM}|{name}": value for name, value in saved.items()})

    buckets = [
        found["ota_event_to_fetch_seconds_bucket", labels(company="museum", le=bound)]
        for bound in ("0.25", "0.5", "2.5", "86400.0", "+Inf")
    ]
    assert buckets == [0, 2, 3, 3, 4]
    assert found["ota_event_to_fetch_seconds_count", labels(company="museum")] == 4
    assert found["ota_event_to_fetch_seconds_sum", labels(company="museum")] == 100000.123


def test_every_metric_has_its_help_text_before_the_first_event() -> None:
    text = render({}, {}, {}).decode()

    kinds = [
        *((f"{name}_total", "counter", meaning) for name, _, meaning in METRICS.values()),
        *((name, "gauge", meaning) for name, (_, meaning) in GAUGES.items()),
        *((one.name, "histogram", one.meaning) for one in HISTOGRAMS.values()),
    ]
    for name, kind, meaning in kinds:
        assert f"# HELP {name} {meaning}\n" in text
        assert f"# TYPE {name} {kind}\n" in text


@pytest.mark.parametrize(
    "field", ["later|x", "events|only-one-label", "events", "events|a|b|c", "latency|x", "\ufffd|x", "reconciled"]
)
def test_unknown_fields_are_left_out(field: str) -> None:
    """After a roll-back the hash may hold fields of a newer version."""
    assert shown({field: "1"}) == {}
