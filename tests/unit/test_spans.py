"""How long an order took: its event counts, not the replay that came a day later."""

from __future__ import annotations

from app.cli.order_view import Asked, Spans, spans
from app.ledger.history import Entry, parse_line

MS = 1780301702417
DAY = 86_400_000


def trail(*told: tuple[int, str]) -> tuple[Entry, ...]:
    return tuple(parse_line(f"{MS + after} {line}") for after, line in told)


HOME = trail(
    (0, "event 1780301702417-0 Issued queued current 4f2a"),
    (3, "begin 1 1 pool-live-1"),
    (23_000, "stored 1 Issued 1 200 80"),
    (23_008, "sink python:shop:take 1 done - 7"),
)


def test_it_is_from_the_event_to_its_content_and_to_the_last_sink() -> None:
    assert spans(HOME) == Spans(23_000, 23_008)
    assert spans(HOME + trail((23_400, "sink python:till:take 1 done - 7"))) == Spans(23_000, 23_400)
    assert spans(HOME[:2]) == spans(()) == Spans()


def test_the_latest_event_counts() -> None:
    later = trail(
        (DAY, "event 9-0 Issued queued current 2"),
        (DAY + 9, "begin 2 2 w"),
        (DAY + 400, "stored 2 Issued 2 200 80"),
        (DAY + 500, "sink python:shop:take 2 done - 7"),
    )

    assert spans(HOME + later) == Spans(400, 500)


def test_a_replay_changes_nothing_of_it_and_has_a_time_of_its_own() -> None:
    replay = trail(
        (DAY, "wanted replay:k7m2qx backfill"), (DAY + 2, "begin 2 2 w"), (DAY + 13, "stored 2 Issued 1 200 9")
    )
    changed = trail(
        (2 * DAY, "wanted refetch live"),
        (2 * DAY + 2, "begin 3 3 w"),
        (2 * DAY + 14, "stored 3 Cancelled 2 200 9"),
        (2 * DAY + 20, "sink python:shop:take 2 done - 7"),
    )

    assert spans(HOME + replay) == Spans(23_000, 23_008, Asked("replay:k7m2qx", 13))
    assert spans(HOME + replay + changed) == Spans(23_000, 23_008, Asked("refetch", 14, 20))


def test_a_replay_to_the_sinks_does_not_make_the_first_hand_on_late() -> None:
    again = trail((DAY, "rehand k7m2qx python:shop:take"), (DAY + 40, "sink python:shop:take 1 done - 7"))

    assert spans(HOME + again) == Spans(23_000, 23_008, Asked("replay:k7m2qx", None, 40))


def test_what_was_requeued_counts_from_its_event_all_the_same() -> None:
    requeued = trail(
        (0, "event 1-0 Issued queued current 1"),
        (3, "begin 1 1 w"),
        (9, "dead 1 order_missing 404 6"),
        (DAY, "wanted requeue backfill"),
        (DAY + 2, "begin 2 2 w"),
        (DAY + 10, "stored 2 Issued 1 200 5"),
    )

    assert spans(requeued) == Spans(DAY + 10, None, Asked("requeue", 10))


def test_an_event_that_comes_during_a_fetch_is_not_what_that_fetch_brought() -> None:
    during = trail(
        (0, "event 1-0 Error queued current 1"),
        (3, "begin 1 1 w"),
        (50, "event 2-0 Issued queued current 2"),
        (100, "stored 1 Error 1 200 90"),
    )
    then = trail((5_000, "begin 2 2 w"), (5_050, "stored 2 Issued 2 200 40"))

    assert spans(during) == Spans(100)
    assert spans(during + then) == Spans(5_000)


def test_looks_at_an_unsettled_order_count_from_its_event() -> None:
    unsettled = trail((0, "event 1-0 Issued queued current 1"), (9, "begin 1 1 w"), (50, "stored 1 Processing 1 200 9"))
    settled = trail((120_000, "begin 1 2 w"), (120_050, "stored 2 Issued 2 200 9"))

    assert spans(unsettled) == Spans(50)
    assert spans(unsettled + settled) == Spans(120_050)


def test_what_was_dropped_or_deleted_upstream_is_not_counted_with_what_comes_later() -> None:
    for end in ("gone 1 order_not_found 404 6", "dropped order_missing"):
        ended = trail((0, "event 1-0 Draft queued current 1"), (3, "begin 1 1 w"), (9, end))
        anew = trail(
            (DAY, "event 2-0 Issued queued current 2"), (DAY + 3, "begin 2 2 w"), (DAY + 70, "stored 2 Issued 1 200 5")
        )

        assert spans(ended + anew) == Spans(70)


def test_an_event_that_the_trail_has_lost_is_not_made_up() -> None:
    assert spans(HOME[1:]) == Spans()
    assert spans(HOME[2:] + trail((DAY, "wanted refetch live"))) == Spans()
