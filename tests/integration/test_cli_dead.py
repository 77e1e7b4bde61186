"""`dead`: dead letters are listed, explained, requeued and discarded."""

from __future__ import annotations

import pytest

from app.ids import OrderKey
from app.ledger import policy
from app.ledger.dead_letters import DeadLetters, DeadQuery
from app.ledger.orders import Archive
from app.ledger.record import State
from app.ledger.work import DeliveryOutcome, Dispatched
from app.times import from_ms
from tests.lab import KEYS, MUSEUM, SINK, Lab, order

COMMANDS = ("requeue", "drop")


@pytest.fixture
def letters(lab: Lab) -> Lab:
    """Two dead orders of the venue, one of the museum, and one dead delivery."""
    lab.accept(order(1), order(2), order(3, MUSEUM), order(4))
    lab.dead_letter(order(1), "order_missing", 404)
    lab.dead_letter(order(2), "bad_request", 400)
    lab.dead_letter(order(3, MUSEUM), "order_missing", 404)
    lab.fetch_and_store(order(4))
    lab.dead_letter_delivery(order(4), "KeyError")
    lab.clear_queues()
    return lab


def state(lab: Lab, one: OrderKey) -> State:
    record = lab.archive.record(one)
    assert record is not None
    return record.state(from_ms(lab.now))


def dead(lab: Lab) -> str:
    return "".join(letter["order_id"][-1] for letter in lab.run_command("dead", "list", "--json").objects)


def test_dead_letters_are_listed_with_reason_and_age(letters: Lab) -> None:
    table, lines = letters.run_command("dead", "list"), letters.run_command("dead", "list", "--json")

    assert (table.code, lines.code) == (0, 0)
    assert [
        (one["company"], one["order_id"][-1], one["sink"], one["reason"], one["http_status"]) for one in lines.objects
    ] == [
        ("venue", "1", "", "order_missing", 404),
        ("venue", "2", "", "bad_request", 400),
        ("museum", "3", "", "order_missing", 404),
        ("venue", "4", SINK, "KeyError", None),
    ]
    assert all(0 <= one["age_s"] < 60 for one in lines.objects)
    assert table.out.count("order_missing") == 2


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        (("--reason", "order_missing"), "13"),
        (("--company", "venue"), "124"),
        (("--company", "venue", "--reason", "KeyError"), "4"),
        (("--limit", "1"), "1"),
        (("--until", "1h"), ""),
        (("--sink", SINK), "4"),
        (("--sink", SINK, "--reason", "order_missing"), ""),
    ],
)
def test_the_list_is_filtered(letters: Lab, filters: tuple[str, ...], numbers: str) -> None:
    found = letters.run_command("dead", "list", "--json", *filters).objects

    assert "".join(one["order_id"][-1] for one in found) == numbers


def test_dead_letters_are_counted_by_sink_and_reason(letters: Lab) -> None:
    """What a sink writes behind `rejected:` makes no kind of its own; the record of order 1 is lost."""
    for number in (5, 6):
        letters.accept_and_fetch(order(number))
        letters.deliver("rejected", order(number), reason=f"rejected: order {number}")
    letters.redis.delete(KEYS.record(order(1)))

    found = DeadLetters(letters.redis)
    counts = [("", "bad_request", 1), ("", "order_missing", 2), (SINK, "KeyError", 1), (SINK, "rejected", 2)]

    assert [(one.sink, one.reason, one.count) for one in found.counts()] == counts
    for sink, reason, count in counts:
        query = DeadQuery(sink=sink, reason=reason, until=from_ms(letters.now))
        assert (len([*found.oldest_first(query)]), len(found.page(query).rows)) == (count, count)
    (one,) = found.page(DeadQuery(reason="rejected: order 6", until=from_ms(letters.now))).rows
    assert one.order_id == order(6).order_id
    letters.run_command("dead", "drop", "--all", "--yes")
    assert found.counts() == []


def test_those_of_one_reason_are_read_without_a_look_at_the_others(letters: Lab) -> None:
    others = [order(number) for number in range(100, 500)]
    letters.accept(*others)
    for one in others:
        letters.dead_letter(one, "unsettled")
    letters.redis.config_resetstat()

    assert len(letters.run_command("dead", "list", "--reason", "order_missing", "--json").objects) == 2
    assert letters.redis.info("commandstats")["cmdstat_hgetall"]["calls"] < 50


def test_show_prints_the_attempts_and_what_to_do(letters: Lab) -> None:
    name = order(2).order_id
    page, line = letters.run_command("dead", "show", name), letters.run_command("dead", "show", name, "--json")

    assert (page.code, line.code) == (0, 0)
    assert "fetch 1 failed: bad_request (HTTP 400" in page.out
    assert f"dead requeue {name}" in page.out
    (found,) = line.objects
    assert (found["reason"], found["http_status"], found["steps"][-1]["what"]) == ("bad_request", 400, "failed")
    assert SINK in letters.run_command("dead", "show", order(4).order_id).out
    assert letters.run_command("dead", "show", order(9).order_id).code == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_and_an_unanswered_question_change_nothing(letters: Lab, command: str) -> None:
    planned = letters.run_command("dead", command, "--all", "--dry-run", "--json")
    refused, unclear = letters.run_command("dead", command, "--all"), letters.run_command("dead", command, "--yes")

    assert (planned.code, planned.objects) == (0, [{"letters": 4, "not_dead": 0, "dry_run": True}])
    assert (refused.code, "--yes" in refused.err, unclear.code) == (2, True, 2)
    assert dead(letters) == "1234"


def test_requeue_all_fetches_orders_and_repeats_deliveries(letters: Lab) -> None:
    """More orders than one script call takes."""
    more = [order(number) for number in range(100, 530)]
    letters.accept(*more)
    for one in more:
        letters.dead_letter(one)
    letters.clear_queues()

    ended = letters.run_command("dead", "requeue", "--all", "--yes", "--json")

    assert (ended.code, ended.objects) == (0, [{"queued": 433, "waiting": 0, "deliveries": 1, "not_dead": 0}])
    assert sorted(letters.queued("backfill")) == sorted(one.order_id for one in (order(1), order(2), order(3), *more))
    assert dead(letters) == ""
    delivery = letters.start_delivery(order(4))
    assert (delivery.sink, delivery.revision, delivery.attempts) == (SINK, 1, 1)
    assert not letters.ledger.retry_delivery(order(4), SINK)


def test_a_requeued_delivery_is_due_now(letters: Lab) -> None:
    letters.redis.delete(KEYS.due)

    assert letters.run_command("dead", "requeue", order(4).order_id, "--yes").code == 0

    assert letters.ledger.dispatch_due() == Dispatched(1, 1, 0)
    assert (letters.field("fetched_generation", order(4)), letters.field("generation", order(4))) == ("1", "1")
    assert type(letters.history(order(4))[-1]).__name__ == "DeliveryRetried"


def test_a_rejected_delivery_is_shown_with_its_reason_and_can_be_requeued(letters: Lab) -> None:
    letters.accept_and_fetch(order(5))
    letters.deliver("rejected", order(5), reason="rejected: no such product", failure="no such product")

    page = " ".join(letters.run_command("dead", "show", order(5).order_id).out.split())
    listed = letters.run_command("dead", "list", "--reason", "rejected: no such product", "--json").objects
    explained = " ".join(letters.run_command("orders", "explain", order(5).order_id).out.split())

    assert [(one["order_id"], one["sink"], one["reason"]) for one in listed] == [
        (order(5).order_id, SINK, "rejected: no such product")
    ]
    assert f"delivery to {SINK} failed for good" in page
    assert "rejected: no such product" in page
    assert f"{SINK}: delivery of revision 1 is a dead letter: rejected: no such product" in explained
    assert f"revision 1 rejected by {SINK}, now a dead letter: no such product" in explained
    assert f"Fix the reason, in the order or in the sink {SINK} (rejected: no such product). Then: " in explained
    ended = letters.run_command("dead", "requeue", order(5).order_id, "--yes", "--json")
    assert ended.objects[0]["deliveries"] == 1
    assert letters.start_delivery(order(5)).attempts == 1


@pytest.mark.parametrize(("outcome", "attempts"), [("retry", "1"), ("postponed", "0")])
@pytest.mark.parametrize(
    "selection", [("--sink", SINK), (order(5).order_id, order(4).order_id)], ids=["sink", "orders"]
)
def test_failed_deliveries_that_wait_are_tried_at_once_when_the_sink_is_mended(
    letters: Lab, selection: tuple[str, ...], outcome: DeliveryOutcome, attempts: str
) -> None:
    """Of a sink or of named orders; not those of another selection, nor those that never failed."""
    for number in (5, 6):
        letters.accept_and_fetch(order(number))
    letters.deliver(outcome, order(5), reason="ValueError", failure="ValueError at shop.py:7", wait=7200)

    assert letters.run_command("dead", "requeue", "--all", "--dry-run", "--json").objects[0]["letters"] == 4
    planned = letters.run_command("dead", "requeue", *selection, "--dry-run", "--json")
    none = letters.run_command("dead", "requeue", *selection, "--reason", "KeyErro", "--yes")
    assert (planned.objects[0]["letters"], none.code) == (2, 1)
    assert letters.field(f"{SINK}:attempts", order(5)) == attempts

    ended = letters.run_command("dead", "requeue", *selection, "--yes", "--json")

    assert (ended.code, ended.objects) == (0, [{"queued": 0, "waiting": 0, "deliveries": 2, "not_dead": 0}])
    assert (letters.delivery_in(order(5)) or 0) <= 0
    assert [letters.start_delivery(order(number)).attempts for number in (4, 5)] == [1, 1]
    assert dead(letters) == "123"
    (entry, *_) = letters.run_command("audit", "--json").objects
    assert (entry["what"], entry["orders"]) == ("requeue", 2)


def test_dead_letters_of_another_sink_are_not_selected(letters: Lab) -> None:
    unknown = letters.run_command("dead", "requeue", "--sink", "python:operator:eq", "--yes")
    assert (unknown.code, f"There are: {SINK}." in unknown.err) == (1, True)
    assert letters.run_command("dead", "list", "--sink", SINK, "--json").objects[0]["sink"] == SINK
    assert letters.run_command("dead", "drop", "--sink", SINK, "--yes", "--json").objects[0]["discarded"] == 1
    assert dead(letters) == "123"


@pytest.mark.parametrize(
    ("command", "selection", "left"),
    [
        ("requeue", ("--reason", "order_missing", "--company", "museum"), "124"),
        ("drop", ("--reason", "order_missing", "--company", "museum"), "124"),
        ("drop", ("--older-than", "30d"), "134"),
        ("drop", ("--all",), ""),
    ],
)
def test_letters_not_selected_stay_dead(letters: Lab, command: str, selection: tuple[str, ...], left: str) -> None:
    letters.redis.zadd(KEYS.dead, {order(2).member: letters.now - 31 * policy.DAY})

    assert letters.run_command("dead", command, *selection, "--yes").code == 0

    assert sorted(dead(letters)) == sorted(left)
    assert letters.queued("backfill") == ([order(3).order_id] if command == "requeue" else [])
    assert letters.run_command("dead", command, *selection, "--yes").code == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_named_orders_without_a_dead_letter_stop_nothing(letters: Lab, command: str) -> None:
    """Order 9 is unknown and order 5 is fetched; order 2 is dead."""
    letters.accept_and_fetch(order(5))
    letters.clear_queues()
    ids = [order(number).order_id for number in (9, 5, 2)]
    live = ("--live",) if command == "requeue" else ()

    ended = letters.run_command("dead", command, *ids, *live, "--yes", "--json")

    counts = {"queued": 1, "waiting": 0, "deliveries": 0} if command == "requeue" else {"discarded": 1}
    assert (ended.code, ended.objects) == (1, [counts | {"not_dead": 2}])
    assert (order(9).order_id in ended.err, order(5).order_id in ended.err) == (True, True)
    assert (dead(letters), letters.queued()) == ("134", [order(2).order_id] if live else [])


def test_a_dead_letter_without_a_record_is_not_requeued_and_leaves_the_list_by_drop(letters: Lab) -> None:
    letters.redis.delete(KEYS.record(order(1)))

    listed = letters.run_command("dead", "list", "--json", "--limit", "1").objects
    requeued = letters.run_command("dead", "requeue", "--all", "--yes", "--json")

    assert listed[0]["reason"] == "record_gone"
    assert (requeued.code, requeued.objects) == (1, [{"queued": 2, "waiting": 0, "deliveries": 1, "not_dead": 1}])
    assert letters.run_command("dead", "drop", "--reason", "record_gone", "--yes").code == 0
    assert dead(letters) == ""
    assert letters.redis.exists(KEYS.record(order(1))) == 0


def test_a_discarded_order_is_not_pending_and_expires_until_a_new_event(letters: Lab) -> None:
    ended = letters.run_command("dead", "drop", order(1).order_id, "--yes", "--json")

    assert (ended.code, ended.objects) == (0, [{"discarded": 1, "not_dead": 0}])
    assert (dead(letters), state(letters, order(1))) == ("234", "discarded")
    assert (letters.due_in(order(1)), letters.days_kept(order(1))) == (None, {400.0})
    assert letters.try_start(order(1)) == "nothing"
    explained = letters.run_command("orders", "explain", order(1).order_id)
    assert (explained.code, "discarded by hand" in explained.out) == (1, True)
    assert len(letters.run_command("orders", "list", "--state", "discarded", "--json").objects) == 1
    # reconcile does not fetch it either.
    (held,) = Archive(letters.redis).copies([order(1)])
    assert held is not None
    assert (held.pending, held.dead) == (False, "discarded")

    letters.accept(order(1))
    assert (state(letters, order(1)), letters.days_kept(order(1))) == ("pending", {None})
    letters.fetch_and_store(order(1))
    assert state(letters, order(1)) == "fetched"


def test_a_late_answer_of_a_discarded_order_is_stored(letters: Lab) -> None:
    """The worker was taken for dead, and still stores its answer."""
    letters.accept(order(5))
    late = letters.start_fetch(order(5))
    for _ in range(policy.CRASHES_ALLOWED):
        letters.later(70)
        letters.try_start(order(5))
    assert state(letters, order(5)) == "dead"
    assert letters.run_command("dead", "drop", order(5).order_id, "--yes").code == 0

    letters.store_fetch(late, order=order(5))

    assert state(letters, order(5)) == "fetched"


def test_a_discarded_delivery_is_not_repeated_but_the_next_revision_is_delivered(letters: Lab) -> None:
    assert letters.run_command("dead", "drop", order(4).order_id, "--yes").code == 0

    assert dead(letters) == "123"
    assert (letters.acquire_delivery(order(4)), letters.days_kept(order(4))) == (None, {400.0})
    shown = letters.run_command("orders", "show", order(4).order_id)
    assert "delivery of revision 1 was discarded by hand" in shown.out
    letters.accept_and_fetch(order(4), statusMessage="changed")
    assert letters.start_delivery(order(4)).revision == 2


def test_dead_letters_of_one_millisecond_are_read_once(lab: Lab) -> None:
    """After an outage thousands may share one: each page must cost the same, also while they are discarded."""
    lab.redis.zadd(KEYS.dead, {order(number).member: 1_780_000_000_000 for number in range(3_000)})
    lab.redis.config_resetstat()

    ended = lab.run_command("dead", "drop", "--reason", "record_gone", "--yes", "--json")

    assert ended.objects == [{"discarded": 3_000, "not_dead": 0}]
    read = lab.redis.info("commandstats")
    pages = read.get("cmdstat_zrangebyscore", {}).get("calls", 0) + read.get("cmdstat_zrange", {}).get("calls", 0)
    assert pages <= 50
