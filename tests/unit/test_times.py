"""Times are taken as people type them, and never guessed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from app import times

AT = datetime(2026, 11, 27, 1, 30, tzinfo=UTC)
"""Half past two in Copenhagen."""


@pytest.fixture(autouse=True)
def copenhagen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Copenhagen")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("90min", timedelta(minutes=90)),
        (" 6H ", timedelta(hours=6)),
        ("2h30m", timedelta(hours=2, minutes=30)),
        ("1d 12h", timedelta(hours=36)),
        ("1 w", timedelta(weeks=1)),
    ],
)
def test_an_age_is_a_time_in_the_past(text: str, ago: timedelta) -> None:
    assert times.parse(text, AT) == AT - ago
    assert times.seconds(text) == ago.total_seconds()
    assert abs(times.now() - ago - times.parse(text)) < timedelta(seconds=5)


@pytest.mark.parametrize("text", ["2026-06-01T08:15:02Z", "2026-06-01T10:15:02+02:00", "20260601T081502Z"])
def test_a_time_with_a_zone_is_absolute(text: str) -> None:
    assert times.parse(text) == datetime(2026, 6, 1, 8, 15, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("2026-06-01 08:15", "2026-06-01T08:15+02:00"),
        ("2026-11-27", "2026-11-27T00:00+01:00"),
        ("yesterday", "2026-11-26T00:00+01:00"),
        ("Today", "2026-11-27T00:00+01:00"),
        ("02:10", "2026-11-27T02:10+01:00"),
        ("2:30", "2026-11-27T02:30+01:00"),
        ("02:50", "2026-11-26T02:50+01:00"),
        ("23:59:59", "2026-11-26T23:59:59+01:00"),
    ],
)
def test_a_time_without_a_zone_is_local_and_one_of_the_day_is_the_last_one(text: str, local: str) -> None:
    assert times.parse(text, AT) == datetime.fromisoformat(local)


@pytest.mark.parametrize(
    ("at", "text", "local"),
    [
        ("2026-10-25T12:00+01:00", "02:30", "2026-10-25T02:30+01:00"),
        ("2026-10-25T02:10+01:00", "02:30", "2026-10-25T02:30+02:00"),
        ("2026-10-25T02:20+02:00", "02:30", "2026-10-24T02:30+02:00"),
        ("2026-10-25T12:00+01:00", "25h", "2026-10-24T12:00+02:00"),
        ("2026-10-26T00:30+01:00", "yesterday", "2026-10-25T00:00+02:00"),
        ("2026-03-29T12:00+02:00", "02:30", "2026-03-28T02:30+01:00"),
        ("2026-03-30T02:00+02:00", "02:30", "2026-03-28T02:30+01:00"),
    ],
)
def test_a_time_of_the_day_is_the_last_one_also_when_the_clocks_are_set(at: str, text: str, local: str) -> None:
    assert times.parse(text, datetime.fromisoformat(at)) == datetime.fromisoformat(local)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2026-10-25 02:30", "twice.*2026-10-25T02:30:00\\+02:00 or 2026-10-25T02:30:00\\+01:00"),
        ("2026-03-29T02:30", "never was"),
    ],
)
def test_a_date_and_time_that_was_twice_or_never_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        times.parse(text)
    assert times.parse(f"{text}+02:00").tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    ["", "monday", "6", "h", "-6h", "6x", "2h30", "2026-13-01", "25:00", "2:3", "0001-01-01", "999999w", "9999999999d"],
)
def test_other_texts_are_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a time\. Use 90min or 2h30m \(ago\), 02:50"):
        times.parse(text)


def test_an_age_has_its_largest_unit() -> None:
    spans = [timedelta(seconds=8), timedelta(minutes=12, seconds=59), timedelta(hours=5), timedelta(days=3, hours=23)]

    assert [times.age(span) for span in spans] == ["8 s", "12 min", "5 h", "3 d"]
    assert times.age(timedelta(seconds=-3)) == "0 s"
