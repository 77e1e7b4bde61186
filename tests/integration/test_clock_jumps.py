"""Clocks that are wrong: each time in the ledger is the word of the machine that wrote it, and none may cost an order.

The longest delay: what waits comes back as much later as a clock was set back, and never later than FARTHEST.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from app.health import CLOCKS_APART, same_clock
from app.intake.recorder import Entry
from app.ledger import keys, policy
from app.ledger.rate_limit import LONGEST_RETRY, WINDOW, Budget, Limits, NotNow, Slot
from app.ledger.rq_jobs import LIVE, queue
from tests.integration.ledger_model.parts import LEASE
from tests.integration.ledger_model.stage import ONE, SAME_ID, Stage, staged

HOUR, DAY = 3600, 86400
GRACE = policy.GRACE / 1000
STEP = 60


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Stage]:
    with staged(redis_client, "shop") as opened:
        yield opened


def lost_job(stage: Stage) -> None:
    stage.settle()


def dead_machine(stage: Stage) -> None:
    stage.settle()
    stage.fetch()


def failed_fetch(stage: Stage) -> None:
    stage.settle()
    stage.fail(stage.fetch(), "again", wait=300)


def failed_hand_on(stage: Stage) -> None:
    stage.settle()
    stage.bring_home(1)
    hand_on = stage.hand()
    assert hand_on is not None
    stage.handed(hand_on, "again", wait=300)


WAITS: dict[Callable[[Stage], None], float] = {
    lost_job: GRACE,
    dead_machine: LEASE / 1000,
    failed_fetch: 300,
    failed_hand_on: 300,
}


def seconds_until_it_is_done(stage: Stage) -> float:
    """Let time pass, tickers tick and workers work until the order is home and handed on; return how long it took."""
    began = stage.now
    for number in range(10 * HOUR // STEP):
        stage.tick()
        while job := stage.redis.lpop("rq:queue:live"):
            assert job
            worker = f"new-{number}"
            what, fetch = stage.ledger.begin(ONE, worker, stage.now)
            if fetch is not None:
                stage.store(fetch, 1, worker)
            while what in {"fetch", "hand"} and (hand_on := stage.hand(worker)) is not None:
                stage.handed(hand_on, worker=worker)
        if stage.due_in() is None:
            return (stage.now - began) / 1000
        stage.later(STEP)
    raise AssertionError("it never came back")


class TestAClockThatWasAhead:
    """It wrote moments of the future; now it is right again, or another machine goes on."""

    def test_an_event_that_it_heard_is_fetched_at_once(self, stage: Stage) -> None:
        stage.later(DAY)
        stage.settle()
        stage.later(-DAY)

        assert stage.begin() == "fetch"

    @pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
    def test_what_it_left_behind_comes_back_after_the_jump_and_its_wait(
        self, stage: Stage, wait: Callable[[Stage], None]
    ) -> None:
        stage.later(HOUR)
        wait(stage)
        stage.redis.delete("rq:queue:live")
        stage.later(-HOUR)

        assert seconds_until_it_is_done(stage) <= HOUR + WAITS[wait] + STEP

    @pytest.mark.parametrize("days", [1, 400])
    @pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
    def test_what_lies_further_ahead_than_any_wait_comes_back_after_grace(
        self, stage: Stage, wait: Callable[[Stage], None], days: int
    ) -> None:
        stage.later(days * DAY)
        wait(stage)
        stage.redis.delete("rq:queue:live")
        stage.later(-days * DAY)

        assert seconds_until_it_is_done(stage) <= GRACE + STEP

    def test_no_wait_of_ours_is_taken_for_a_wrong_clock(self, stage: Stage) -> None:
        longest = [policy.TRIES[-1] * 1.2, policy.LOOKS[-1] * 60 * 1.2, policy.LONGEST_WAIT / 1000]

        assert max(*longest, (LONGEST_RETRY + policy.BREAKER_LONGEST) / 1000) * 1000 < policy.FARTHEST

        stage.settle()
        stage.fail(stage.fetch(), "again", wait=max(longest))
        stage.redis.delete("rq:queue:live")
        stage.tick()
        assert stage.due_in() == max(longest)

    def test_one_tick_mends_no_more_than_it_pushes(self, stage: Stage) -> None:
        """A ledger full of wrong moments does not hold Redis up."""
        stage.later(DAY)
        stage.settle(ONE)
        stage.settle(SAME_ID)
        stage.later(-DAY)
        stage.redis.config_resetstat()

        stage.tick()
        assert {stage.due_in(ONE), stage.due_in(SAME_ID)} == {GRACE}
        stage.redis.config_resetstat()
        stage.tick()

        calls = {name: stats["calls"] for name, stats in stage.redis.info("commandstats").items()}
        assert {name: calls.get(f"cmdstat_{name}", 0) for name in ("zrevrangebyscore", "hmget", "zadd")} == {
            "zrevrangebyscore": 1,
            "hmget": 0,
            "zadd": 0,
        }

    def test_a_fetch_under_way_while_it_is_set_back_is_stored_and_not_repeated(self, stage: Stage) -> None:
        stage.later(DAY)
        stage.settle()
        fetch = stage.fetch()
        stage.later(-DAY)

        assert stage.tick() == 0
        assert stage.store(fetch, 1) == "hand"

        stage.redis.delete("rq:queue:live")
        assert stage.begin("other") != "fetch"

    def test_its_word_does_not_outlast_what_comes_now(self, stage: Stage) -> None:
        stage.later(DAY)
        stage.settle()
        stage.later(-DAY)

        stage.settle()

        assert stage.field("heard") == str(stage.now)

    def test_it_does_not_empty_the_stream_of_events(self, stage: Stage) -> None:
        for _ in range(150):
            stage.settle()
        stage.later(365 * DAY)
        stage.settle()

        assert stage.redis.xlen(keys.EVENTS) == 151

    def test_events_older_than_event_days_leave_the_stream(self, stage: Stage) -> None:
        for number in range(250):
            stage.redis.xadd(keys.EVENTS, {"company": "old"}, id=f"{number + 1}-0")

        stage.settle()

        assert stage.redis.xlen(keys.EVENTS) < 150


class TestAClockThatIsSetOn:
    def test_fetches_under_way_are_repeated_once_and_the_newest_answer_stays(self, stage: Stage) -> None:
        """By the new time their leases have ended: one getOrder more an order, and no more."""
        stage.settle()
        old = stage.fetch("old")
        stage.later(HOUR)

        assert stage.tick() == 1
        new = stage.fetch("new")
        assert (stage.store(new, 2, "new"), stage.store(old, 1, "old")) == ("hand", "refused")

        assert (stage.field("digest"), stage.begin("third")) == ("2", "hand")


class TestMachinesThatDiffer:
    """Machine B is five minutes ahead of machine A."""

    APART = 300

    def test_an_order_that_waits_is_fetched_no_more_often(self, stage: Stage) -> None:
        """B's ticker finds it due too early; A's worker knows that its time has not come, and B's fetches it then."""
        stage.settle()
        stage.redis.delete("rq:queue:live")
        stage.fail(stage.fetch("a"), "again", wait=240)

        for _ in range(20):
            stage.later(1 + self.APART)
            assert stage.tick() <= 1
            stage.later(-self.APART)
            assert stage.waiting() <= 1
            stage.redis.delete("rq:queue:live")
            assert stage.begin("a") == "nothing"

        stage.later(self.APART)
        assert stage.begin("b") == "fetch"


class TestIds:
    def test_no_job_id_comes_twice_though_a_millisecond_does(self, stage: Stage) -> None:
        """RQ deletes the hash with the first job of an id, and skips the second in silence."""
        stage.settle()
        stage.later(GRACE)
        for _ in range(3):
            assert stage.tick() == 1
            assert stage.begin() in {"fetch", "held"}
            stage.ledger.nudge([ONE], stage.now)

        ids = queue(LIVE, stage.redis).job_ids
        assert len(ids) == len(set(ids)) == 4


class TestLateNews:
    """An event that waited in a spool is recorded late: it is no news of an order that was heard of since."""

    def late(self, stage: Stage, status: str, received: int) -> None:
        stage.record(Entry("", *ONE, status, f"CM-{status}", "current", f"request-{status}", "", received))

    def test_it_is_owed_a_fetch_and_does_not_replace_a_newer_word(self, stage: Stage) -> None:
        self.late(stage, "Issued", stage.now)
        self.late(stage, "Error", stage.now - 60_000)

        told = [stage.field(name) for name in ("said", "reference", "request", "heard", "wanted")]
        assert told == ["Issued", "CM-Issued", "request-Issued", str(stage.now), "2"]

    def test_it_replaces_an_older_word(self, stage: Stage) -> None:
        self.late(stage, "Error", stage.now - 120_000)
        self.late(stage, "Issued", stage.now - 60_000)

        assert (stage.field("said"), stage.field("heard")) == ("Issued", str(stage.now - 60_000))

    def test_an_order_that_is_new_was_heard_of_when_it_was_received(self, stage: Stage) -> None:
        self.late(stage, "Issued", stage.now - 60_000)

        assert (stage.field("first"), stage.field("heard")) == (str(stage.now - 60_000),) * 2
        assert stage.due_in() == GRACE

    def test_what_was_fetched_since_is_known_better(self, stage: Stage) -> None:
        """The status told last decides what a 404 means."""
        self.late(stage, "Draft", stage.now)
        stage.later(60)
        stage.bring_home(1)
        stage.later(60)
        self.late(stage, "Error", stage.now - 90_000)

        assert stage.fetch().known == "Issued"


class TestBudget:
    """What was written about a key by a clock that was ahead does not close it once the clock is right."""

    NOW = 1_800_000_000_000
    LIMITS = Limits(concurrency=2, backfill_concurrency=1, requests_per_window=3, slot_lease=60_000)

    @pytest.fixture
    def budget(self, redis_client: Redis) -> Budget:
        return Budget(redis_client, "a key", "/a/company", self.LIMITS)

    def take(self, budget: Budget, now: int) -> Slot | NotNow:
        clock = itertools.chain([now, now], itertools.repeat(now + policy.SLOT_PATIENCE))
        return budget.take("live", lambda: next(clock))

    def taken(self, budget: Budget, now: int) -> Slot:
        slot = self.take(budget, now)
        assert isinstance(slot, Slot), slot
        return slot

    @pytest.mark.parametrize("how", ["retry_after", "breaker", "probe", "slots", "window"])
    def test_the_key_works_again_at_once(self, budget: Budget, how: str) -> None:
        ahead = self.NOW + DAY * 1000
        if how == "retry_after":
            budget.give(self.taken(budget, ahead), "answered", ahead, retry_after=5)
        if how in {"breaker", "probe"}:
            budget.give(self.taken(budget, ahead), "fault", ahead)
        if how == "probe":
            self.taken(budget, ahead + policy.BREAKER_FIRST)
        if how == "slots":
            for _ in range(2):
                self.taken(budget, ahead)
        if how == "window":
            for _ in range(3):
                budget.give(self.taken(budget, ahead), "answered", ahead)
        assert isinstance(self.take(budget, ahead + 1), NotNow)

        assert isinstance(self.take(budget, self.NOW), Slot)

    def test_a_breaker_that_it_opened_can_open_again(self, budget: Budget) -> None:
        ahead = self.NOW + DAY * 1000
        budget.give(self.taken(budget, ahead), "fault", ahead)

        until, opened = budget.give(self.taken(budget, self.NOW), "fault", self.NOW)

        assert opened
        assert self.NOW < until <= self.NOW + policy.BREAKER_LONGEST

    def test_the_longest_retry_after_of_a_clock_that_is_minutes_ahead_holds(self, budget: Budget) -> None:
        ahead = self.NOW + WINDOW
        budget.give(self.taken(budget, ahead), "answered", ahead, retry_after=LONGEST_RETRY / 1000)

        assert isinstance(self.take(budget, self.NOW), NotNow)

    def test_a_job_that_waits_for_a_slot_gives_up_when_its_clock_is_set_back(self, budget: Budget) -> None:
        for _ in range(2):
            self.taken(budget, self.NOW)
        clock = itertools.chain([self.NOW] * 2, itertools.repeat(self.NOW - 120_000))

        assert isinstance(budget.take("live", lambda: next(clock)), NotNow)


@pytest.mark.parametrize("apart", [CLOCKS_APART + 1, -CLOCKS_APART - 1, 0.0])
def test_readiness_tells_of_clocks_that_differ(apart: float) -> None:
    check = same_clock(1_800_000_000 + apart, 1_800_000_000)

    assert (check.ok, check.fatal) == (apart == 0, False)
