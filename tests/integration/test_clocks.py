"""Clocks that are wrong: the time of the Redis server dates everything, so a machine that is hours off harms nothing.

Where the clock of Redis itself was ahead, what waits comes back as much later, and never later than FARTHEST.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from app.dev.processes import Process
from app.errors import ConnectionFault, Throttled
from app.intake.envelope import OrderProcessed
from app.ledger import keys, policy
from app.ledger.rate_limit import Limits, RateLimiter
from app.ledger.rq_jobs import LIVE, queue
from tests.eventually import eventually
from tests.integration.desk import VENUE, open_desk, order
from tests.integration.ledger_model.parts import LEASE
from tests.integration.ledger_model.stage import ONE, Stage, staged

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
    stage.fail(stage.fetch(), "retry", wait=300)


def failed_delivery(stage: Stage) -> None:
    stage.settle()
    stage.bring(1)
    delivery = stage.acquire()
    assert delivery is not None
    stage.complete(delivery, "retry", wait=300)


WAITS: dict[Callable[[Stage], None], float] = {
    lost_job: GRACE,
    dead_machine: LEASE / 1000,
    failed_fetch: 300,
    failed_delivery: 300,
}


def seconds_until_it_is_done(stage: Stage) -> float:
    """Let time pass until the order is fetched and delivered; return how long it took."""
    started = stage.now
    for number in range(10 * HOUR // STEP):
        stage.dispatch()
        while stage.redis.lpop("rq:queue:live"):
            worker = f"new-{number}"
            what, fetch = stage.ledger.start_fetch(ONE, worker)
            if fetch is not None:
                stage.store(fetch, 1, worker)
            while what in {"fetch", "deliver"} and (delivery := stage.acquire(worker)) is not None:
                stage.complete(delivery, worker=worker)
        if stage.due_in() is None:
            return (stage.now - started) / 1000
        stage.later(STEP)
    raise AssertionError("it never came back")


class TestARedisWhoseClockWasAhead:
    """It dated things into the future; now it is right again, or a failover went to a server that is."""

    def test_an_event_that_it_recorded_is_fetched_at_once(self, stage: Stage) -> None:
        stage.later(DAY)
        stage.settle()
        stage.later(-DAY)

        assert stage.start() == "fetch"

    @pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
    def test_what_waits_comes_back_after_the_jump_and_its_wait(
        self, stage: Stage, wait: Callable[[Stage], None]
    ) -> None:
        stage.later(HOUR)
        wait(stage)
        stage.redis.delete("rq:queue:live")
        stage.later(-HOUR)

        assert seconds_until_it_is_done(stage) <= HOUR + WAITS[wait] + STEP

    @pytest.mark.parametrize("days", [1, 400])
    @pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
    def test_what_lies_farther_ahead_than_any_wait_comes_back_after_grace(
        self, stage: Stage, wait: Callable[[Stage], None], days: int
    ) -> None:
        stage.later(days * DAY)
        wait(stage)
        stage.redis.delete("rq:queue:live")
        stage.later(-days * DAY)

        assert seconds_until_it_is_done(stage) <= GRACE + STEP

    def test_no_wait_of_ours_counts_as_a_wrong_clock(self, stage: Stage) -> None:
        longest = [policy.RETRY_WAITS[-1] * 1.2, policy.RECHECK_WAITS[-1] * 60 * 1.2, policy.LONGEST_WAIT / 1000]
        assert max(*longest, (policy.LONGEST_RETRY + policy.BREAKER_LONGEST) / 1000) * 1000 < policy.FARTHEST

        stage.settle()
        stage.fail(stage.fetch(), "retry", wait=max(longest))
        stage.redis.delete("rq:queue:live")
        stage.dispatch()

        assert stage.due_in() == max(longest)

    def test_a_fetch_under_way_while_it_is_set_back_is_stored_and_not_repeated(self, stage: Stage) -> None:
        stage.later(DAY)
        stage.settle()
        fetch = stage.fetch()
        stage.later(-DAY)

        assert stage.dispatch() == 0
        assert stage.store(fetch, 1) == "deliver"

        stage.redis.delete("rq:queue:live")
        assert stage.start("other") != "fetch"

    @pytest.mark.parametrize("how", ["retry_after", "breaker", "probe", "permits", "window"])
    def test_an_api_key_works_again_at_once(self, stage: Stage, how: str) -> None:
        limits = Limits(concurrency=2, backfill_concurrency=1, requests_per_window=3, permit_lease=60_000)
        limiter = RateLimiter(stage.redis, "a key", "/a/company", limits, clock=stage.clock)
        stage.later(DAY)
        if how == "retry_after":
            limiter.permit("live").failed(Throttled("throttled", http_status=429, retry_after=3000))
        if how in {"breaker", "probe"}:
            limiter.permit("live").failed(ConnectionFault("unauthorized", http_status=401))
        if how == "probe":
            stage.later(policy.BREAKER_FIRST / 1000 + 1)
            limiter.permit("live")
        if how == "permits":
            for _ in range(2):
                limiter.permit("live")
        if how == "window":
            for _ in range(3):
                with limiter.permit("live"):
                    pass
        stage.later(-DAY)

        limiter.permit("live")


class TestARedisWhoseClockIsSetOn:
    def test_fetches_under_way_are_repeated_once_and_the_newest_answer_stays(self, stage: Stage) -> None:
        """By the new time their leases have ended: one getOrder more an order, and no more."""
        stage.settle()
        old = stage.fetch("old")
        stage.later(HOUR)

        assert stage.dispatch() == 1
        new = stage.fetch("new")
        assert (stage.store(new, 2, "new"), stage.store(old, 1, "old")) == ("deliver", "refused")

        assert (stage.field("digest"), stage.start("third")) == ("2", "deliver")


def test_events_older_than_event_days_leave_the_stream(stage: Stage) -> None:
    for number in range(250):
        stage.redis.xadd(keys.EVENTS, {"company": "old"}, id=f"{number + 1}-0")

    stage.settle()

    assert stage.redis.xlen(keys.EVENTS) < 150


OFF = """
import time, sys
real = time.time
time.time = lambda: real() + {hours} * 3600
from app.cli.main import main
sys.argv = ["ota-receiver", "worker"]
main()
"""


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_machine_whose_clock_is_hours_off_harms_nothing(
    redis_client: Redis, redis_url: str, tmp_path: Path, hours: int
) -> None:
    """Its pool works like any other: orders are started at once, waits are as long, and nobody takes it for silent."""
    desk = open_desk(redis_client, redis_url, tmp_path)
    desk.hear(order(1))
    env = desk.env | {"WORKERS": "1", "BACKFILL_WORKERS": "0", "LOG_FORMAT": "json"}
    log = tmp_path / "log"
    with Process.start([sys.executable, "-c", OFF.format(hours=hours)], env=env, cwd=tmp_path, log=log) as pool:
        pool.wait_for_line("fetch.retry_scheduled", within=15)
        record = eventually(lambda: redis_client.hgetall(keys.record(order(1))), what="the record")
        (heartbeat,) = redis_client.hvals(keys.POOLS)
        now = redis_client.time()[0] * 1000
        due = redis_client.zscore(keys.DUE, order(1).member)

        assert abs(json.loads(heartbeat)["at"] - now) < 5_000
        assert due is not None
        assert 0 < due - now < 10_000
        assert abs(int(record[b"last_event_at"]) - now) < 20_000
        assert desk.run("health", "--role", "worker").code == 0
        assert VENUE not in desk.run("status").err


class TestIds:
    def test_no_job_id_comes_twice_though_a_millisecond_does(self, stage: Stage) -> None:
        """RQ deletes the hash with the first job of an id, and skips the second in silence."""
        stage.settle()
        stage.later(GRACE)
        for _ in range(3):
            assert stage.dispatch() == 1
            assert stage.start() in {"fetch", "held"}
            stage.ledger.release_worker("nobody", "ended", [ONE])

        ids = queue(LIVE, stage.redis).job_ids
        assert len(ids) == len(set(ids)) == 4


class TestLateEvents:
    """An event that waited in a spool is recorded late: an older event does not replace a newer one."""

    def late(self, stage: Stage, status: str, received: int) -> None:
        stage.record(OrderProcessed(*ONE, status, f"CM-{status}", "", "current", f"request-{status}", received))

    def test_it_is_fetched_and_does_not_replace_a_newer_event(self, stage: Stage) -> None:
        self.late(stage, "Issued", stage.now)
        self.late(stage, "Error", stage.now - 60_000)

        known = [
            stage.field(name)
            for name in ("last_event_status", "reference", "request_id", "last_event_at", "generation")
        ]
        assert known == ["Issued", "CM-Issued", "request-Issued", str(stage.now), "2"]

    def test_it_replaces_an_older_event(self, stage: Stage) -> None:
        self.late(stage, "Error", stage.now - 120_000)
        self.late(stage, "Issued", stage.now - 60_000)

        assert (stage.field("last_event_status"), stage.field("last_event_at")) == ("Issued", str(stage.now - 60_000))

    def test_a_new_order_is_dated_by_when_its_event_was_received(self, stage: Stage) -> None:
        self.late(stage, "Issued", stage.now - 60_000)

        assert (stage.field("first_at"), stage.field("last_event_at")) == (str(stage.now - 60_000),) * 2
        assert stage.due_in() == GRACE

    def test_what_was_fetched_since_is_known_better(self, stage: Stage) -> None:
        """The status named last decides what a 404 means."""
        self.late(stage, "Draft", stage.now)
        stage.later(60)
        stage.bring(1)
        stage.later(60)
        self.late(stage, "Error", stage.now - 90_000)

        assert stage.fetch().known_status == "Issued"
