"""How long an order took: its event counts, not the replay that came a day later."""

from __future__ import annotations

from app.cli.order_history import Durations, Requested, durations
from tests.unit.told import history

DAY = 86_400_000


HOME = history(
    (0, "event 1780301702417-0 Issued queued current 4f2a"),
    (3, "started 1 1 pool-live-1"),
    (23_000, "stored 1 Issued 1 200 80"),
    (23_008, "delivery python:shop:take 1 succeeded - 7"),
)


def test_it_is_from_the_event_to_its_content_and_to_the_last_sink() -> None:
    assert durations(HOME) == Durations(23_000, 23_008)
    assert durations(HOME + history((23_400, "delivery python:till:take 1 succeeded - 7"))) == Durations(23_000, 23_400)
    assert durations(HOME[:2]) == durations(()) == Durations()


def test_the_latest_event_counts() -> None:
    later = history(
        (DAY, "event 9-0 Issued queued current 2"),
        (DAY + 9, "started 2 2 w"),
        (DAY + 400, "stored 2 Issued 2 200 80"),
        (DAY + 500, "delivery python:shop:take 2 succeeded - 7"),
    )

    assert durations(HOME + later) == Durations(400, 500)


def test_a_replay_changes_nothing_of_it_and_has_a_time_of_its_own() -> None:
    replay = history(
        (DAY, "requested replay:k7m2qx backfill"), (DAY + 2, "started 2 2 w"), (DAY + 13, "stored 2 Issued 1 200 9")
    )
    changed = history(
        (2 * DAY, "requested refetch live"),
        (2 * DAY + 2, "started 3 3 w"),
        (2 * DAY + 14, "stored 3 Cancelled 2 200 9"),
        (2 * DAY + 20, "delivery python:shop:take 2 succeeded - 7"),
    )

    assert durations(HOME + replay) == Durations(23_000, 23_008, Requested("replay:k7m2qx", 13))
    assert durations(HOME + replay + changed) == Durations(23_000, 23_008, Requested("refetch", 14, 20))


def test_a_replay_to_the_sinks_does_not_make_the_first_hand_on_late() -> None:
    again = history(
        (DAY, "redelivered k7m2qx python:shop:take"), (DAY + 40, "delivery python:shop:take 1 succeeded - 7")
    )

    assert durations(HOME + again) == Durations(23_000, 23_008, Requested("replay:k7m2qx", None, 40))


def test_what_was_requeued_counts_from_its_event_all_the_same() -> None:
    requeued = history(
        (0, "event 1-0 Issued queued current 1"),
        (3, "started 1 1 w"),
        (9, "failed dead 1 order_missing 404 6"),
        (DAY, "requested requeue backfill"),
        (DAY + 2, "started 2 2 w"),
        (DAY + 10, "stored 2 Issued 1 200 5"),
    )

    assert durations(requeued) == Durations(DAY + 10, None, Requested("requeue", 10))


def test_an_event_that_comes_during_a_fetch_is_not_what_that_fetch_brought() -> None:
    during = history(
        (0, "event 1-0 Error queued current 1"),
        (3, "started 1 1 w"),
        (50, "event 2-0 Issued queued current 2"),
        (100, "stored 1 Error 1 200 90"),
    )
    then = history((5_000, "started 2 2 w"), (5_050, "stored 2 Issued 2 200 40"))

    assert durations(during) == Durations(100)
    assert durations(during + then) == Durations(5_000)


def test_looks_at_an_unsettled_order_count_from_its_event() -> None:
    unsettled = history(
        (0, "event 1-0 Issued queued current 1"), (9, "started 1 1 w"), (50, "stored 1 Processing 1 200 9")
    )
    settled = history((120_000, "started 1 2 w"), (120_050, "stored 2 Issued 2 200 9"))

    assert durations(unsettled) == Durations(50)
    assert durations(unsettled + settled) == Durations(120_050)


def test_what_was_dropped_or_deleted_upstream_is_not_counted_with_what_comes_later() -> None:
    for end in ("failed deleted_upstream 1 order_not_found 404 6", "discarded order_missing -"):
        ended = history((0, "event 1-0 Draft queued current 1"), (3, "started 1 1 w"), (9, end))
        anew = history(
            (DAY, "event 2-0 Issued queued current 2"),
            (DAY + 3, "started 2 2 w"),
            (DAY + 70, "stored 2 Issued 1 200 5"),
        )

        assert durations(ended + anew) == Durations(70)


def test_an_event_that_the_trail_has_lost_is_not_made_up() -> None:
    assert durations(HOME[1:]) == Durations()
    assert durations(HOME[2:] + history((DAY, "requested refetch live"))) == Durations()
