"""The history of an order becomes steps in time, and the durations of its fetch and delivery."""

from __future__ import annotations

import msgspec
import pytest

from app.cli.order_view import step_lines
from app.explain.order_history import Durations, Requested, durations, steps
from app.ledger.history import Entry, parse_entry
from app.times import span

START = 1780301702417
DAY = 86_400_000


def history(*entries: tuple[int, str]) -> tuple[Entry, ...]:
    """Return the entries of `(ms after START, "kind value value")`; `-` stands for an empty text."""

    def entry(at: int, kind: str, *values: str) -> Entry:
        texts = kind in {"event", "duplicate"}
        read = ["" if one == "-" else int(one) if one.isdecimal() and not texts else one for one in values]
        return parse_entry(msgspec.msgpack.encode([kind, at, *read]))

    return tuple(entry(START + after, *line.split(" ")) for after, line in entries)


def fetched(start: int, number: int, end: int, stored: str = "") -> tuple[Entry, ...]:
    """Return the entries of a fetch that was stored; `stored` is "status revision"."""
    ended = f"stored {number} {stored or f'Issued {number}'} 200 80"
    return history((start, f"started {number} {number} w"), (end, ended))


DELIVERED = history((23_008, "delivery python:shop:take 1 succeeded - 7"))
COMPLETE = history((0, "event 1780301702417-0 Issued queued current 4f2a")) + fetched(3, 1, 23_000) + DELIVERED


def test_each_step_has_the_time_since_the_step_before() -> None:
    found = [(step.what, step.since_ms) for step in steps(COMPLETE)]

    assert found == [("event", None), ("started", 3), ("stored", 22_997), ("delivery", 8)]


def test_equal_neighbours_are_one_step() -> None:
    duplicates = [(number, "duplicate Issued current 4f2b") for number in range(100)]

    found = steps(history(*duplicates, (200, "duplicate Draft next 1")))

    assert [(step.times, step.since_ms) for step in found] == [(100, None), (1, 101)]
    assert "100 times until" in " ".join(" ".join(step_lines(found)).split())


@pytest.mark.parametrize("place", [0, 1, 4])
def test_an_entry_without_a_time_stands_at_that_of_its_neighbours(place: int) -> None:
    unread = parse_entry(b"reject 1 unreadable_answer 200 2")

    found = steps((*COMPLETE[:place], unread, *COMPLETE[place:]))

    assert [step.at for step in found] == sorted(step.at for step in found)
    assert found[0].at == COMPLETE[0].at
    assert all("reject" not in line for line in step_lines(found))


def test_two_events_are_never_one_step() -> None:
    events = history((0, "event 1-0 Error queued current 1"), (1, "event 2-0 Error queued current 2"))

    assert len(steps(events)) == 2


def test_a_failed_fetch_is_one_step_and_the_start_of_an_unfinished_one_is_shown() -> None:
    tried = history((0, "started 1 1 w"), (5, "failed retry 1 http_503 503 5"), (9, "started 1 2 w"))

    assert [step.what for step in steps(tried)] == ["failed", "started"]


def test_deferrals_for_the_same_reason_are_one_step() -> None:
    deferrals = [(number, f"failed deferred {number} breaker_open 0 0") for number in range(1, 30)]
    starts = [(number, f"started 1 {number} w") for number in range(1, 30)]

    found = steps(history(*sorted(deferrals + starts)))

    assert [(step.what, step.times) for step in found] == [("failed", 29)]


def test_lines_have_at_most_80_columns_and_long_words_are_folded() -> None:
    long = (0, f"delivery python:{'very.' * 30}long:take 1 retry SomeErrorWithAName 7")

    shown = list(step_lines(steps(history(long, (90_000_000, "retried x")))))

    assert max(map(len, shown)) <= 80
    assert "very.very" in "".join(shown)
    assert len([line for line in shown if line.startswith("2026-")]) == 2


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "0 ms"), (999, "999 ms"), (1200, "1.2 s"), (59_000, "59 s"), (90_000, "1.5 min"), (200_000_000, "2.3 d")],
)
def test_a_duration_has_its_largest_unit(milliseconds: int, text: str) -> None:
    assert span(milliseconds) == text


def test_durations_run_from_the_event_to_the_fetch_and_to_the_last_delivery() -> None:
    later = history((23_400, "delivery python:till:take 1 succeeded - 7"))

    assert durations(COMPLETE) == Durations(23_000, 23_008)
    assert durations(COMPLETE + later) == Durations(23_000, 23_400)
    assert durations(COMPLETE[:2]) == durations(()) == Durations()


def test_the_latest_event_counts() -> None:
    event = history((DAY, "event 9-0 Issued queued current 2"))
    delivery = history((DAY + 500, "delivery python:shop:take 2 succeeded - 7"))

    assert durations(COMPLETE + event + fetched(DAY + 9, 2, DAY + 400) + delivery) == Durations(400, 500)


def test_a_replay_or_a_refetch_has_a_duration_of_its_own() -> None:
    replay = history((DAY, "requested replay:k7m2qx backfill")) + fetched(DAY + 2, 2, DAY + 13, "Issued 1")
    refetch = history((2 * DAY, "requested refetch live"))
    refetch += fetched(2 * DAY + 2, 3, 2 * DAY + 14, "Cancelled 2")
    refetch += history((2 * DAY + 20, "delivery python:shop:take 2 succeeded - 7"))

    assert durations(COMPLETE + replay) == Durations(23_000, 23_008, Requested("replay:k7m2qx", 13))
    assert durations(COMPLETE + replay + refetch) == Durations(23_000, 23_008, Requested("refetch", 14, 20))


def test_a_replay_to_sinks_does_not_change_the_duration_of_the_first_delivery() -> None:
    again = history(
        (DAY, "redelivered k7m2qx python:shop:take"), (DAY + 40, "delivery python:shop:take 1 succeeded - 7")
    )

    assert durations(COMPLETE + again) == Durations(23_000, 23_008, Requested("replay:k7m2qx", None, 40))


def test_a_requeued_fetch_counts_from_its_event() -> None:
    dead = history(
        (0, "event 1-0 Issued queued current 1"),
        (3, "started 1 1 w"),
        (9, "failed dead 1 order_missing 404 6"),
        (DAY, "requested requeue backfill"),
    )

    assert durations(dead + fetched(DAY + 2, 2, DAY + 10)) == Durations(DAY + 10, None, Requested("requeue", 10))


def test_an_event_during_a_fetch_counts_from_the_next_fetch() -> None:
    during = history(
        (0, "event 1-0 Error queued current 1"),
        (3, "started 1 1 w"),
        (50, "event 2-0 Issued queued current 2"),
        (100, "stored 1 Error 1 200 90"),
    )

    assert durations(during) == Durations(100)
    assert durations(during + fetched(5_000, 2, 5_050)) == Durations(5_000)


def test_rechecks_of_an_unsettled_order_count_from_its_event() -> None:
    unsettled = history((0, "event 1-0 Issued queued current 1")) + fetched(9, 1, 50, "Processing 1")

    assert durations(unsettled) == Durations(50)
    assert durations(unsettled + fetched(120_000, 2, 120_050)) == Durations(120_050)


@pytest.mark.parametrize("end", ["failed deleted_upstream 1 order_not_found 404 6", "discarded order_missing -"])
def test_an_event_after_a_deletion_or_a_discard_counts_alone(end: str) -> None:
    ended = history((0, "event 1-0 Draft queued current 1"), (3, "started 1 1 w"), (9, end))
    event = history((DAY, "event 2-0 Issued queued current 2"))

    assert durations(ended + event + fetched(DAY + 3, 2, DAY + 70)) == Durations(70)


def test_without_the_event_in_the_history_there_is_no_duration() -> None:
    assert durations(COMPLETE[1:]) == Durations()
    assert durations(COMPLETE[2:] + history((DAY, "requested refetch live"))) == Durations()
