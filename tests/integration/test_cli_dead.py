"""`dead`: dead letters are listed, explained, requeued and discarded."""

from __future__ import annotations

import pytest

from app.ids import OrderKey
from app.ledger import keys
from app.ledger.ledger import Ledger
from app.ledger.orders import Archive
from app.ledger.record import State
from app.ledger.work import Dispatched
from app.times import from_ms
from tests.clock import now_ms
from tests.integration.desk import MUSEUM, SINK, WORKER, Desk, order

DAY = 86_400_000
COMMANDS = ("requeue", "drop")


@pytest.fixture
def letters(desk: Desk) -> Desk:
    """Two dead orders of the venue, one of the museum, and one dead delivery."""
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
    return record.state(from_ms(now_ms()))


def dead(desk: Desk) -> str:
    return "".join(letter["order_id"][-1] for letter in desk.run("dead", "list", "--json").objects)


def test_dead_letters_are_listed_with_reason_and_age(letters: Desk) -> None:
    table, lines = letters.run("dead", "list"), letters.run("dead", "list", "--json")

    assert (table.code, lines.code) == (0, 0)
    assert [
        (one["company"], one["order_id"][-1], one["sink"], one["reason"], one["http"]) for one in lines.objects
    ] == [
        ("venue", "1", "", "order_missing", 404),
        ("venue", "2", "", "bad_request", 400),
        ("museum", "3", "", "order_missing", 404),
        ("venue", "4", SINK, "KeyError", None),
    ]
    assert all(0 <= one["age_s"] < 60 for one in lines.objects)
    assert table.out.count("order_missing") == 2


def test_an_empty_list_is_no_error(desk: Desk) -> None:
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
def test_the_list_is_filtered(letters: Desk, filters: tuple[str, ...], numbers: str) -> None:
    found = letters.run("dead", "list", "--json", *filters).objects

    assert "".join(one["order_id"][-1] for one in found) == numbers


def test_show_prints_the_attempts_and_what_to_do(letters: Desk) -> None:
    name = order(2).order_id
    page, line = letters.run("dead", "show", name), letters.run("dead", "show", name, "--json")

    assert (page.code, line.code) == (0, 0)
    assert "fetch 1 failed: bad_request (HTTP 400" in page.out
    assert f"dead requeue {name}" in page.out
    (found,) = line.objects
    assert (found["reason"], found["http"], found["steps"][-1]["what"]) == ("bad_request", 400, "failed")
    assert SINK in letters.run("dead", "show", order(4).order_id).out
    assert letters.run("dead", "show", order(9).order_id).code == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_and_an_unanswered_question_change_nothing(letters: Desk, command: str) -> None:
    planned = letters.run("dead", command, "--all", "--dry-run", "--json")
    refused, unclear = letters.run("dead", command, "--all"), letters.run("dead", command, "--yes")

    assert (planned.code, planned.objects) == (0, [{"letters": 4, "not_dead": 0, "dry_run": True}])
    assert (refused.code, "--yes" in refused.err, unclear.code) == (2, True, 2)
    assert dead(letters) == "1234"


@pytest.mark.parametrize("command", COMMANDS)
def test_named_orders_without_a_dead_letter_stop_nothing(letters: Desk, command: str) -> None:
    """Order 9 is unknown and order 5 is fetched; order 2 is dead."""
    letters.hear(order(5))
    letters.bring_home(order(5))
    ids = [order(number).order_id for number in (9, 5, 2)]

    ended = letters.run("dead", command, *ids, "--yes", "--json")

    counts = {"queued": 1, "waiting": 0, "sinks": 0} if command == "requeue" else {"discarded": 1}
    assert (ended.code, ended.objects) == (1, [counts | {"not_dead": 2}])
    assert (order(9).order_id in ended.err, order(5).order_id in ended.err) == (True, True)
    assert dead(letters) == "134"


def test_requeue_all_fetches_orders_and_repeats_deliveries(letters: Desk) -> None:
    ended = letters.run("dead", "requeue", "--all", "--yes", "--json")

    assert (ended.code, ended.objects) == (0, [{"queued": 3, "waiting": 0, "sinks": 1, "not_dead": 0}])
    assert letters.waiting("backfill") == [order(number).order_id for number in (1, 2, 3)]
    assert dead(letters) == ""
    delivery = letters.ledger().acquire_delivery(order(4), WORKER)
    assert delivery is not None
    assert (delivery.sink, delivery.revision, delivery.attempts) == (SINK, 1, 1)
    assert not letters.ledger().retry_delivery(order(4), SINK)


def test_a_requeued_delivery_is_due_now(letters: Desk) -> None:
    letters.redis.delete("ota:due")

    assert letters.run("dead", "requeue", order(4).order_id, "--yes").code == 0

    assert letters.ledger().dispatch_due() == Dispatched(1, 1, 0)
    record = Archive(letters.redis).record(order(4))
    assert record is not None
    assert (record.dead_sinks, record.fetched_generation, record.generation) == ((), 1, 1)
    assert type(Archive(letters.redis).history(order(4))[-1]).__name__ == "DeliveryRetried"


def test_requeue_by_reason_and_company_leaves_the_rest_dead(letters: Desk) -> None:
    ended = letters.run("dead", "requeue", "--reason", "order_missing", "--company", "museum", "--live", "--yes")

    assert ended.code == 0
    assert (letters.waiting("live"), letters.waiting("backfill")) == ([order(3).order_id], [])
    assert dead(letters) == "124"


def test_more_than_one_chunk_is_requeued(desk: Desk) -> None:
    orders = [order(number) for number in range(430)]
    desk.hear(*orders)
    for one in orders:
        desk.give_up(one)
    desk.forget_jobs()

    ended = desk.run("dead", "requeue", "--all", "--yes", "--json")

    assert ended.objects == [{"queued": 430, "waiting": 0, "sinks": 0, "not_dead": 0}]
    assert sorted(desk.waiting("backfill")) == [one.order_id for one in orders]


def test_a_dead_letter_without_a_record_is_not_requeued_and_leaves_the_list_by_drop(letters: Desk) -> None:
    letters.redis.delete(keys.record(order(1)))

    listed = letters.run("dead", "list", "--json", "--limit", "1").objects
    requeued = letters.run("dead", "requeue", "--all", "--yes", "--json")

    assert listed[0]["reason"] == "record_gone"
    assert (requeued.code, requeued.objects) == (1, [{"queued": 2, "waiting": 0, "sinks": 1, "not_dead": 1}])
    assert letters.run("dead", "drop", "--reason", "record_gone", "--yes").code == 0
    assert dead(letters) == ""
    assert letters.redis.exists(keys.record(order(1))) == 0


def test_a_discarded_order_is_not_pending_and_expires(letters: Desk) -> None:
    ended = letters.run("dead", "drop", order(1).order_id, "--yes", "--json")

    assert (ended.code, ended.objects) == (0, [{"discarded": 1, "not_dead": 0}])
    assert (dead(letters), state(letters, order(1))) == ("234", "discarded")
    assert letters.redis.zscore(keys.DUE, order(1).member) is None
    assert 399 * DAY < int(str(letters.redis.pttl(keys.record(order(1))))) <= 400 * DAY
    assert letters.ledger().start_fetch(order(1), WORKER) == ("nothing", None)
    explained = letters.run("orders", "explain", order(1).order_id)
    assert (explained.code, "discarded by hand" in explained.out) == (1, True)
    assert len(letters.run("orders", "list", "--state", "discarded", "--json").objects) == 1
    # reconcile does not fetch it either.
    (held,) = Archive(letters.redis).copies([order(1)])
    assert held is not None
    assert (held.pending, held.dead) == (False, "discarded")


def test_a_new_event_fetches_a_discarded_order(letters: Desk) -> None:
    letters.run("dead", "drop", order(1).order_id, "--yes")

    letters.hear(order(1))

    assert state(letters, order(1)) == "pending"
    assert int(str(letters.redis.pttl(keys.record(order(1))))) == -1
    letters.bring_home(order(1))
    assert state(letters, order(1)) == "fetched"


def test_a_late_answer_of_a_discarded_order_is_stored(letters: Desk) -> None:
    """The worker was taken for dead, and still stores its answer."""
    letters.hear(order(5))
    late = letters.begin(order(5))
    now = now_ms()
    ledger = Ledger(letters.redis, order_days=400, fetch_lease=60_000, sinks=(SINK,), clock=lambda: now)
    for _ in range(3):
        now += 70_000
        ledger.start_fetch(order(5), WORKER)
    assert state(letters, order(5)) == "dead"
    assert letters.run("dead", "drop", order(5).order_id, "--yes").code == 0

    letters.store(order(5), late)

    assert state(letters, order(5)) == "fetched"


def test_a_discarded_delivery_is_not_repeated_but_the_next_revision_is_delivered(letters: Desk) -> None:
    assert letters.run("dead", "drop", order(4).order_id, "--yes").code == 0

    assert dead(letters) == "123"
    assert letters.ledger().acquire_delivery(order(4), WORKER) is None
    assert int(str(letters.redis.pttl(keys.record(order(4))))) > 0
    assert "delivery of revision 1 was discarded by hand" in letters.run("orders", "show", order(4).order_id).out
    letters.hear(order(4))
    letters.bring_home(order(4), statusMessage="changed")
    delivery = letters.ledger().acquire_delivery(order(4), WORKER)
    assert delivery is not None
    assert (delivery.sink, delivery.revision) == (SINK, 2)


def test_dead_letters_are_discarded_by_reason_company_and_age(letters: Desk) -> None:
    letters.redis.zadd(keys.DEAD, {order(2).member: now_ms() - 31 * DAY})

    for selection, left in (
        (("--older-than", "30d"), "134"),
        (("--reason", "order_missing", "--company", "museum"), "14"),
        (("--all",), ""),
    ):
        assert letters.run("dead", "drop", *selection, "--yes").code == 0
        assert dead(letters) == left
    assert letters.run("dead", "drop", "--all", "--yes").code == 1


def test_dead_letters_of_one_millisecond_are_read_once(desk: Desk) -> None:
    """After an outage thousands may share one: each page must cost the same, also while they are discarded."""
    desk.redis.zadd(keys.DEAD, {order(number).member: 1_780_000_000_000 for number in range(3_000)})
    desk.redis.config_resetstat()

    ended = desk.run("dead", "drop", "--reason", "record_gone", "--yes", "--json")

    assert ended.objects == [{"discarded": 3_000, "not_dead": 0}]
    read = desk.redis.info("commandstats")
    pages = read.get("cmdstat_zrangebyscore", {}).get("calls", 0) + read.get("cmdstat_zrange", {}).get("calls", 0)
    assert pages <= 50
