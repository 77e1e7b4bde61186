"""A feeder of a plan may be killed, interrupted, doubled or lose Redis: no order is lost, and none is fed twice."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis

from app.dev.processes import Process
from app.dev.valkey import Valkey
from app.ledger import keys
from app.ledger.history import FetchRequested
from app.ledger.orders import Archive
from app.replay import Plan, Plans
from app.times import to_ms
from tests.eventually import eventually
from tests.integration.desk import Desk, open_desk, order

ORDERS = 60

Start = Callable[..., Process]


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    return full_desk(redis_client, redis_url, tmp_path)


@pytest.fixture
def start(desk: Desk) -> Iterator[Start]:
    """Start commands of the desk; all end with the test."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(feeder(desk, *arguments))


def full_desk(redis: Redis, url: str, folder: Path) -> Desk:
    """Return a desk with an event of every order; no job waits."""
    desk = open_desk(redis, url, folder)
    desk.hear(*(order(number) for number in range(ORDERS)))
    for number in range(ORDERS):
        desk.begin(order(number))
    desk.forget_jobs()
    return desk


def feeder(desk: Desk, *arguments: str) -> Process:
    command = [sys.executable, "-m", "app.cli", *arguments]
    log = desk.folder / f"feeder-{len(list(desk.folder.glob('feeder-*')))}.log"
    root = Path(__file__).parents[2]
    return Process.start(command, env=desk.env | {"PYTHONPATH": str(root)}, cwd=desk.folder, log=log)


def plan_of(desk: Desk) -> Plan:
    """Return the one plan there is, once it is there and has fed something."""

    def begun() -> list[Plan]:
        return [one for one in Plans(desk.redis, event_days=90).newest_first() if one.left < one.orders]

    (plan,) = eventually(begun, 10, what="a plan has begun to be fed")
    return plan


def requests(desk: Desk, plan: Plan) -> Counter[int]:
    """Return how often the plan requested each order, from the histories of the orders."""
    archive = Archive(desk.redis)
    return Counter(
        number
        for number in range(ORDERS)
        for entry in archive.history(order(number))
        if isinstance(entry, FetchRequested) and entry.reason == f"replay:{plan.id}"
    )


def once_each() -> Counter[int]:
    return Counter(range(ORDERS))


REPLAY = ("events", "replay", "--since", "1h", "--yes")


def test_a_killed_replay_is_resumed_without_loss_or_a_second_job(desk: Desk, start: Start) -> None:
    first = start(*REPLAY, "--rate", "40")
    plan = plan_of(desk)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(5)
    fed = sum(requests(desk, plan).values())

    resumed = desk.run("replays", "resume", plan.id, "--rate", "5000", "--json")

    assert 0 < fed < ORDERS
    assert requests(desk, plan) == once_each()
    assert sorted(desk.waiting("live")) == [order(number).order_id for number in range(ORDERS)]
    (plan_now,) = resumed.objects
    assert (resumed.code, plan_now["state"], plan_now["queued"], plan_now["left"]) == (0, "done", ORDERS, 0)


def test_ctrl_c_stops_it_and_prints_how_to_resume(desk: Desk, start: Start) -> None:
    first = start(*REPLAY, "--rate", "20")
    plan = plan_of(desk)

    os.kill(first.pid, signal.SIGINT)

    assert first.wait(5) == 130
    assert f"Resume: ota-receiver replays resume {plan.id}" in first.output
    assert "Traceback" not in first.output


def test_a_cancelled_plan_stops_its_feeder_and_cannot_be_resumed(desk: Desk, start: Start) -> None:
    first = start(*REPLAY, "--rate", "20")
    plan = plan_of(desk)

    cancelled = desk.run("replays", "cancel", plan.id, "--why", "wrong day", "--json")

    assert (cancelled.code, cancelled.objects[0]["state"]) == (0, "cancelled")
    assert first.wait(5) == 1
    assert f"Plan {plan.id} cancelled" in first.output
    queued = desk.waiting("live")
    assert 0 < len(queued) < ORDERS
    assert desk.run("replays", "resume", plan.id).code == 1
    assert desk.waiting("live") == queued
    assert desk.run("replays", "cancel", "unknown").code == 1
    listed = desk.run("replays", "list", "--json").objects
    assert [(one["id"], one["state"], one["queued"]) for one in listed] == [(plan.id, "cancelled", len(queued))]


def test_two_feeders_share_the_rate_and_feed_no_order_twice(desk: Desk, start: Start) -> None:
    first = start(*REPLAY, "--rate", "20")
    plan = plan_of(desk)

    second = start("replays", "resume", plan.id)

    assert (first.wait(15), second.wait(15)) == (0, 0)
    assert requests(desk, plan) == once_each()
    ended = Plans(desk.redis, event_days=90).of(plan.id)
    assert ended is not None
    assert ended.ended is not None
    assert (ended.ended - ended.at).total_seconds() >= ORDERS / 20 - 0.1


def test_the_rate_holds_from_the_first_order_to_the_last(desk: Desk, start: Start) -> None:
    """From the histories: never more than the rate allows, and the last order not much later."""
    only = start(*REPLAY, "--rate", "40")
    plan = plan_of(desk)

    assert only.wait(15) == 0

    archive = Archive(desk.redis)
    times = sorted(
        to_ms(entry.at)
        for number in range(ORDERS)
        for entry in archive.history(order(number))
        if isinstance(entry, FetchRequested)
    )
    elapsed = [at - to_ms(plan.at) for at in times]
    assert all(ms >= (count + 1) * 25 - 1 for count, ms in enumerate(elapsed))
    # A machine that does other work may be late; what it was late by is lost after a second.
    assert elapsed[-1] < 3 * ORDERS * 25


def test_a_failure_of_redis_stops_it_and_nothing_is_lost(own_valkey: Valkey, tmp_path: Path) -> None:
    with Redis.from_url(own_valkey.url, socket_timeout=5) as redis:
        desk = full_desk(redis, own_valkey.url, tmp_path)
        with feeder(desk, *REPLAY, "--rate", "40") as first:
            plan = plan_of(desk)
            own_valkey.kill()
            assert first.wait(15) == 3
            assert f"replays resume {plan.id}" in first.output
        own_valkey.restart()

        resumed = desk.run("replays", "resume", plan.id, "--rate", "5000")

        assert resumed.code == 0
        assert requests(desk, plan) == once_each()
        assert redis.zcard(keys.DUE) == ORDERS
