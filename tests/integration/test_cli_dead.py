"""`dead`: what was given up, why, since when, and giving it new tries."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis

from app.ledger.orders import Archive
from app.ledger.work import Dispatched
from tests.integration.desk import MUSEUM, SINK, WORKER, Desk, open_desk, order


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    return open_desk(redis_client, redis_url, tmp_path)


@pytest.fixture
def cemetery(desk: Desk) -> Desk:
    """Two dead orders of the venue, one of the museum, and one dead hand-on."""
    desk.hear(order(1), order(2), order(3, MUSEUM), order(4))
    desk.give_up(order(1), "order_missing", 404)
    desk.give_up(order(2), "bad_request", 400)
    desk.give_up(order(3, MUSEUM), "order_missing", 404)
    desk.bring_home(order(4))
    desk.give_up_sink(order(4), "KeyError")
    desk.forget_jobs()
    return desk


def test_dead_letters_are_listed_with_reason_and_age(cemetery: Desk) -> None:
    table, lines = cemetery.run("dead", "list"), cemetery.run("dead", "list", "--json")

    assert (table.code, lines.code) == (0, 0)
    told = [(one["company"], one["order_id"][-1], one["sink"], one["reason"], one["http"]) for one in lines.objects]
    assert told == [
        ("venue", "1", "", "order_missing", 404),
        ("venue", "2", "", "bad_request", 400),
        ("museum", "3", "", "order_missing", 404),
        ("venue", "4", SINK, "KeyError", None),
    ]
    assert all(0 <= one["age_s"] < 60 for one in lines.objects)
    assert table.out.count("order_missing") == 2


def test_no_dead_letters_is_good_news(desk: Desk) -> None:
    assert (desk.run("dead", "list").out, desk.run("dead", "list", "--json").out) == ("No dead letters.\n", "")


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        (("--reason", "order_missing"), "13"),
        (("--company", "venue"), "124"),
        (("--company", "venue", "--reason", "KeyError"), "4"),
        (("--limit", "1"), "1"),
        (("--until", "1h"), ""),
    ],
)
def test_dead_letters_are_filtered(cemetery: Desk, filters: tuple[str, ...], numbers: str) -> None:
    found = cemetery.run("dead", "list", "--json", *filters).objects

    assert "".join(one["order_id"][-1] for one in found) == numbers


def test_requeue_all_revives_orders_and_hand_ons(cemetery: Desk) -> None:
    ended = cemetery.run("dead", "requeue", "--all", "--yes", "--json")

    assert (ended.code, ended.objects) == (0, [{"queued": 3, "waiting": 0, "sinks": 1, "not_dead": 0}])
    assert cemetery.waiting("backfill") == [order(number).order_id for number in (1, 2, 3)]
    assert cemetery.run("dead", "list", "--json").out == ""
    hand_on = cemetery.ledger().acquire_delivery(order(4), WORKER)
    assert hand_on is not None
    assert (hand_on.sink, hand_on.revision, hand_on.attempts) == (SINK, 1, 1)


def test_a_revived_hand_on_is_due_now_so_the_ticker_finds_it(cemetery: Desk) -> None:
    cemetery.redis.delete("ota:due")

    assert cemetery.run("dead", "requeue", order(4).order_id, "--yes").code == 0

    assert cemetery.ledger().dispatch_due() == Dispatched(1, 1, 0)
    record = Archive(cemetery.redis).record(order(4))
    assert record is not None
    assert (record.dead_sinks, record.fetched_generation, record.generation) == ((), 1, 1)
    assert [entry.__class__.__name__ for entry in Archive(cemetery.redis).history(order(4))][-1] == "DeliveryRetried"


def test_one_that_is_gone_stops_nothing(cemetery: Desk) -> None:
    """An id that was never here, one that is home, and one that is dead: the dead one is requeued all the same."""
    cemetery.hear(order(5))
    cemetery.bring_home(order(5))
    ids = [order(number).order_id for number in (9, 5, 2)]

    ended = cemetery.run("dead", "requeue", *ids, "--yes", "--json")

    assert (ended.code, ended.objects) == (1, [{"queued": 1, "waiting": 0, "sinks": 0, "not_dead": 2}])
    assert (order(9).order_id in ended.err, order(5).order_id in ended.err) == (True, True)
    assert cemetery.waiting("backfill") == [order(2).order_id]


def test_a_letter_without_a_record_is_skipped_and_told(cemetery: Desk) -> None:
    cemetery.redis.delete(f"ota:order:{order(1).member}")

    listed = cemetery.run("dead", "list", "--json", "--limit", "1").objects
    ended = cemetery.run("dead", "requeue", "--all", "--yes", "--json")

    assert listed[0]["reason"] == "record_gone"
    assert (ended.code, ended.objects) == (1, [{"queued": 2, "waiting": 0, "sinks": 1, "not_dead": 1}])
    assert Archive(cemetery.redis).record(order(1)) is None


def test_requeue_by_reason_and_company_leaves_the_rest_dead(cemetery: Desk) -> None:
    ended = cemetery.run("dead", "requeue", "--reason", "order_missing", "--company", "museum", "--live", "--yes")

    assert ended.code == 0
    assert (cemetery.waiting("live"), cemetery.waiting("backfill")) == ([order(3).order_id], [])
    assert len(cemetery.run("dead", "list", "--json").objects) == 3


def test_more_than_a_page_is_requeued_whole(desk: Desk) -> None:
    orders = [order(number) for number in range(430)]
    desk.hear(*orders)
    for one in orders:
        desk.give_up(one)
    desk.forget_jobs()

    ended = desk.run("dead", "requeue", "--all", "--yes", "--json")

    assert ended.objects == [{"queued": 430, "waiting": 0, "sinks": 0, "not_dead": 0}]
    assert sorted(desk.waiting("backfill")) == [one.order_id for one in orders]


def test_a_dry_run_and_a_question_without_answer_revive_nothing(cemetery: Desk) -> None:
    planned = cemetery.run("dead", "requeue", "--all", "--dry-run", "--json")
    refused = cemetery.run("dead", "requeue", "--all")
    unclear = cemetery.run("dead", "requeue", "--yes")

    assert (planned.code, planned.objects) == (0, [{"letters": 4, "not_dead": 0, "dry_run": True}])
    assert (refused.code, unclear.code) == (2, 2)
    assert "--yes" in refused.err
    assert len(cemetery.run("dead", "list", "--json").objects) == 4


def test_reviving_a_sink_twice_does_nothing_the_second_time(cemetery: Desk) -> None:
    ledger = cemetery.ledger()

    assert [ledger.retry_delivery(order(4), SINK) for _ in range(2)] == [True, False]
