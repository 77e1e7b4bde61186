"""Plans of replays: their rate, their feeders and their end, with a clock of the test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import pytest

from app import audit, bootstrap
from app.errors import OtherSchema
from app.ledger import keys
from app.ledger.history import Redelivered
from app.ledger.ledger import Ledger
from app.ledger.orders import Archive
from app.ledger.policy import DAY
from app.ledger.redis import VERSION
from app.ledger.work import DeliveryOutcome
from app.replay import MOST_A_STEP, Draft, Plan, Plans, Step
from tests.lab import SINK, Lab, order

OTHER = "python:json:loads"
NOW = 1_800_000_000_000


class _Clock:
    """The time of the plans; `file` and `feed` set it."""

    now = 0

    def __call__(self) -> int:
        return self.now


CLOCK: Final = _Clock()


@pytest.fixture
def plans(lab: Lab) -> Plans:
    CLOCK.now = NOW
    return Plans(lab.redis, event_days=90, clock=CLOCK)


def file(plans: Plans, numbers: Iterable[int], *, rate: float = 1, sinks: tuple[str, ...] = ()) -> Plan:
    """Store a plan for the orders with these numbers, whatever is stored of them."""
    draft = Draft(who="ann@host", why="a test", selected="status=Issued", rate=rate, sinks=sinks)
    return plans.file(draft, ((order(number).member, None) for number in numbers))


def feed(plans: Plans, plan: Plan, now: int) -> Step:
    """Feed once at this time."""
    CLOCK.now = now
    return plans.feed(plan)


def left_after(plans: Plans, plan: Plan, now: int) -> int:
    """Feed once at this time; return how many orders are left."""
    return feed(plans, plan, now).left


def current(plans: Plans, plan: Plan) -> Plan:
    """Return the plan as it is now."""
    now = plans.of(plan.id)
    assert now is not None
    return now


def generation(lab: Lab, number: int) -> int:
    return int(lab.redis.hget(keys.record(order(number)), "generation") or 0)


def delivered(lab: Lab, number: int, outcome: DeliveryOutcome = "succeeded") -> int:
    """Fetch and deliver the order; return the revision."""
    lab.accept(order(number))
    lab.fetch_and_store(order(number))
    delivery = lab.ledger.acquire_delivery(order(number), "w")
    assert delivery is not None
    lab.ledger.complete_delivery(order(number), "w", delivery, outcome=outcome)
    assert lab.ledger.acquire_delivery(order(number), "w") is None
    lab.clear_queues()
    return delivery.revision


class TestRate:
    def test_orders_are_fed_one_by_one_at_the_rate(self, plans: Plans) -> None:
        plan = file(plans, range(10), rate=2)

        left = [left_after(plans, plan, NOW + ms) for ms in (0, 499, 500, 999, 1000, 1001, 2500)]

        assert left == [10, 10, 9, 9, 8, 8, 6]

    def test_an_unused_rate_is_lost_after_a_second(self, plans: Plans) -> None:
        """A feeder that resumes after an hour does not catch up."""
        plan = file(plans, range(100), rate=5)

        left = [left_after(plans, plan, NOW + ms) for ms in (3_600_000, 3_600_100, 3_600_200)]

        assert left == [95, 95, 94]

    def test_two_feeders_share_the_rate_and_never_an_order(self, lab: Lab, plans: Plans) -> None:
        plan, other = file(plans, range(40), rate=10), Plans(lab.redis, event_days=90, clock=CLOCK)

        for ms in range(0, 2001, 100):
            feed(plans, plan, NOW + ms)
            feed(other, plan, NOW + ms)

        assert sorted(generation(lab, number) for number in range(40)) == [0] * 20 + [1] * 20

    def test_a_rate_below_one_per_second_is_kept(self, plans: Plans) -> None:
        plan = file(plans, range(3), rate=0.1)

        steps = [feed(plans, plan, NOW + ms) for ms in (5_000, 10_000, 15_000, 20_000)]

        assert [(step.left, step.wait) for step in steps] == [(3, 5000), (2, 10_000), (2, 5000), (1, 10_000)]

    def test_one_step_takes_a_bounded_number_of_orders(self, plans: Plans) -> None:
        plan = file(plans, range(MOST_A_STEP + 10), rate=5000)

        assert [left_after(plans, plan, NOW + 1000), left_after(plans, plan, NOW + 1000)] == [10, 0]


class TestOrders:
    def test_an_order_fetched_meanwhile_is_passed_over_without_using_the_rate(self, lab: Lab, plans: Plans) -> None:
        """All four were fetched after the plan's events; order 3 has a new event since."""
        for number in (1, 2, 3, 4):
            lab.accept(order(number))
            lab.fetch_and_store(order(number))
        lab.accept(order(3))
        lab.clear_queues()
        event_at = bootstrap.clock() - 60_000
        draft = Draft(who="", why="", selected="", rate=1)
        plan = plans.file(draft, ((order(number).member, event_at) for number in (1, 2, 3, 4)))

        left = left_after(plans, plan, NOW + 1000)

        # Order 3 uses the rate of the second; order 4 needs nothing and ends the plan.
        assert (left, generation(lab, 3), generation(lab, 4)) == (0, 3, 1)
        assert current(plans, plan).passed == 3

    def test_orders_are_queued_in_their_order_in_backfill(self, lab: Lab, plans: Plans) -> None:
        plan = file(plans, (3, 1, 2), rate=1000)

        left_after(plans, plan, NOW + 1000)

        assert lab.queued("backfill") == [order(number).order_id for number in (3, 1, 2)]
        assert lab.redis.zscore(keys.DUE, order(1).member) is not None

    @pytest.mark.parametrize("sinks", [(), (SINK,)])
    def test_an_order_erased_meanwhile_stays_erased(self, lab: Lab, plans: Plans, sinks: tuple[str, ...]) -> None:
        """Also with force and for a sink; its tombstone still expires."""
        delivered(lab, 1)
        plan = file(plans, (1,), rate=1000, sinks=sinks)
        lab.redis.hset(keys.record(order(1)), "erased_at", NOW)
        before = lab.redis.hgetall(keys.record(order(1)))

        left_after(plans, plan, NOW + 1000)

        assert current(plans, plan).passed == 1
        assert lab.redis.hgetall(keys.record(order(1))) == before
        assert int(lab.redis.pttl(keys.record(order(1)))) > 0


class TestEnd:
    def test_a_finished_plan_is_done_and_its_list_is_gone(self, lab: Lab, plans: Plans) -> None:
        plan = file(plans, range(3), rate=1000)

        step = feed(plans, plan, NOW + 1000)

        ended = current(plans, plan)
        assert (step.state, ended.state, ended.queued, ended.left) == ("done", "done", 3, 0)
        assert lab.redis.exists(keys.replay_todo(plan.id)) == 0

    def test_a_cancelled_plan_queues_no_more_orders(self, lab: Lab, plans: Plans) -> None:
        plan = file(plans, range(10), rate=1)
        left_after(plans, plan, NOW + 1000)

        cancelled = plans.cancel(plan, "bob@host", "enough")
        step = feed(plans, plan, NOW + 9000)

        assert (cancelled.state, cancelled.left, step.state) == ("cancelled", 9, "cancelled")
        assert lab.queued("backfill") == [order(0).order_id]
        assert [(entry.what, entry.who) for _, entry in audit.newest_first(lab.redis)] == [
            ("cancel", "bob@host"),
            ("replay", "ann@host"),
        ]

    def test_a_plan_that_ended_meanwhile_is_not_cancelled(self, plans: Plans) -> None:
        plan = file(plans, range(3), rate=1000)
        left_after(plans, plan, NOW + 1000)

        assert plans.cancel(plan, "bob", "").state == "done"

    def test_a_writer_that_dies_leaves_no_plan(self, lab: Lab, plans: Plans) -> None:
        def dies_after_a_chunk() -> Iterable[tuple[str, int | None]]:
            yield from ((order(number).member, None) for number in range(1500))
            raise KeyboardInterrupt

        draft = Draft(who="", why="", selected="", rate=1)
        with pytest.raises(KeyboardInterrupt):
            plans.file(draft, dies_after_a_chunk())

        (left,) = lab.redis.keys("ota:replay*")
        assert 0 < int(lab.redis.pttl(left)) <= DAY
        assert list(plans.newest_first()) == []

    def test_a_deleted_plan_is_unknown(self, lab: Lab, plans: Plans) -> None:
        plan = file(plans, range(3))
        lab.redis.delete(keys.replay(plan.id), keys.replay_todo(plan.id))

        assert feed(plans, plan, NOW + 1000).state == "unknown"

    @pytest.mark.parametrize("sinks", [(), (SINK,)])
    def test_another_schema_version_is_not_touched(self, lab: Lab, plans: Plans, sinks: tuple[str, ...]) -> None:
        plan = file(plans, range(3), rate=1000, sinks=sinks)
        lab.redis.set(keys.SCHEMA, VERSION + 1)

        with pytest.raises(OtherSchema):
            feed(plans, plan, NOW + 1000)
        assert lab.redis.llen(keys.replay_todo(plan.id)) == 3


class TestToSinks:
    def test_the_revision_is_delivered_again_and_nothing_expires_before(self, lab: Lab, plans: Plans) -> None:
        revision = delivered(lab, 1)
        assert int(lab.redis.pttl(keys.record(order(1)))) > 0
        plan = file(plans, (1,), rate=1000, sinks=(SINK,))

        left_after(plans, plan, NOW + 1000)

        assert [lab.redis.pttl(key(order(1))) for key in (keys.record, keys.content, keys.history)] == [-1, -1, -1]
        assert generation(lab, 1) == 1
        again = lab.ledger.acquire_delivery(order(1), "w")
        assert again is not None
        assert (again.revision, again.attempts) == (revision, 1)
        lab.ledger.complete_delivery(order(1), "w", again, outcome="succeeded")
        assert lab.ledger.acquire_delivery(order(1), "w") is None
        assert int(lab.redis.pttl(keys.record(order(1)))) > 0
        assert Redelivered in {type(entry) for entry in Archive(lab.redis).history(order(1))}

    def test_only_the_named_sink_gets_it(self, lab: Lab, plans: Plans) -> None:
        delivered(lab, 1)
        lab.redis.hset(keys.record(order(1)), f"{OTHER}:revision", 1)
        plan = file(plans, (1,), rate=1000, sinks=(OTHER,))

        left_after(plans, plan, NOW + 1000)

        assert lab.redis.hmget(keys.record(order(1)), f"{SINK}:revision", f"{OTHER}:revision") == [b"1", b"0"]

    def test_a_dead_delivery_gets_new_attempts(self, lab: Lab, plans: Plans) -> None:
        lab.accept(order(1))
        lab.fetch_and_store(order(1))
        lab.dead_letter_delivery(order(1))
        plan = file(plans, (1,), rate=1000, sinks=(SINK,))

        left_after(plans, plan, NOW + 1000)

        assert lab.redis.zcard(keys.DEAD_DELIVERIES) == 0
        assert lab.ledger.acquire_delivery(order(1), "w") is not None

    def test_a_dead_order_is_delivered_and_stays_dead(self, lab: Lab, plans: Plans) -> None:
        """The sink gets what was stored before the dead letter."""
        delivered(lab, 1)
        lab.accept(order(1), timestamp="2026-06-01T08:15:02Z")
        lab.dead_letter(order(1))
        lab.clear_queues()
        plan = file(plans, (1,), rate=1000, sinks=(SINK,))

        left_after(plans, plan, NOW + 1000)

        ledger = Ledger(lab.redis, order_days=400, fetch_lease=60_000, sinks=(SINK,), clock=CLOCK)
        assert ledger.dispatch_due().enqueued == 1
        assert ledger.start_fetch(order(1), "w") == ("deliver", None)
        assert lab.redis.zscore(keys.DEAD, order(1).member) is not None

    def test_a_pending_fetch_stays_in_the_live_queue(self, lab: Lab, plans: Plans) -> None:
        delivered(lab, 1)
        lab.accept(order(1), timestamp="2026-06-01T08:15:02Z")
        plan = file(plans, (1,), rate=1000, sinks=(SINK,))

        left_after(plans, plan, NOW + 1000)

        assert lab.redis.hmget(keys.record(order(1)), "queue", "job") == [b"live", b"live"]
        assert lab.queued("live") == [order(1).order_id]

    def test_an_order_without_content_is_passed_over(self, lab: Lab, plans: Plans) -> None:
        lab.accept(order(1))
        plan = file(plans, (1, 2), rate=1000, sinks=(SINK,))

        assert left_after(plans, plan, NOW + 1000) == 0

        assert current(plans, plan).passed == 2
        assert lab.redis.exists(keys.record(order(2))) == 0
