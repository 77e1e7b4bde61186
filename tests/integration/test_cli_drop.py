"""`dead show` and `dead drop`: why it was given up, and giving it up for good."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis

from app import bootstrap
from app.ids import OrderKey
from app.ledger import keys
from app.ledger.ledger import Ledger
from app.ledger.orders import Archive, LocalCopies
from app.ledger.record import State
from app.times import from_ms
from tests.integration.desk import MUSEUM, SINK, WORKER, Desk, open_desk, order

DAY = 86_400_000


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    """Two dead orders of the venue, one of the museum, and one dead hand-on."""
    desk = open_desk(redis_client, redis_url, tmp_path)
    desk.hear(order(1), order(2), order(3, MUSEUM), order(4))
    desk.give_up(order(1), "order_missing", 404)
    desk.give_up(order(2), "bad_request", 400)
    desk.give_up(order(3, MUSEUM), "order_missing", 404)
    desk.bring_home(order(4))
    desk.give_up_sink(order(4), "KeyError")
    desk.forget_jobs()
    return desk


def state(desk: Desk, one: OrderKey) -> State:
    record = Archive(desk.redis).record(one)
    assert record is not None
    return record.state(from_ms(bootstrap.clock()))


def dead(desk: Desk) -> list[str]:
    return [letter["order_id"][-1] for letter in desk.run("dead", "list", "--json").objects]


def test_a_dead_letter_is_shown_with_its_tries_and_what_to_do(desk: Desk) -> None:
    page, line = desk.run("dead", "show", order(2).order_id), desk.run("dead", "show", order(2).order_id, "--json")

    assert (page.code, line.code) == (0, 0)
    assert "fetch 1 failed: bad_request (HTTP 400" in page.out
    assert f"dead requeue {order(2).order_id}" in page.out
    (told,) = line.objects
    assert (told["reason"], told["http"], told["steps"][-1]["what"]) == ("bad_request", 400, "failed")
    assert SINK in desk.run("dead", "show", order(4).order_id).out
    assert desk.run("dead", "show", order(9).order_id).code == 1


def test_a_dropped_order_is_owed_nothing_and_ends_with_its_days(desk: Desk) -> None:
    ended = desk.run("dead", "drop", order(1).order_id, "--yes", "--json")

    assert (ended.code, ended.objects) == (0, [{"discarded": 1, "not_dead": 0}])
    assert dead(desk) == ["2", "3", "4"]
    assert state(desk, order(1)) == "discarded"
    assert desk.redis.zscore(keys.DUE, order(1).member) is None
    assert 399 * DAY < int(str(desk.redis.pttl(keys.record(order(1))))) <= 400 * DAY
    assert desk.ledger().start_fetch(order(1), WORKER) == ("nothing", None)
    explained = desk.run("orders", "explain", order(1).order_id)
    assert (explained.code, "discarded by hand" in explained.out) == (1, True)
    assert [one["state"] for one in desk.run("orders", "list", "--state", "discarded", "--json").objects] == [
        "discarded"
    ]
    # The list of orders upstream does not bring it back either.
    (held,) = LocalCopies(desk.redis).read([order(1)])
    assert held is not None
    assert (held.pending, held.dead) == (False, "discarded")


def test_a_new_event_revives_what_was_dropped(desk: Desk) -> None:
    desk.run("dead", "drop", order(1).order_id, "--yes")

    desk.hear(order(1))

    assert state(desk, order(1)) == "pending"
    assert int(str(desk.redis.pttl(keys.record(order(1))))) == -1
    desk.bring_home(order(1))
    assert state(desk, order(1)) == "fetched"


def test_an_answer_that_comes_after_the_drop_is_stored_all_the_same(desk: Desk) -> None:
    """A worker that was taken for dead may still bring it home."""
    desk.hear(order(5))
    late = desk.begin(order(5))
    now = bootstrap.clock()
    ledger = Ledger(desk.redis, order_days=400, fetch_lease=60_000, sinks=(SINK,), clock=lambda: now)
    for _ in range(3):
        now += 70_000
        ledger.start_fetch(order(5), WORKER)
    assert state(desk, order(5)) == "dead"
    assert desk.run("dead", "drop", order(5).order_id, "--yes").code == 0

    desk.store(order(5), late)

    assert state(desk, order(5)) == "fetched"


def test_a_dropped_hand_on_is_not_tried_again_but_the_next_revision_is(desk: Desk) -> None:
    ended = desk.run("dead", "drop", order(4).order_id, "--yes")

    assert ended.code == 0
    assert dead(desk) == ["1", "2", "3"]
    assert desk.ledger().acquire_delivery(order(4), WORKER) is None
    assert int(str(desk.redis.pttl(keys.record(order(4))))) > 0
    page = desk.run("orders", "show", order(4).order_id).out
    assert "delivery of revision 1 was discarded by hand" in page

    desk.hear(order(4))
    desk.bring_home(order(4), statusMessage="changed")
    hand_on = desk.ledger().acquire_delivery(order(4), WORKER)
    assert hand_on is not None
    assert (hand_on.sink, hand_on.revision) == (SINK, 2)


def test_letters_are_dropped_by_reason_company_and_age(desk: Desk) -> None:
    desk.redis.zadd(keys.DEAD, {order(2).member: bootstrap.clock() - 31 * DAY})

    assert desk.run("dead", "drop", "--older-than", "30d", "--yes").code == 0
    assert dead(desk) == ["1", "3", "4"]
    assert desk.run("dead", "drop", "--reason", "order_missing", "--company", "museum", "--yes").code == 0
    assert dead(desk) == ["1", "4"]
    assert desk.run("dead", "drop", "--all", "--yes").code == 0
    assert dead(desk) == []
    assert desk.run("dead", "drop", "--all", "--yes").code == 1


def test_a_letter_whose_record_is_gone_leaves_the_list(desk: Desk) -> None:
    desk.redis.delete(keys.record(order(1)))

    assert desk.run("dead", "drop", "--reason", "record_gone", "--yes").code == 0
    assert dead(desk) == ["2", "3", "4"]
    assert desk.redis.exists(keys.record(order(1))) == 0


def test_a_question_without_answer_and_a_dry_run_drop_nothing(desk: Desk) -> None:
    asked, dry, unclear = (
        desk.run("dead", "drop", "--all"),
        desk.run("dead", "drop", "--all", "--dry-run", "--json"),
        desk.run("dead", "drop", "--yes"),
    )

    assert (asked.code, dry.code, unclear.code) == (2, 0, 2)
    assert dry.objects == [{"letters": 4, "not_dead": 0, "dry_run": True}]
    assert len(dead(desk)) == 4


def test_one_that_is_no_dead_letter_stops_nothing(desk: Desk) -> None:
    ended = desk.run("dead", "drop", order(9).order_id, order(1).order_id, "--yes", "--json")

    assert (ended.code, ended.objects) == (1, [{"discarded": 1, "not_dead": 1}])
    assert dead(desk) == ["2", "3", "4"]


def test_letters_that_all_died_in_one_millisecond_are_walked_once(desk: Desk) -> None:
    """After an outage thousands may share one: each page must cost the same, also while they are requeued."""
    many = {order(number).member: 1_780_000_000_000 for number in range(3_000)}
    desk.redis.delete(keys.DEAD)
    desk.redis.zadd(keys.DEAD, many)
    desk.redis.config_resetstat()

    ended = desk.run("dead", "drop", "--reason", "record_gone", "--yes", "--json")

    # Two of them have their record, and died of something else.
    assert ended.objects == [{"discarded": 2_998, "not_dead": 0}]
    read = desk.redis.info("commandstats")
    pages = read.get("cmdstat_zrangebyscore", {}).get("calls", 0) + read.get("cmdstat_zrange", {}).get("calls", 0)
    assert pages <= 50
