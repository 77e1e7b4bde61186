"""Plans of replays: their rate, their feeders, which may be killed or lose Redis, and their end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from app import audit
from app.dev.processes import Process
from app.dev.valkey import Valkey
from app.errors import OtherSchema
from app.ledger.history import FetchRequested, Redelivered
from app.ledger.policy import DAY
from app.ledger.redis import VERSION, Redis
from app.ledger.work import DeliveryOutcome
from app.replay import MOST_A_STEP, Plan, Plans, Step
from app.times import to_ms
from tests.eventually import eventually
from tests.lab import KEYS, SINK, Lab, order

OTHER = "python:operator:eq"
NOW = 1_800_000_000_000


@pytest.fixture
def plans(lab: Lab) -> Plans:
    """Plans whose time starts with NOW; `feed` sets it."""
    lab.now = NOW
    return Plans(lab.redis, event_days=90, clock=lab.clock)


def file(plans: Plans, numbers: Iterable[int], *, rate: float = 1, sinks: tuple[str, ...] = ()) -> Plan:
    """Store a plan for the orders with these numbers, whatever is stored of them."""
    orders = ((order(number).member, None) for number in numbers)
    return plans.file(orders, rate=rate, sinks=sinks, selected="status=Issued", who="ann@host", why="a test")


def feed(lab: Lab, plans: Plans, plan: Plan, after_ms: int = 1000) -> Step:
    """Feed once, so long after NOW."""
    lab.now = NOW + after_ms
    return plans.feed(plan)


def current(plans: Plans, plan: Plan) -> Plan:
    """Return the plan as it is now."""
    now = plans.of(plan.id)
    assert now is not None
    return now


def delivered(lab: Lab, number: int, outcome: DeliveryOutcome = "succeeded") -> int:
    """Fetch and deliver the order; return the revision."""
    lab.accept_and_fetch(order(number))
    delivery = lab.deliver(outcome, order(number))
    assert lab.acquire_delivery(order(number)) is None
    lab.clear_queues()
    return delivery.revision


class TestRate:
    def test_orders_are_fed_one_by_one_at_the_rate(self, lab: Lab, plans: Plans) -> None:
        plan = file(plans, range(10), rate=2)

        left = [feed(lab, plans, plan, ms).left for ms in (0, 499, 500, 999, 1000, 1001, 2500)]

        assert left == [10, 10, 9, 9, 8, 8, 6]

    def test_an_unused_rate_is_lost_after_a_second(self, lab: Lab, plans: Plans) -> None:
        """A feeder that resumes after an hour does not catch up."""
        plan = file(plans, range(100), rate=5)

        left = [feed(lab, plans, plan, ms).left for ms in (3_600_000, 3_600_100, 3_600_200)]

        assert left == [95, 95, 94]

    def test_a_rate_below_one_per_second_is_kept(self, lab: Lab, plans: Plans) -> None:
        plan = file(plans, range(3), rate=0.1)

        steps = [feed(lab, plans, plan, ms) for ms in (5_000, 10_000, 15_000, 20_000)]

        assert [(step.left, step.wait) for step in steps] == [(3, 5000), (2, 10_000), (2, 5000), (1, 10_000)]

    def test_one_step_takes_a_bounded_number_of_orders(self, lab: Lab, plans: Plans) -> None:
        plan = file(plans, range(MOST_A_STEP + 10), rate=5000)

        assert [feed(lab, plans, plan).left, feed(lab, plans, plan).left] == [10, 0]


class TestOrders:
    def test_an_order_fetched_meanwhile_is_passed_over_without_using_the_rate(self, lab: Lab, plans: Plans) -> None:
        """All four were fetched after the plan's events; order 3 has a new event since."""
        event_at = lab.now - 60_000
        for number in (1, 2, 3, 4):
            lab.accept_and_fetch(order(number))
        lab.accept(order(3))
        lab.clear_queues()
        plan = plans.file(((order(number).member, event_at) for number in (1, 2, 3, 4)), rate=1)

        left = feed(lab, plans, plan).left

        # Order 3 uses the rate of the second; order 4 needs nothing and ends the plan.
        assert (left, lab.field("generation", order(3)), lab.field("generation", order(4))) == (0, "3", "1")
        assert current(plans, plan).passed == 3


class TestEnd:
    def test_a_finished_plan_has_queued_its_orders_and_is_not_cancelled(self, lab: Lab, plans: Plans) -> None:
        plan = file(plans, (3, 1, 2), rate=1000)

        step = feed(lab, plans, plan)

        ended = current(plans, plan)
        assert (step.state, ended.state, ended.queued, ended.left) == ("done", "done", 3, 0)
        assert lab.redis.exists(KEYS.replay_todo(plan.id)) == 0
        assert lab.queued("backfill") == [order(number).order_id for number in (3, 1, 2)]
        assert lab.due_in(order(1)) is not None
        assert plans.cancel(plan, "bob", "").state == "done"

    def test_a_cancelled_plan_queues_no_more_orders(self, lab: Lab, plans: Plans) -> None:
        plan = file(plans, range(10), rate=1)
        feed(lab, plans, plan)

        cancelled = plans.cancel(plan, "bob@host", "enough")
        step = feed(lab, plans, plan, 9000)

        assert (cancelled.state, cancelled.left, step.state) == ("cancelled", 9, "cancelled")
        assert lab.queued("backfill") == [order(0).order_id]
        noted = [(entry.what, entry.who) for _, entry in audit.newest_first(lab.redis)]
        assert noted == [("cancel", "bob@host"), ("replay", "ann@host")]

    def test_a_writer_that_dies_leaves_no_plan(self, lab: Lab, plans: Plans) -> None:
        def dies_after_a_chunk() -> Iterable[tuple[str, int | None]]:
            yield from ((order(number).member, None) for number in range(1500))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            plans.file(dies_after_a_chunk(), rate=1)

        (left,) = lab.redis.keys("ota:replay*")
        assert 0 < int(lab.redis.pttl(left)) <= DAY
        assert list(plans.newest_first()) == []

    def test_a_deleted_plan_is_unknown(self, lab: Lab, plans: Plans) -> None:
        plan = file(plans, range(3))
        lab.redis.delete(KEYS.replay(plan.id), KEYS.replay_todo(plan.id))

        assert feed(lab, plans, plan).state == "unknown"

    @pytest.mark.parametrize("sinks", [(), (SINK,)])
    def test_another_schema_version_is_not_touched(self, lab: Lab, plans: Plans, sinks: tuple[str, ...]) -> None:
        plan = file(plans, range(3), rate=1000, sinks=sinks)
        lab.redis.set(KEYS.schema, VERSION + 1)

        with pytest.raises(OtherSchema):
            feed(lab, plans, plan)
        assert lab.redis.llen(KEYS.replay_todo(plan.id)) == 3


class TestToSinks:
    def test_the_revision_is_delivered_again_and_nothing_expires_before(self, lab: Lab, plans: Plans) -> None:
        revision = delivered(lab, 1)
        assert lab.days_kept(order(1)) == {400.0}
        plan = file(plans, (1,), rate=1000, sinks=(SINK,))

        feed(lab, plans, plan)

        assert (lab.days_kept(order(1)), lab.field("generation", order(1))) == ({None}, "1")
        again = lab.deliver(order=order(1))
        assert (again.revision, again.attempts) == (revision, 1)
        assert (lab.acquire_delivery(order(1)), lab.days_kept(order(1))) == (None, {400.0})
        assert Redelivered in {type(entry) for entry in lab.history(order(1))}

    def test_only_the_named_sink_gets_it(self, lab: Lab, plans: Plans) -> None:
        delivered(lab, 1)
        lab.redis.hset(KEYS.record(order(1)), f"{OTHER}:revision", 1)
        plan = file(plans, (1,), rate=1000, sinks=(OTHER,))

        feed(lab, plans, plan)

        assert [lab.field(f"{sink}:revision", order(1)) for sink in (SINK, OTHER)] == ["1", "0"]

    def test_a_dead_delivery_gets_new_attempts(self, lab: Lab, plans: Plans) -> None:
        lab.accept_and_fetch(order(1))
        lab.dead_letter_delivery(order(1))
        plan = file(plans, (1,), rate=1000, sinks=(SINK,))

        feed(lab, plans, plan)

        assert lab.redis.zcard(KEYS.dead_deliveries) == 0
        assert lab.acquire_delivery(order(1)) is not None

    def test_a_dead_order_is_delivered_and_stays_dead(self, lab: Lab, plans: Plans) -> None:
        """The sink gets what was stored before the dead letter."""
        delivered(lab, 1)
        lab.accept(order(1), timestamp="2026-06-01T08:15:02Z")
        lab.dead_letter(order(1))
        lab.clear_queues()
        plan = file(plans, (1,), rate=1000, sinks=(SINK,))

        feed(lab, plans, plan)

        assert (lab.dispatch(), lab.try_start(order(1)), lab.is_dead(order(1))) == (1, "nothing", True)

    def test_a_pending_fetch_stays_in_the_live_queue(self, lab: Lab, plans: Plans) -> None:
        delivered(lab, 1)
        lab.accept(order(1), timestamp="2026-06-01T08:15:02Z")
        plan = file(plans, (1,), rate=1000, sinks=(SINK,))

        feed(lab, plans, plan)

        assert (lab.field("queue", order(1)), lab.field("job", order(1))) == ("live", "live")
        assert lab.queued("live") == [order(1).order_id]

    def test_an_order_without_content_is_passed_over(self, lab: Lab, plans: Plans) -> None:
        lab.accept(order(1))
        plan = file(plans, (1, 2), rate=1000, sinks=(SINK,))

        assert feed(lab, plans, plan).left == 0

        assert current(plans, plan).passed == 2
        assert lab.record(order(2)) == {}


ORDERS = 60


@pytest.fixture
def filled(lab: Lab) -> Lab:
    """A lab with an event of every order; no job waits."""
    return fill(lab)


def fill(lab: Lab) -> Lab:
    lab.accept(*map(order, range(ORDERS)))
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
def test_a_stopped_replay_is_resumed_without_loss_or_a_second_job(filled: Lab, number: int, code: int) -> None:
    """After Ctrl-C it prints how to resume."""
    with feeder(filled, *REPLAY, "--rate", "40") as first:
        plan = plan_of(filled)
        os.kill(first.pid, number)
        assert first.wait(20) == code
        hint = f"Resume: ota-receiver replays resume {plan.id}"
        assert (hint in first.output, "Traceback" in first.output) == (number == signal.SIGINT, False)
    assert 0 < len(fed(filled, plan)) < ORDERS

    resumed = filled.run_command("replays", "resume", plan.id, "--rate", "5000", "--json")

    assert fed(filled, plan) == list(range(ORDERS))
    assert sorted(filled.queued()) == [order(number).order_id for number in range(ORDERS)]
    (plan_now,) = resumed.objects
    assert (resumed.code, plan_now["state"], plan_now["queued"], plan_now["left"]) == (0, "done", ORDERS, 0)


def test_a_cancelled_plan_stops_its_feeder_and_cannot_be_resumed(filled: Lab) -> None:
    with feeder(filled, *REPLAY, "--rate", "20") as first:
        plan = plan_of(filled)

        cancelled = filled.run_command("replays", "cancel", plan.id, "--why", "wrong day", "--json")

        assert (cancelled.code, cancelled.objects[0]["state"]) == (0, "cancelled")
        assert (first.wait(20), f"Plan {plan.id} cancelled" in first.output) == (1, True)
    queued = filled.queued()
    assert 0 < len(queued) < ORDERS
    assert filled.run_command("replays", "resume", plan.id).code == 1
    assert filled.queued() == queued
    assert filled.run_command("replays", "cancel", "unknown").code == 1
    listed = filled.run_command("replays", "list", "--json").objects
    assert [(one["id"], one["state"], one["queued"]) for one in listed] == [(plan.id, "cancelled", len(queued))]


def test_two_feeders_share_the_rate_from_the_first_order_to_the_last_and_feed_none_twice(filled: Lab) -> None:
    """From the histories: never more than the rate allows, and the last order not much later."""
    with feeder(filled, *REPLAY, "--rate", "20") as first:
        plan = plan_of(filled)
        with feeder(filled, "replays", "resume", plan.id) as second:
            assert (first.wait(15), second.wait(15)) == (0, 0)

    assert fed(filled, plan) == list(range(ORDERS))
    elapsed = [at - to_ms(plan.at) for at, _ in requests(filled, plan)]
    assert all(ms >= (count + 1) * 50 - 1 for count, ms in enumerate(elapsed))
    # A machine that does other work may be late; what it was late by is lost after a second.
    assert elapsed[-1] < 3 * ORDERS * 50


def test_a_failure_of_redis_stops_it_and_nothing_is_lost(own_valkey: Valkey, tmp_path: Path) -> None:
    with Redis.from_url(own_valkey.url, socket_timeout=5) as redis:
        lab = fill(Lab(redis, own_valkey.url, tmp_path))
        with feeder(lab, *REPLAY, "--rate", "40") as first:
            plan = plan_of(lab)
            own_valkey.kill()
            assert first.wait(15) == 3
            assert f"replays resume {plan.id}" in first.output
        own_valkey.restart()

        resumed = lab.run_command("replays", "resume", plan.id, "--rate", "5000")

        assert resumed.code == 0
        assert fed(lab, plan) == list(range(ORDERS))
        assert redis.zcard(KEYS.due) == ORDERS
