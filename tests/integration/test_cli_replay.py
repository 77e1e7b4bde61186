"""`events replay`: which orders it selects and skips, what it forecasts, and what it queues."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from app import audit, times
from app.ledger.history import FetchRequested, Redelivered
from app.replay import Selection, select
from tests.command import Ended
from tests.lab import KEYS, MUSEUM, SINK, VENUE, Lab, order

FAST = ("--rate", "5000", "--yes")


def event_ids(lab: Lab) -> list[str]:
    return [event["id"] for event in lab.run_command("events", "list", "--json").objects]


def fetched(lab: Lab, *numbers: int) -> None:
    """Accept events of the orders in this sequence, and fetch the orders; no job waits."""
    lab.accept(*map(order, numbers))
    for number in dict.fromkeys(numbers):
        lab.fetch_and_store(order(number))
    lab.clear_queues()


def replay(lab: Lab, *arguments: str, **env: str) -> Ended:
    return lab.run_command("events", "replay", *arguments, *FAST, **env)


def counts(ended: Any) -> tuple[int, ...]:
    (plan,) = ended.objects
    return tuple(plan[name] for name in ("orders", "queued", "waiting", "passed", "left"))


def test_each_order_is_fetched_once_oldest_first_in_the_backfill_queue(lab: Lab) -> None:
    """Five events of three orders: three fetches, in the sequence of the first events."""
    fetched(lab, 9, 1, 9, 5, 9)

    ended = replay(lab, "--since", "1h", "--force", "--json")

    assert (ended.code, counts(ended)) == (0, (3, 3, 0, 0, 0))
    assert lab.queued("backfill") == [order(number).order_id for number in (9, 1, 5)]
    assert lab.queued("live") == []


def test_without_yes_and_without_a_terminal_nothing_is_queued(lab: Lab) -> None:
    fetched(lab, 1)

    ended = lab.run_command("events", "replay", "--since", "1h", "--force", stdin="y\n")

    assert ended.code == 2
    assert "Not a terminal: pass --yes." in ended.err
    assert (lab.queued("backfill"), lab.redis.exists(KEYS.audit)) == ([], 0)


def test_a_newer_stored_copy_is_skipped(lab: Lab) -> None:
    """An event of order 2 arrived after its fetch, and its job was lost."""
    fetched(lab, 1, 2)
    nothing = replay(lab, "--since", "1h")
    assert (nothing.code, nothing.out, lab.redis.exists(KEYS.replays, KEYS.audit)) == (0, "Nothing to do.\n", 0)
    lab.accept(order(2))
    lab.start_fetch(order(2))
    lab.clear_queues()

    ended = replay(lab, "--since", "1h", "--json")

    assert (ended.code, counts(ended)) == (0, (1, 1, 0, 0, 0))
    assert lab.queued("live") == [order(2).order_id], "what is pending in live stays in live"
    assert "1 order skipped: the stored copy is newer than the event; --force fetches them too." in ended.err


def test_an_order_without_a_stored_event_is_replayed_by_id(lab: Lab) -> None:
    """Its event is older than EVENT_DAYS, or reconcile found it."""
    fetched(lab, 1)
    lab.redis.delete(KEYS.events)

    assert replay(lab, "--order", order(1).order_id).out == "Nothing to do.\n"
    assert replay(lab, "--order", order(1).order_id, "--force").code == 0

    assert lab.queued("backfill") == [order(1).order_id]


def test_orders_that_wait_for_a_job_get_no_second_one(lab: Lab) -> None:
    orders = [order(number) for number in range(450)]
    lab.accept(*orders)
    for one in orders[:200]:
        lab.start_fetch(one)
    lab.clear_queues()

    ended = replay(lab, "--company", "venue", "--json")

    assert (ended.code, counts(ended)) == (0, (450, 200, 250, 0, 0))
    assert lab.queued("live") == [one.order_id for one in orders[:200]]


def test_a_dry_run_forecasts_calls_and_time_and_changes_nothing(lab: Lab) -> None:
    fetched(lab, 1, 2, 1)
    lab.accept(order(3), order(4), order(5))
    before = lab.dump()
    dry_run = ("events", "replay", "--since", "1h", "--dry-run", "--rate", "0.1")

    ended, table = lab.run_commands([(*dry_run, "--json"), dry_run])

    (forecast,) = ended.objects
    ends = datetime.fromisoformat(forecast.pop("ends"))
    counts = {"events": 6, "orders": 5, "passed": 2, "to_do": 3, "get_order_calls": 3}
    assert (ended.code, forecast) == (0, counts | {"sinks": [], "rate": 0.1, "takes_s": 30, "dry_run": True})
    assert 20 < (ends - datetime.now(UTC)).total_seconds() <= 30
    assert "getOrder calls  3" in table.out
    assert lab.dump() == before


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 4),
        ({"UPSTREAM_REQUESTS_PER_5_MIN": "600"}, 0.4),
        ({"BACKFILL_CONCURRENCY": "5", "UPSTREAM_REQUESTS_PER_5_MIN": "60000"}, 20),
    ],
)
def test_the_default_rate_is_the_backfills_share_of_the_limits(lab: Lab, settings: dict[str, str], rate: float) -> None:
    lab.accept(order(1))

    ended = lab.run_command("events", "replay", "--since", "1h", "--dry-run", "--json", **settings)

    assert ended.objects[0]["rate"] == rate


def test_an_unknown_event_id_stops_nothing(lab: Lab) -> None:
    fetched(lab, 1, 2, 3)
    first = event_ids(lab)[0]

    ended = replay(lab, first, "1-1", "--order", order(2).order_id, "--force", "--json")

    assert (ended.code, counts(ended)) == (1, (2, 2, 0, 0, 0))
    assert "'1-1'" in ended.err
    assert lab.queued("backfill") == [order(1).order_id, order(2).order_id]


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
def test_all_conditions_must_hold(lab: Lab, selection: Selection, numbers: list[int]) -> None:
    """Order 1 is a Draft, 2 is dead, 3 has two events, 4 is dead and a Draft."""
    lab.accept(order(1), order(1, MUSEUM), order(4), status="Draft")
    lab.accept(order(2), order(3), order(3))
    lab.fetch_and_store(order(1))
    lab.fetch_and_store(order(3))
    for at, number in enumerate((2, 4)):
        lab.dead_letter(order(number))
        lab.redis.zadd(KEYS.dead, {order(number).member: at})

    found = select(lab.redis, selection, lambda _: None)

    assert list(found.orders) == [order(number).member for number in numbers]


def test_the_options_become_the_selection(lab: Lab) -> None:
    lab.accept(order(1), order(2), status="Draft")
    lab.accept(order(2))
    lab.dead_letter(order(2))
    lab.clear_queues()

    options = "--outcome queued --status draft --company venue --since 1h --until 0s --dead --json"

    ended = replay(lab, *event_ids(lab), *options.split())

    selected = f"3 event ids company={VENUE} status=draft outcome=queued"
    assert (ended.code, ended.objects[0]["selected"].partition(" since=")[0]) == (0, selected)
    assert lab.queued("backfill") == [order(2).order_id]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("not-an-event",),
        ("--since", "1h", "--company", "unknown"),
        ("--since", "1h", "--why", "two\nlines"),
        ("--since", "1h", "--who", "x" * 201),
        ("--since", "1h", "--to-sinks", SINK, "--to-sinks", "python:unknown:sink"),
        ("--since", "1h", "--to-sinks", "all", "--force"),
    ],
)
def test_unclear_options_are_refused_in_one_line(lab: Lab, arguments: tuple[str, ...]) -> None:
    lab.accept(order(1))

    ended = replay(lab, *arguments)

    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert lab.redis.exists(KEYS.audit) == 0


def test_the_audit_and_the_history_name_the_replay(lab: Lab) -> None:
    """No event is added, and none is marked as a duplicate."""
    fetched(lab, 1)
    before = event_ids(lab)
    seen = lab.redis.keys("ota:seen:*")

    ended = replay(lab, "--status", "Issued", "--force", "--why", "venue asks", "--json", USER="ann")

    (plan,) = ended.objects
    ((_, entry),) = audit.newest_first(lab.redis)
    noted = (entry.what, entry.plan, entry.why, entry.selected, entry.orders)
    assert noted == ("replay", plan["id"], "venue asks", "status=Issued", 1)
    assert entry.who.startswith("ann@")
    requests = [entry for entry in lab.history(order(1)) if isinstance(entry, FetchRequested)]
    assert [(entry.reason, entry.queue) for entry in requests] == [(f"replay:{plan['id']}", "backfill")]
    assert (event_ids(lab), lab.redis.keys("ota:seen:*")) == (before, seen)


def test_to_sinks_delivers_the_stored_revision_again_without_a_fetch(lab: Lab) -> None:
    """Order 1 is delivered, order 2 was never fetched; the command itself queues nothing."""
    fetched(lab, 1)
    delivery = lab.deliver(order=order(1))
    lab.accept(order(2))
    lab.clear_queues()

    ended = replay(lab, "--since", "1h", "--to-sinks", SINK, "--json")

    assert (ended.code, counts(ended)) == (0, (1, 1, 0, 0, 0))
    assert "1 order skipped: nothing is stored of them." in ended.err
    again = lab.start_delivery(order(1))
    assert (again.sink, again.revision, again.raw) == (SINK, delivery.revision, delivery.raw)
    assert lab.queued("backfill") == lab.queued("live") == []


@pytest.mark.parametrize(
    ("names", "chosen"),
    [(["shop"], ["shop"]), (["shop", SINK, "shop"], ["shop", SINK]), (["all"], [SINK, "shop"])],
)
def test_to_sinks_names_the_sinks_and_all_means_every_one(lab: Lab, names: list[str], chosen: list[str]) -> None:
    lab.declare(sinks=(SINK, "shop"))
    fetched(lab, 1)

    named = [word for name in names for word in ("--to-sinks", name)]
    ended = replay(lab, "--since", "1h", *named, "--json")

    (plan,) = ended.objects
    assert (ended.code, sorted(plan["sinks"])) == (0, sorted(chosen))
    ((_, entry),) = audit.newest_first(lab.redis)
    assert [name for name in chosen if f" to {name}" not in entry.selected] == []
    redelivered = {entry.sink for entry in lab.history(order(1)) if isinstance(entry, Redelivered)}
    assert redelivered == set(chosen)


@pytest.mark.parametrize(
    ("name", "sinks", "there_are"),
    [("shpo", (SINK, "shop"), f"{SINK}, shop"), ("", ("shop",), "shop"), ("all", (), "none")],
)
def test_an_unknown_sink_is_refused_with_those_that_there_are(
    lab: Lab, name: str, sinks: tuple[str, ...], there_are: str
) -> None:
    """Without any sink, `all` is as unknown."""
    fetched(lab, 1)
    lab.redis.delete(KEYS.sinks)
    lab.declare(sinks=sinks)

    ended = replay(lab, "--since", "1h", "--to-sinks", name)

    assert (ended.code, ended.err) == (2, f"No worker pool has declared a sink {name!r}. There are: {there_are}.\n")
    assert lab.redis.exists(KEYS.replays, KEYS.audit) == 0
