"""Times are taken as people type them, and never guessed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from app import times


def test_an_age_is_a_time_in_the_past() -> None:
    ages = {"90s": timedelta(seconds=90), "15m": timedelta(minutes=15), " 6H ": timedelta(hours=6)}
    for text, ago in (ages | {"2d": timedelta(days=2), "1 w": timedelta(weeks=1)}).items():
        assert abs(times.now() - ago - times.parse(text)) < timedelta(seconds=5)


@pytest.mark.parametrize("text", ["2026-06-01T08:15:02Z", "2026-06-01T10:15:02+02:00", "20260601T081502Z"])
def test_a_time_with_a_zone_is_absolute(text: str) -> None:
    assert times.parse(text) == datetime(2026, 6, 1, 8, 15, 2, tzinfo=UTC)


def test_a_time_without_a_zone_is_local() -> None:
    assert times.parse("2026-06-01 08:15") == datetime(2026, 6, 1, 8, 15).astimezone()


@pytest.mark.parametrize("text", ["", "yesterday", "6", "h", "-6h", "6x", "2026-13-01", "999999w", "9999999999d"])
def test_other_texts_are_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a time\. Use ISO 8601"):
        times.parse(text)


def test_an_age_has_its_largest_unit() -> None:
    spans = [timedelta(seconds=8), timedelta(minutes=12, seconds=59), timedelta(hours=5), timedelta(days=3, hours=23)]

    assert [times.age(span) for span in spans] == ["8 s", "12 min", "5 h", "3 d"]
    assert times.age(timedelta(seconds=-3)) == "0 s"
