"""`events replay`: which orders it is about, what it costs, and what it leaves alone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from app import audit, times
from app.ledger import keys
from app.ledger.history import FetchRequested
from app.ledger.orders import Archive
from app.replay import Selection, Selector
from tests.integration.desk import MUSEUM, SINK, VENUE, Desk, open_desk, order

FAST = ("--rate", "5000", "--yes")


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    return open_desk(redis_client, redis_url, tmp_path)


def event_ids(desk: Desk) -> list[str]:
    return [event["id"] for event in desk.run("events", "list", "--json").objects]


def heard_and_home(desk: Desk, *numbers: int) -> None:
    """Let the orders be told of, in this turn, and come home; no job waits."""
    for number in numbers:
        desk.hear(order(number))
    for number in dict.fromkeys(numbers):
        desk.bring_home(order(number))
    desk.forget_jobs()


def counts(ended: Any) -> tuple[int, ...]:
    (plan,) = ended.objects
    return tuple(plan[name] for name in ("orders", "queued", "waiting", "passed", "left"))


def test_each_order_is_fetched_once_oldest_first_behind_the_live_ones(desk: Desk) -> None:
    """Five events of three orders: three fetches, in the order in which the orders were first told of."""
    heard_and_home(desk, 9, 1, 9, 5, 9)

    ended = desk.run("events", "replay", "--since", "1h", "--force", "--json", *FAST)

    assert (ended.code, counts(ended)) == (0, (3, 3, 0, 0, 0))
    assert desk.waiting("backfill") == [order(number).order_id for number in (9, 1, 5)]
    assert desk.waiting("live") == []


def test_a_stored_copy_that_is_newer_is_left_alone_unless_by_force(desk: Desk) -> None:
    """Order 2 was told of after its fetch, and its job was lost: it is older than what was told."""
    heard_and_home(desk, 1, 2)
    desk.hear(order(2))
    desk.begin(order(2))
    desk.forget_jobs()

    ended = desk.run("events", "replay", "--since", "1h", "--json", *FAST)

    assert (ended.code, counts(ended)) == (0, (1, 1, 0, 0, 0))
    assert desk.waiting("backfill") == [order(2).order_id]
    assert "1 order skipped: the stored copy is newer than the event; --force fetches them too." in ended.err


def test_when_every_copy_is_newer_there_is_nothing_to_do(desk: Desk) -> None:
    heard_and_home(desk, 1, 2)

    ended = desk.run("events", "replay", "--since", "1h", *FAST)

    assert (ended.code, ended.out) == (0, "Nothing to do.\n")
    assert desk.redis.exists(keys.REPLAYS, keys.AUDIT) == 0


def test_orders_with_a_job_that_waits_are_counted_and_get_no_second_one(desk: Desk) -> None:
    orders = [order(number) for number in range(450)]
    desk.hear(*orders)
    for one in orders[:200]:
        desk.begin(one)
    desk.forget_jobs()

    ended = desk.run("events", "replay", "--company", "venue", "--json", *FAST)

    assert (ended.code, counts(ended)) == (0, (450, 200, 250, 0, 0))
    assert desk.waiting("backfill") == [one.order_id for one in orders[:200]]


def test_a_dry_run_tells_events_orders_calls_and_time_and_changes_nothing(desk: Desk) -> None:
    heard_and_home(desk, 1, 2, 1)
    desk.hear(order(3), order(4), order(5))
    before = {key: desk.redis.dump(key) for key in desk.redis.scan_iter()}

    ended = desk.run("events", "replay", "--since", "1h", "--dry-run", "--rate", "0.1", "--json")
    table = desk.run("events", "replay", "--since", "1h", "--dry-run", "--rate", "0.1")

    (told,) = ended.objects
    ends = datetime.fromisoformat(told.pop("ends"))
    assert (ended.code, told) == (
        0,
        {
            "events": 6,
            "orders": 5,
            "passed": 2,
            "to_do": 3,
            "get_order_calls": 3,
            "sinks": [],
            "rate": 0.1,
            "seconds": 30,
            "dry_run": True,
        },
    )
    assert 20 < (ends - datetime.now(UTC)).total_seconds() <= 30
    assert "getOrder calls  3" in table.out
    assert {key: desk.redis.dump(key) for key in desk.redis.scan_iter()} == before


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 4),
        ({"UPSTREAM_REQUESTS_PER_5_MIN": "600"}, 0.4),
        ({"BACKFILL_CONCURRENCY": "5", "UPSTREAM_REQUESTS_PER_5_MIN": "60000"}, 20),
    ],
)
def test_without_a_rate_it_is_what_the_backfills_part_of_the_budget_carries(
    desk: Desk, settings: dict[str, str], rate: float
) -> None:
    desk.hear(order(1))

    ended = desk.run("events", "replay", "--since", "1h", "--dry-run", "--json", **settings)

    assert ended.objects[0]["rate"] == rate


def test_without_anybody_to_ask_it_refuses_and_changes_nothing(desk: Desk) -> None:
    heard_and_home(desk, 1)

    ended = desk.run("events", "replay", "--since", "1h", "--force", stdin="y\n")

    assert ended.code == 2
    assert "pass --yes" in ended.err
    assert desk.waiting("backfill") == []


def test_events_and_orders_are_replayed_by_name_and_what_is_missing_stops_nothing(desk: Desk) -> None:
    heard_and_home(desk, 1, 2, 3)
    first = event_ids(desk)[0]

    ended = desk.run("events", "replay", first, "1-1", "--order", order(2).order_id, "--force", "--json", *FAST)

    assert (ended.code, counts(ended)) == (1, (2, 2, 0, 0, 0))
    assert "'1-1'" in ended.err
    assert desk.waiting("backfill") == [order(1).order_id, order(2).order_id]


@pytest.mark.parametrize(
    ("selection", "numbers"),
    [
        (Selection(status="draft", company_id=VENUE), [1, 4]),
        (Selection(outcome="coalesced"), [3]),
        (Selection(orders=(order(2), order(1)), status="Issued"), [2]),
        (Selection(since=times.parse("1h"), until=times.parse("30m")), []),
        (Selection(dead=True), [2, 4]),
        (Selection(dead=True, status="Issued"), [2]),
        (Selection(dead=True, orders=(order(1), order(4))), [4]),
        (Selection(dead=True, company_id=MUSEUM), []),
    ],
)
def test_all_conditions_must_hold(desk: Desk, selection: Selection, numbers: list[int]) -> None:
    """Order 1 is a Draft, 2 was given up, 3 was told of twice, 4 was given up and is a Draft."""
    desk.hear(order(1), order(1, MUSEUM), order(4), status="Draft")
    desk.hear(order(2), order(3), order(3))
    desk.bring_home(order(1))
    desk.bring_home(order(3))
    for at, number in enumerate((2, 4)):
        desk.give_up(order(number))
        desk.redis.zadd(keys.DEAD, {order(number).member: at})

    found = Selector(desk.redis).select(selection, lambda _: None)

    assert list(found.orders) == [order(number).member for number in numbers]


def test_the_options_make_the_selection(desk: Desk) -> None:
    desk.hear(order(1), order(2), status="Draft")
    desk.hear(order(2))
    desk.give_up(order(2))
    desk.forget_jobs()

    ended = desk.run(
        *("events", "replay", *event_ids(desk), "--outcome", "queued", "--status", "draft", "--company", "venue"),
        *("--since", "1h", "--until", "0s", "--dead", "--json", *FAST),
    )

    assert (ended.code, ended.objects[0]["selected"].partition(" since=")[0]) == (
        0,
        f"3 event ids company={VENUE} status=draft outcome=queued",
    )
    assert desk.waiting("backfill") == [order(2).order_id]


def test_an_order_of_which_no_event_is_kept_is_replayed_by_name(desk: Desk) -> None:
    """It was told of before EVENT_DAYS, or reconcile found it."""
    heard_and_home(desk, 1)
    desk.redis.delete(keys.EVENTS)

    passed = desk.run("events", "replay", "--order", order(1).order_id, *FAST)
    forced = desk.run("events", "replay", "--order", order(1).order_id, "--force", *FAST)

    assert (passed.code, passed.out) == (0, "Nothing to do.\n")
    assert forced.code == 0
    assert desk.waiting("backfill") == [order(1).order_id]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("not-an-event",),
        ("--since", "1h", "--company", "nobody"),
        ("--since", "1h", "--why", "two\nlines"),
        ("--since", "1h", "--who", "x" * 201),
        ("--since", "1h", "--sink", "python:nobody:knows"),
        ("--since", "1h", "--to-sinks", "--force"),
    ],
)
def test_what_is_unclear_is_refused_in_one_line(desk: Desk, arguments: tuple[str, ...]) -> None:
    desk.hear(order(1))

    ended = desk.run("events", "replay", *FAST, *arguments)

    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert desk.redis.exists(keys.AUDIT) == 0


def test_who_asked_why_and_for_what_is_kept_and_the_order_tells_of_the_plan(desk: Desk) -> None:
    """No event is added, and none is marked as seen."""
    heard_and_home(desk, 1)
    before = event_ids(desk)
    seen = desk.redis.keys("ota:seen:*")

    ended = desk.run(
        "events", "replay", "--status", "Issued", "--force", "--why", "venue asks", "--json", *FAST, USER="ann"
    )

    (plan,) = ended.objects
    ((_, entry),) = audit.newest_first(desk.redis)
    assert (entry.what, entry.plan, entry.why, entry.selected, entry.orders) == (
        "replay",
        plan["id"],
        "venue asks",
        "status=Issued",
        1,
    )
    assert entry.who.startswith("ann@")
    wanted = [entry for entry in Archive(desk.redis).history(order(1)) if isinstance(entry, FetchRequested)]
    assert [(entry.reason, entry.queue) for entry in wanted] == [(f"replay:{plan['id']}", "backfill")]
    assert (event_ids(desk), desk.redis.keys("ota:seen:*")) == (before, seen)


def test_an_erased_order_is_not_selected_even_by_force(desk: Desk) -> None:
    heard_and_home(desk, 1, 2)
    desk.redis.hset(keys.record(order(1)), "erased_at", 1)

    ended = desk.run("events", "replay", "--since", "1h", "--force", "--json", *FAST)
    alone = desk.run("events", "replay", "--order", order(1).order_id, "--force", *FAST)

    assert (ended.code, counts(ended)) == (0, (1, 1, 0, 0, 0))
    assert (alone.code, alone.err) == (1, "All orders that match were erased.\n")
    assert desk.waiting("backfill") == [order(2).order_id]


def test_where_no_worker_does_replays_it_says_so(desk: Desk) -> None:
    desk.hear(order(1))

    ended = desk.run("events", "replay", "--since", "1h", *FAST, BACKFILL_WORKERS="0")

    assert ended.code == 0
    assert "BACKFILL_WORKERS is 0 here" in ended.err


def test_the_stored_revision_is_owed_to_the_sinks_again_without_a_fetch(desk: Desk) -> None:
    """Order 1 was handed on, order 2 was never fetched; nothing is queued by the command itself."""
    heard_and_home(desk, 1)
    hand_on = desk.ledger().acquire_delivery(order(1), "w")
    assert hand_on is not None
    desk.ledger().complete_delivery(order(1), "w", hand_on, outcome="succeeded")
    assert desk.ledger().acquire_delivery(order(1), "w") is None
    desk.hear(order(2))
    desk.forget_jobs()

    ended = desk.run("events", "replay", "--since", "1h", "--to-sinks", "--json", *FAST)
    desk.ledger().dispatch_due()

    again = desk.ledger().acquire_delivery(order(1), "w")
    assert (ended.code, counts(ended)) == (0, (1, 1, 0, 0, 0))
    assert "1 order skipped: nothing is stored of them." in ended.err
    assert again is not None
    assert (again.sink, again.revision, again.raw) == (SINK, hand_on.revision, hand_on.raw)
    assert (desk.waiting("backfill"), desk.waiting("live")) == ([order(1).order_id], [])
