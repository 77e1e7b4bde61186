"""Counters kept in Redis come out as text that Prometheus reads."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from app.store import counters

Sample = tuple[str, frozenset[tuple[str, str]]]


def samples(kept: dict[bytes, bytes], gauges: dict[str, tuple[str, float]] | None = None) -> dict[Sample, float]:
    text = counters.render(kept, gauges or {}).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_field_is_a_metric_with_its_labels() -> None:
    found = samples({b"events|museum|queued": b"3", b"events|zoo|duplicate": b"1", b"secrets|zoo|previous": b"2"})

    assert found == {
        ("ota_events_total", frozenset({("company", "museum"), ("outcome", "queued")})): 3,
        ("ota_events_total", frozenset({("company", "zoo"), ("outcome", "duplicate")})): 1,
        ("ota_events_by_secret_total", frozenset({("company", "zoo"), ("secret", "previous")})): 2,
    }


def test_gauges_stand_beside_them() -> None:
    assert samples({}, {"ota_orders_due": ("Orders due.", 7)}) == {("ota_orders_due", frozenset()): 7}


def test_every_metric_is_announced_with_its_meaning_before_the_first_event() -> None:
    text = counters.render({}, {}).decode()

    for name, _, meaning in counters.METRICS.values():
        assert f"# HELP {name}_total {meaning}\n" in text
        assert f"# TYPE {name}_total counter\n" in text


def test_fields_of_another_version_are_left_out() -> None:
    """After a roll-back the hash may hold what this version does not know."""
    assert samples({b"later|x": b"1", b"events|only-one-label": b"1", b"events": b"1", b"events|a|b|c": b"1"}) == {}


def test_label_values_are_escaped() -> None:
    found = samples({b'events|a"b\\c\n|queued': b"1"})

    assert [dict(labels)["company"] for _, labels in found] == ['a"b\\c\n']


def test_large_counts_keep_their_digits() -> None:
    assert list(samples({b"events|museum|queued": b"9007199254740991"}).values()) == [9007199254740991]
