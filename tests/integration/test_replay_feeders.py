"""A feeder of a plan may be killed, interrupted, doubled or lose Redis: no order is lost, and none is fed twice."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from redis import Redis

from app.dev.processes import Process
from app.dev.valkey import Valkey
from app.ledger import keys
from app.ledger.history import FetchRequested
from app.replay import Plan, Plans
from app.times import to_ms
from tests.eventually import eventually
from tests.lab import Lab, order

ORDERS = 60


@pytest.fixture
def lab(lab: Lab) -> Lab:
    return filled(lab)


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

    def started() -> list[Plan]:
        return [one for one in Plans(lab.redis, event_days=90).newest_first() if one.left < one.orders]

    (plan,) = eventually(started, 10, what="a plan has fed something")
    return plan


def requests(lab: Lab, plan: Plan) -> list[tuple[int, int]]:
    """Return when the plan requested which order, the earliest first, from the histories of the orders."""
    return sorted(
        (to_ms(entry.at), number)
        for number in range(ORDERS)
        for entry in lab.history(order(number))
        if isinstance(entry, FetchRequested) and entry.reason == f"replay:{plan.id}"
    )


def fed(lab: Lab, plan: Plan) -> list[int]:
    """Return the numbers of the orders that the plan has requested."""
    return sorted(number for _, number in requests(lab, plan))


REPLAY = ("events", "replay", "--since", "1h", "--yes")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_replay_is_resumed_without_loss_or_a_second_job(lab: Lab, number: int, code: int) -> None:
    """After Ctrl-C it prints how to resume."""
    with feeder(lab, *REPLAY, "--rate", "40") as first:
        plan = plan_of(lab)
        os.kill(first.pid, number)
        assert first.wait(5) == code
        hint = f"Resume: ota-receiver replays resume {plan.id}"
        assert (hint in first.output, "Traceback" in first.output) == (number == signal.SIGINT, False)
    assert 0 < len(fed(lab, plan)) < ORDERS

    resumed = lab.run_command("replays", "resume", plan.id, "--rate", "5000", "--json")

    assert fed(lab, plan) == list(range(ORDERS))
    assert sorted(lab.queued("backfill")) == [order(number).order_id for number in range(ORDERS)]
    (plan_now,) = resumed.objects
    assert (resumed.code, plan_now["state"], plan_now["queued"], plan_now["left"]) == (0, "done", ORDERS, 0)


def test_a_cancelled_plan_stops_its_feeder_and_cannot_be_resumed(lab: Lab) -> None:
    with feeder(lab, *REPLAY, "--rate", "20") as first:
        plan = plan_of(lab)

        cancelled = lab.run_command("replays", "cancel", plan.id, "--why", "wrong day", "--json")

        assert (cancelled.code, cancelled.objects[0]["state"]) == (0, "cancelled")
        assert (first.wait(5), f"Plan {plan.id} cancelled" in first.output) == (1, True)
    queued = lab.queued("backfill")
    assert 0 < len(queued) < ORDERS
    assert lab.run_command("replays", "resume", plan.id).code == 1
    assert lab.queued("backfill") == queued
    assert lab.run_command("replays", "cancel", "unknown").code == 1
    listed = lab.run_command("replays", "list", "--json").objects
    assert [(one["id"], one["state"], one["queued"]) for one in listed] == [(plan.id, "cancelled", len(queued))]


def test_two_feeders_share_the_rate_from_the_first_order_to_the_last_and_feed_none_twice(lab: Lab) -> None:
    """From the histories: never more than the rate allows, and the last order not much later."""
    with feeder(lab, *REPLAY, "--rate", "40") as first:
        plan = plan_of(lab)
        with feeder(lab, "replays", "resume", plan.id) as second:
            assert (first.wait(15), second.wait(15)) == (0, 0)

    assert fed(lab, plan) == list(range(ORDERS))
    elapsed = [at - to_ms(plan.at) for at, _ in requests(lab, plan)]
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
        assert fed(lab, plan) == list(range(ORDERS))
        assert redis.zcard(keys.DUE) == ORDERS
