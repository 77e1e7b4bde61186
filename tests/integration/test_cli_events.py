"""`events`: what came, and fetching its orders once more."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis

from app import bootstrap
from app.store import archive
from tests.integration.desk import MUSEUM, VENUE, Desk, open_desk, order


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    return open_desk(redis_client, redis_url, tmp_path)


def event_ids(desk: Desk) -> list[str]:
    return [event["id"] for event in desk.run("events", "list", "--json").objects]


def test_events_are_listed_newest_last_as_a_table_and_as_lines(desk: Desk) -> None:
    desk.hear(order(1), status="Draft")
    desk.hear(order(2, MUSEUM))
    desk.hear(order(1), status="Issued")

    table, lines = desk.run("events", "list"), desk.run("events", "list", "--json", "--limit", "2")

    assert (table.code, lines.code, lines.err) == (0, 0, "")
    assert [line.split()[3] for line in table.out.splitlines()[3:-1]] == ["venue", "museum", "venue"]
    told = [(event["company"], event["order_id"], event["status"], event["outcome"]) for event in lines.objects]
    assert told == [
        ("museum", order(2).order_id, "Issued", "queued"),
        ("venue", order(1).order_id, "Issued", "coalesced"),
    ]
    assert lines.objects[0]["at"].endswith("Z")


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        (("--status", "draft"), [1]),
        (("--company", "museum"), [2]),
        (("--company", "{22222222-2222-4222-8222-222222222222}"), [2]),
        (("--since", "1h", "--company", "venue"), [1, 3]),
    ],
)
def test_events_are_filtered(desk: Desk, filters: tuple[str, ...], numbers: list[int]) -> None:
    desk.hear(order(1), status="Draft")
    desk.hear(order(2, MUSEUM))
    desk.hear(order(3), status="Error")

    found = desk.run("events", "list", "--json", *filters)

    assert [event["order_id"] for event in found.objects] == [order(number).order_id for number in numbers]


def test_no_match_is_exit_code_1_and_a_sentence(desk: Desk) -> None:
    ended = desk.run("events", "list", "--until", "1h", "--json")

    assert (ended.code, ended.out, ended.err) == (1, "", "No event matches.\n")


def test_one_event_is_shown_with_where_its_order_stands(desk: Desk) -> None:
    desk.hear(order(1), timestamp="2026-06-01T08:15:02.4170000Z")
    desk.bring_home(order(1))
    (event_id,) = event_ids(desk)

    page, line = desk.run("events", "show", event_id), desk.run("events", "show", event_id, "--json")

    assert (page.code, line.code) == (0, 0)
    assert order(1).order_id in page.out
    assert "2026-06-01T08:15:02.4170000Z" in page.out
    (shown,) = line.objects
    assert (shown["id"], shown["order_state"], shown["secret"]) == (event_id, "home", "current")


def test_an_event_that_is_not_here_is_exit_code_1(desk: Desk) -> None:
    assert desk.run("events", "show", "1-1").code == 1


def test_replay_fetches_each_order_once_oldest_first_behind_the_live_ones(desk: Desk) -> None:
    """Five events of three orders: three fetches, in the order in which the orders were first told of."""
    for number in (9, 1, 9, 5, 9):
        desk.hear(order(number))
    for number in (1, 5, 9):
        desk.bring_home(order(number))
    desk.forget_jobs()

    ended = desk.run("events", "replay", "--since", "1h", "--yes", "--json")

    assert (ended.code, ended.objects) == (0, [{"orders": 3, "queued": 3, "waiting": 0}])
    assert desk.waiting("backfill") == [order(number).order_id for number in (9, 1, 5)]
    assert desk.waiting("live") == []


def test_more_orders_than_one_call_takes_are_all_replayed_and_those_that_wait_are_told(desk: Desk) -> None:
    orders = [order(number) for number in range(450)]
    desk.hear(*orders)
    for one in orders[:200]:
        desk.ledger().begin(one, "w", bootstrap.clock())
    desk.forget_jobs()

    ended = desk.run("events", "replay", "--company", "venue", "--yes")

    assert (ended.code, ended.out) == (0, "450 orders: 200 queued, 250 waiting already.\n")
    assert desk.waiting("backfill") == [one.order_id for one in orders[:200]]


def test_a_dry_run_says_how_many_and_changes_nothing(desk: Desk) -> None:
    desk.hear(order(1))
    desk.bring_home(order(1))
    before = archive.Archive(desk.redis).record(order(1))

    ended = desk.run("events", "replay", "--since", "1h", "--dry-run", "--json")

    assert (ended.code, ended.objects) == (0, [{"orders": 1, "dry_run": True}])
    assert archive.Archive(desk.redis).record(order(1)) == before


def test_without_anybody_to_ask_replay_refuses_and_changes_nothing(desk: Desk) -> None:
    desk.hear(order(1))
    desk.bring_home(order(1))

    ended = desk.run("events", "replay", "--since", "1h", stdin="y\n")

    assert ended.code == 2
    assert "say --yes" in ended.err
    assert desk.waiting("backfill") == []


def test_events_and_orders_are_replayed_by_name_and_what_is_missing_stops_nothing(desk: Desk) -> None:
    desk.hear(order(1))
    desk.hear(order(2), order(3))
    for number in (1, 2, 3):
        desk.bring_home(order(number))
    desk.forget_jobs()
    first = event_ids(desk)[0]

    ended = desk.run("events", "replay", first, "1-1", "--order", order(2).order_id, "--yes")

    assert (ended.code, ended.out) == (1, "2 orders: 2 queued, 0 waiting already.\n")
    assert "'1-1'" in ended.err
    assert desk.waiting("backfill") == [order(1).order_id, order(2).order_id]


@pytest.mark.parametrize(
    "arguments",
    [(), ("1-1", "--since", "1h"), ("not-an-event",), ("--since", "1h", "--company", "nobody")],
)
def test_replay_asks_for_a_clear_selection(desk: Desk, arguments: tuple[str, ...]) -> None:
    ended = desk.run("events", "replay", "--yes", *arguments)

    assert (ended.code, len(ended.err.splitlines())) == (2, 1)


def test_replay_by_status_of_one_company_leaves_the_others_alone(desk: Desk) -> None:
    desk.hear(order(1), order(1, MUSEUM), status="Draft")
    desk.hear(order(2), status="Issued")
    for one in (order(1), order(1, MUSEUM), order(2)):
        desk.bring_home(one)

    ended = desk.run("events", "replay", "--status", "Draft", "--company", VENUE, "--yes", "--json")

    assert ended.objects == [{"orders": 1, "queued": 1, "waiting": 0}]
    assert desk.waiting("backfill") == [order(1).order_id]
