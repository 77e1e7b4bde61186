"""A trail becomes steps in time: repeats folded, every wait told, on 80 columns."""

from __future__ import annotations

import pytest

from app.cli.order_history import step_lines, steps
from app.times import span
from tests.unit.told import history

HOME = history(
    (0, "event 1780301702417-0 Issued queued current 4f2a"),
    (3, "started 1 1 pool-live-1"),
    (87, "stored 1 Issued 1 200 80"),
    (95, "delivery python:shop:take 1 succeeded - 7"),
)


def test_each_step_tells_how_long_after_the_one_before() -> None:
    assert [(step.what, step.since_ms) for step in steps(HOME)] == [
        ("event", None),
        ("started", 3),
        ("stored", 84),
        ("delivery", 8),
    ]


def test_neighbours_that_say_the_same_are_one_step() -> None:
    again = history(
        *((number, "duplicate Issued current 4f2b") for number in range(100)), (200, "duplicate Draft next 1")
    )

    found = steps(again)

    assert [(step.times, step.since_ms) for step in found] == [(100, None), (1, 101)]
    assert "100 times until" in " ".join(" ".join(step_lines(found)).split())


def test_two_events_are_never_one_step() -> None:
    events = history((0, "event 1-0 Error queued current 1"), (1, "event 2-0 Error queued current 2"))

    assert len(steps(events)) == 2


def test_a_fetch_that_failed_is_one_step_and_one_that_never_ended_is_told() -> None:
    tried = history((0, "started 1 1 w"), (5, "failed retry 1 http_503 503 5"), (9, "started 1 2 w"))

    assert [step.what for step in steps(tried)] == ["failed", "started"]


def test_waits_for_the_same_reason_are_one_step() -> None:
    waits = [(number, f"failed deferred {number} breaker_open 0 0") for number in range(1, 30)]
    begins = [(number, f"started 1 {number} w") for number in range(1, 30)]

    found = steps(history(*sorted(waits + begins)))

    assert [(step.what, step.times) for step in found] == [("failed", 29)]


def test_no_line_is_longer_than_80_columns_and_long_words_are_folded() -> None:
    long = history(
        (0, f"delivery python:{'very.' * 30}long:take 1 retry SomeErrorWithAName 7"), (90_000_000, "retried x")
    )

    shown = list(step_lines(steps(long)))

    assert max(map(len, shown)) <= 80
    assert "very.very" in "".join(shown)
    assert len([line for line in shown if line.startswith("2026-")]) == 2


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "0 ms"), (999, "999 ms"), (1200, "1.2 s"), (59_000, "59 s"), (90_000, "1.5 min"), (200_000_000, "2.3 d")],
)
def test_a_span_has_its_largest_unit(milliseconds: int, text: str) -> None:
    assert span(milliseconds) == text
