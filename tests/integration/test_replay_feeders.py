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
from tests.lab import Lab, order

ORDERS = 60

Start = Callable[..., Process]


@pytest.fixture
def lab(lab: Lab) -> Lab:
    return filled(lab)


@pytest.fixture
def start(lab: Lab) -> Iterator[Start]:
    """Start commands of the lab; all end with the test."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(feeder(lab, *arguments))


def filled(lab: Lab) -> Lab:
    """Return the lab with an event of every order; no job waits."""
    lab.accept(*(order(number) for number in range(ORDERS)))
    for number in range(ORDERS):
        lab.start_fetch(order(number))
    lab.clear_queues()
    return lab


def feeder(lab: Lab, *arguments: str) -> Process:
    command = [sys.executable, "-m", "app.cli", *arguments]
    log = lab.folder / f"feeder-{len(list(lab.folder.glob('feeder-*')))}.log"
    root = Path(__file__).parents[2]
    return Process.start(command, env=lab.env | {"PYTHONPATH": str(root)}, cwd=lab.folder, log=log)


def plan_of(lab: Lab) -> Plan:
    """Return the one plan there is, once it is there and has fed something."""

    def begun() -> list[Plan]:
        return [one for one in Plans(lab.redis, event_days=90).newest_first() if one.left < one.orders]

    (plan,) = eventually(begun, 10, what="a plan has begun to be fed")
    return plan


def requests(lab: Lab, plan: Plan) -> Counter[int]:
    """Return how often the plan requested each order, from the histories of the orders."""
    archive = Archive(lab.redis)
    return Counter(
        number
        for number in range(ORDERS)
        for entry in archive.history(order(number))
        if isinstance(entry, FetchRequested) and entry.reason == f"replay:{plan.id}"
    )


def once_each() -> Counter[int]:
    return Counter(range(ORDERS))


REPLAY = ("events", "replay", "--since", "1h", "--yes")


def test_a_killed_replay_is_resumed_without_loss_or_a_second_job(lab: Lab, start: Start) -> None:
    first = start(*REPLAY, "--rate", "40")
    plan = plan_of(lab)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(5)
    fed = sum(requests(lab, plan).values())

    resumed = lab.run_command("replays", "resume", plan.id, "--rate", "5000", "--json")

    assert 0 < fed < ORDERS
    assert requests(lab, plan) == once_each()
    assert sorted(lab.queued("backfill")) == [order(number).order_id for number in range(ORDERS)]
    (plan_now,) = resumed.objects
    assert (resumed.code, plan_now["state"], plan_now["queued"], plan_now["left"]) == (0, "done", ORDERS, 0)


def test_ctrl_c_stops_it_and_prints_how_to_resume(lab: Lab, start: Start) -> None:
    first = start(*REPLAY, "--rate", "20")
    plan = plan_of(lab)

    os.kill(first.pid, signal.SIGINT)

    assert first.wait(5) == 130
    assert f"Resume: ota-receiver replays resume {plan.id}" in first.output
    assert "Traceback" not in first.output


def test_a_cancelled_plan_stops_its_feeder_and_cannot_be_resumed(lab: Lab, start: Start) -> None:
    first = start(*REPLAY, "--rate", "20")
    plan = plan_of(lab)

    cancelled = lab.run_command("replays", "cancel", plan.id, "--why", "wrong day", "--json")

    assert (cancelled.code, cancelled.objects[0]["state"]) == (0, "cancelled")
    assert first.wait(5) == 1
    assert f"Plan {plan.id} cancelled" in first.output
    queued = lab.queued("backfill")
    assert 0 < len(queued) < ORDERS
    assert lab.run_command("replays", "resume", plan.id).code == 1
    assert lab.queued("backfill") == queued
    assert lab.run_command("replays", "cancel", "unknown").code == 1
    listed = lab.run_command("replays", "list", "--json").objects
    assert [(one["id"], one["state"], one["queued"]) for one in listed] == [(plan.id, "cancelled", len(queued))]


def test_two_feeders_share_the_rate_and_feed_no_order_twice(lab: Lab, start: Start) -> None:
    first = start(*REPLAY, "--rate", "20")
    plan = plan_of(lab)

    second = start("replays", "resume", plan.id)

    assert (first.wait(15), second.wait(15)) == (0, 0)
    assert requests(lab, plan) == once_each()
    ended = Plans(lab.redis, event_days=90).of(plan.id)
    assert ended is not None
    assert ended.ended is not None
    assert (ended.ended - ended.at).total_seconds() >= ORDERS / 20 - 0.1


def test_the_rate_holds_from_the_first_order_to_the_last(lab: Lab, start: Start) -> None:
    """From the histories: never more than the rate allows, and the last order not much later."""
    only = start(*REPLAY, "--rate", "40")
    plan = plan_of(lab)

    assert only.wait(15) == 0

    archive = Archive(lab.redis)
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
        lab = filled(Lab(redis, own_valkey.url, tmp_path))
        with feeder(lab, *REPLAY, "--rate", "40") as first:
            plan = plan_of(lab)
            own_valkey.kill()
            assert first.wait(15) == 3
            assert f"replays resume {plan.id}" in first.output
        own_valkey.restart()

        resumed = lab.run_command("replays", "resume", plan.id, "--rate", "5000")

        assert resumed.code == 0
        assert requests(lab, plan) == once_each()
        assert redis.zcard(keys.DUE) == ORDERS
