"""Plans of replays: their rate, their feeders, which may be killed or lose Redis, and their end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from app import audit
from app.audit import AuditEntry
from app.dev.processes import Process
from app.dev.valkey import Valkey
from app.erasure import Erasure
from app.errors import OtherSchema
from app.ledger.dead_letters import DeadLetters, DeadQuery
from app.ledger.history import FetchRequested, Redelivered
from app.ledger.policy import DAY
from app.ledger.redis import VERSION, Redis
from app.ledger.work import DeliveryOutcome
from app.replay import MOST_A_STEP, Plan, Plans, Step
from app.times import from_ms, to_ms
from tests.eventually import eventually
from tests.lab import KEYS, MUSEUM, ONE, SINK, VENUE, Lab, order

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


def dead_fetch(lab: Lab, number: int, reason: str = "order_missing", *, company_id: str = VENUE) -> None:
    lab.accept(order(number, company_id))
    lab.dead_letter(order(number, company_id), reason)


def dead_delivery(lab: Lab, number: int) -> None:
    lab.accept_and_fetch(order(number))
    lab.dead_letter_delivery(order(number))


def requeueing(lab: Lab, plans: Plans, *, rate: float = 1000, **conditions: Any) -> Plan:
    """Make a plan of the dead letters that match, whose jobs are gone."""
    lab.clear_queues()
    query = DeadQuery(until=from_ms(lab.now), **conditions)
    draft = plans.draft(plans.new_id(), query, count=4, rate=rate, selected="all", who="ann", why="venue is back")
    plans.make(draft)
    return current(plans, draft)


class TestDeadLetters:
    def test_each_dead_fetch_and_each_dead_delivery_is_revived(self, lab: Lab, plans: Plans) -> None:
        """The fetch in the backfill queue, and the delivery with new attempts and without a fetch."""
        dead_fetch(lab, 1)
        dead_delivery(lab, 2)
        plan = requeueing(lab, plans)
        assert (plan.state, plan.orders, plan.left) == ("open", 2, 2)

        step = feed(lab, plans, plan)

        assert (step.state, current(plans, plan).queued, lab.dead()) == ("done", 2, 0)
        assert lab.redis.zcard(KEYS.dead_deliveries) == 0
        assert lab.queued("backfill") == [order(1).order_id]
        assert lab.fetch_and_store(order(1)) == "fetched"
        assert lab.deliver(order=order(2)).attempts == 1
        assert (lab.field("generation", order(2)), lab.acquire_delivery(order(2))) == ("1", None)

    @pytest.mark.parametrize(
        ("conditions", "numbers"),
        [
            ({}, {1, 2, 3, 4}),
            ({"company_id": VENUE}, {1, 2, 3}),
            ({"reason": "order_missing"}, {1, 4}),
            ({"sink": SINK}, {3}),
            ({"since": from_ms(NOW + 1)}, set()),
        ],
    )
    def test_only_those_that_match_are_revived(
        self, lab: Lab, plans: Plans, conditions: dict[str, Any], numbers: set[int]
    ) -> None:
        dead_fetch(lab, 1)
        dead_fetch(lab, 2, "http_400")
        dead_delivery(lab, 3)
        dead_fetch(lab, 4, company_id=MUSEUM)

        feed(lab, plans, requeueing(lab, plans, **conditions))

        letters = DeadLetters(lab.redis).oldest_first(DeadQuery(until=from_ms(lab.now)))
        left = {letter.order_id for letter in letters}
        assert left == {order(number).order_id for number in {1, 2, 3, 4} - numbers}

    @pytest.mark.parametrize("meanwhile", ["requeued", "requeued and dead again", "discarded", "erased", "record gone"])
    @pytest.mark.parametrize("sink", ["", SINK])
    def test_what_is_no_longer_the_letter_that_was_counted_is_passed_over(
        self, lab: Lab, plans: Plans, meanwhile: str, sink: str
    ) -> None:
        (dead_delivery if sink else dead_fetch)(lab, 1)
        plan = requeueing(lab, plans)
        lab.later(1)
        if meanwhile.startswith("requeued"):
            lab.ledger.retry_delivery(ONE, sink) if sink else lab.request_fetch(queue="backfill")
        if meanwhile.endswith("again"):
            lab.dead_letter_delivery(ONE) if sink else lab.dead_letter(ONE)
        if meanwhile == "discarded":
            assert lab.ledger.discard(ONE, sink)
        if meanwhile == "erased":
            erasure = Erasure(lab.redis, order_days=400)
            traces = erasure.traces(ONE)
            assert traces is not None
            erasure.erase(traces)
        if meanwhile == "record gone":
            lab.redis.delete(KEYS.record(ONE))
        before = (lab.record(), lab.is_dead(), lab.pending(), lab.jobs("backfill"))

        feed(lab, plans, plan, 3000)

        ended = current(plans, plan)
        assert (ended.state, ended.queued, ended.passed) == ("done", 0, 1)
        assert (lab.record(), lab.is_dead(), lab.pending(), lab.jobs("backfill")) == before

    def test_one_that_dies_after_the_count_is_not_in_the_plan(self, lab: Lab, plans: Plans) -> None:
        dead_fetch(lab, 1)
        until = from_ms(lab.now)
        lab.later(1)
        dead_fetch(lab, 2)
        draft = plans.draft(plans.new_id(), DeadQuery(until=until), count=1, rate=1000, selected="", who="ann", why="")

        plans.make(draft)
        feed(lab, plans, draft, 3000)

        assert [lab.is_dead(order(number)) for number in (1, 2)] == [False, True]

    def test_the_audit_names_who_and_why_before_the_list_is_written(self, lab: Lab, plans: Plans) -> None:
        draft = plans.draft(
            plans.new_id(), DeadQuery(until=from_ms(NOW)), count=412, rate=4, selected="all", who="ann", why="back"
        )

        ((_, entry),) = audit.newest_first(lab.redis)
        assert entry == AuditEntry(what="requeue", plan=draft.id, who="ann", why="back", selected="all", orders=412)
        assert (draft.state, draft.fed_by, draft.left, feed(lab, plans, draft).state) == ("draft", "ops", 412, "draft")

    def test_two_makers_at_once_give_one_list(self, lab: Lab, plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second one makes the plan, and feeds half of it, while the first one still writes."""
        for number in (1, 2):
            dead_fetch(lab, number)
        draft = plans.draft(
            plans.new_id(), DeadQuery(until=from_ms(NOW)), count=2, rate=1, selected="", who="ann", why=""
        )
        second = Plans(lab.redis, event_days=90, clock=lab.clock)
        write = plans._write

        def is_overtaken(todo: str, entries: Iterable[str]) -> int:
            written = write(todo, entries)
            second.make(draft)
            feed(lab, second, draft)
            return written

        monkeypatch.setattr(plans, "_write", is_overtaken)
        plans.make(draft)

        now = current(plans, draft)
        assert (now.state, now.orders, now.left, now.queued) == ("open", 2, 1, 1)
        assert lab.redis.keys("ota:replay-todo:*") == [KEYS.replay_todo(draft.id).encode()]

    def test_a_draft_that_is_cancelled_is_not_made(self, lab: Lab, plans: Plans) -> None:
        dead_fetch(lab, 1)
        draft = plans.draft(
            plans.new_id(), DeadQuery(until=from_ms(NOW)), count=1, rate=1, selected="", who="ann", why=""
        )

        plans.resume(draft, "bob", "more of it", rate=2)
        cancelled = plans.cancel(draft, "bob", "wrong filter")
        plans.make(draft)

        assert not lab.redis.hexists(KEYS.replay(draft.id), "query"), "what was typed is not needed any more"
        noted = [(entry.what, entry.orders) for _, entry in audit.newest_first(lab.redis)]
        assert noted == [("cancel", 1), ("resume", 1), ("requeue", 1)]

        assert (cancelled.state, cancelled.left, current(plans, draft)) == ("cancelled", 1, cancelled)
        assert (list(plans.run(draft)), lab.is_dead(order(1))) == ([0], True)

    def test_none_left_when_it_is_made_is_done(self, lab: Lab, plans: Plans) -> None:
        plan = requeueing(lab, plans)

        assert (feed(lab, plans, plan).state, current(plans, plan).orders) == ("done", 0)


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


def feeder(lab: Lab, *arguments: str, **env: str) -> Process:
    command = [sys.executable, "-m", "app.cli", *arguments]
    log = lab.folder / f"feeder-{len(list(lab.folder.glob('feeder-*')))}.log"
    root = Path(__file__).parents[2]
    return Process.start(command, env=lab.env | env | {"PYTHONPATH": str(root)}, cwd=lab.folder, log=log)


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


@pytest.fixture
def dead(lab: Lab) -> Lab:
    """A lab of which every order is dead; no job waits."""
    lab.accept(*map(order, range(ORDERS)))
    for number in range(ORDERS):
        lab.dead_letter(order(number))
    lab.clear_queues()
    return lab


def ops(lab: Lab) -> Process:
    """Start a process of the ops page in which people may act."""
    return feeder(lab, "ops", OPS_TOKEN="token-to-read", OPS_ACT_TOKEN="a-token-to-act-by", OPS_PORT="0")


def draft(lab: Lab, rate: float) -> Plan:
    plans = Plans(lab.redis, event_days=90)
    query = DeadQuery(until=from_ms(lab.now))
    return plans.draft(plans.new_id(), query, count=ORDERS, rate=rate, selected="", who="ann", why="")


def is_done(lab: Lab, plan: Plan) -> bool:
    return current(Plans(lab.redis, event_days=90), plan).state == "done"


def test_two_processes_of_the_ops_page_share_a_plan_and_its_rate(dead: Lab) -> None:
    plan = draft(dead, rate=40)
    with ops(dead), ops(dead):
        eventually(lambda: is_done(dead, plan), 20, what="the plan is done")

    assert fed(dead, plan) == list(range(ORDERS))
    assert sorted(dead.queued("backfill")) == [order(number).order_id for number in range(ORDERS)]
    elapsed = [at - to_ms(plan.at) for at, _ in requests(dead, plan)]
    assert all(ms >= (count + 1) * 25 - 1 for count, ms in enumerate(elapsed))


def test_a_plan_of_a_command_is_fed_by_the_ops_page_from_its_resume_there_on(filled: Lab) -> None:
    plans = Plans(filled.redis, event_days=90)
    plan = file(plans, range(ORDERS), rate=1000)
    mine = draft(filled, rate=1000)
    with ops(filled):
        eventually(lambda: is_done(filled, mine), 20, what="the plan of the page is done")
        assert current(plans, plan).left == ORDERS

        plans.resume(plan, "ann", "bob has left", fed_by="ops")

        eventually(lambda: is_done(filled, plan), 10, what="the plan is done")
    noted = [(one.what, one.who, one.why) for _, one in audit.newest_first(filled.redis) if one.plan == plan.id]
    assert noted == [("resume", "ann", "bob has left"), ("replay", "ann@host", "a test")]


def test_while_redis_is_away_the_ops_page_waits_and_then_goes_on(own_valkey: Valkey, tmp_path: Path) -> None:
    with Redis.from_url(own_valkey.url, socket_timeout=5) as redis:
        lab = fill(Lab(redis, own_valkey.url, tmp_path))
        plan = file(Plans(redis, event_days=90), range(ORDERS), rate=40)
        Plans(redis, event_days=90).resume(plan, "ann", fed_by="ops")
        with ops(lab):
            plan_of(lab)
            own_valkey.kill()
            own_valkey.restart()

            eventually(lambda: is_done(lab, plan), 20, what="the plan is done")

        assert fed(lab, plan) == list(range(ORDERS))


def test_a_command_makes_and_feeds_a_plan_of_the_ops_page_too(dead: Lab) -> None:
    """No process of the ops page runs, or people may not act there any more."""
    plan = draft(dead, rate=1)

    resumed = dead.run_command("replays", "resume", plan.id, "--rate", "5000")

    assert (resumed.code, resumed.out) == (
        0,
        f"Plan {plan.id} done: {ORDERS} dead letters, {ORDERS} queued, 0 already waiting.\n",
    )
    assert fed(dead, plan) == list(range(ORDERS))


def test_after_a_kill_the_ops_page_goes_on_with_the_plan(dead: Lab) -> None:
    plan = draft(dead, rate=40)
    with ops(dead) as first:
        plan_of(dead)
        os.kill(first.pid, signal.SIGKILL)
        first.wait(20)
    assert 0 < len(fed(dead, plan)) < ORDERS

    with ops(dead):
        eventually(lambda: is_done(dead, plan), 20, what="the plan is done")

    assert fed(dead, plan) == list(range(ORDERS))
    assert sorted(dead.queued("backfill")) == [order(number).order_id for number in range(ORDERS)]
