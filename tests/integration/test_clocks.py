"""The dispatcher's times, and clocks that are wrong.

The time of the Redis server dates everything, so a machine whose clock is hours off harms nothing. Where the clock of
Redis itself was ahead, what waits is due as much later, and never later than FARTHEST.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis

from app.dev.processes import Process
from app.errors import ConnectionFault, Throttled
from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.ledger import DISPATCH_LIMIT, Ledger
from app.ledger.rate_limit import Limits, RateLimiter
from app.ledger.rq_jobs import BACKFILL, LIVE, queue
from app.ledger.work import Dispatched
from tests.eventually import eventually
from tests.integration.desk import VENUE, open_desk, order
from tests.integration.ledger_scenario import LEASE, ONE, SAME_ID, Scenario

HOUR, DAY = 3600, 86400
GRACE = policy.GRACE / 1000
STEP = 60


def orders(number: int) -> list[OrderKey]:
    return [OrderKey(ONE.company_id, f"00000000-0000-4000-8000-{one:012}") for one in range(number)]


class TestDispatcher:
    def test_a_lost_job_is_replaced_after_grace(self, scenario: Scenario) -> None:
        scenario.settle()
        scenario.redis.delete("rq:queue:live")

        scenario.later(GRACE - 0.001)
        assert scenario.dispatch() == 0
        scenario.later(0.001)
        assert scenario.dispatch() == 1

        assert (scenario.waiting(), scenario.start()) == (1, "fetch")

    def test_the_wait_doubles_up_to_an_hour_until_a_fetch_starts(self, scenario: Scenario) -> None:
        scenario.settle()
        waits = []
        for _ in range(8):
            scenario.later(scenario.due_in() or 0)
            assert scenario.dispatch() == 1
            waits.append((scenario.due_in() or 0) / GRACE)
        assert waits == [1, 2, 4, 8, 16, 30, 30, 30]

        scenario.fail(scenario.fetch(), "retry", wait=5)
        scenario.later(5)
        scenario.dispatch()

        assert scenario.due_in() == GRACE

    def test_two_dispatchers_at_the_same_time_enqueue_one_job_per_order(
        self, scenario: Scenario, redis_url: str
    ) -> None:
        scenario.ledger.request_fetch(orders(300), queue="backfill", reason="replay")
        scenario.later(GRACE)
        together, enqueued = threading.Barrier(2), []

        def dispatch() -> None:
            with Redis.from_url(redis_url) as client:
                ledger = Ledger(client, order_days=400, fetch_lease=LEASE, clock=scenario.clock)
                client.ping()
                together.wait(10)
                enqueued.append(ledger.dispatch_due().enqueued)

        threads = [threading.Thread(target=dispatch) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert (sum(enqueued), scenario.waiting(BACKFILL)) == (300, 600)

    def test_one_dispatch_enqueues_more_orders_than_one_script_call(self, scenario: Scenario) -> None:
        scenario.ledger.request_fetch(orders(DISPATCH_LIMIT + 1), queue="backfill", reason="replay")
        scenario.later(GRACE)

        assert scenario.dispatch() == DISPATCH_LIMIT + 1

    def test_an_order_with_a_broken_record_stops_no_other(self, scenario: Scenario) -> None:
        """It is counted and its time moved; those before and after it get their jobs."""
        scenario.ledger.request_fetch(orders(5), queue="live", reason="replay")
        scenario.redis.delete("rq:queue:live")
        scenario.redis.set(keys.record(orders(5)[2]), "of another program")
        scenario.later(GRACE)

        assert scenario.ledger.dispatch_due() == Dispatched(5, 4, 1)
        assert scenario.waiting() == 4
        assert scenario.ledger.dispatch_due() == Dispatched(0, 0, 0)

    def test_only_pending_orders_of_a_lost_job_are_due_at_once(self, scenario: Scenario) -> None:
        scenario.settle()
        scenario.settle(SAME_ID)
        scenario.fetch_and_store(1, order=SAME_ID)

        scenario.ledger.release_worker("unknown", "ended", [ONE, SAME_ID])

        assert (scenario.due_in(ONE), scenario.due_in(SAME_ID)) == (0, None)

    def test_a_due_order_that_is_not_pending_leaves_due(self, scenario: Scenario) -> None:
        scenario.settle()
        scenario.fetch_and_store(1)
        scenario.redis.zadd(keys.DUE, {ONE.member: scenario.now})

        assert (scenario.dispatch(), scenario.due_in()) == (0, None)

    def test_no_job_id_is_used_twice_within_a_millisecond(self, scenario: Scenario) -> None:
        """RQ deletes the hash with the first job of an id, and skips the second without a word."""
        scenario.settle()
        scenario.later(GRACE)
        for _ in range(3):
            assert scenario.dispatch() == 1
            assert scenario.start() in {"fetch", "held"}
            scenario.ledger.release_worker("unknown", "ended", [ONE])

        ids = queue(LIVE, scenario.redis).job_ids
        assert len(ids) == len(set(ids)) == 4


def lost_job(shop: Scenario) -> None:
    shop.settle()


def dead_machine(shop: Scenario) -> None:
    shop.settle()
    shop.fetch()


def failed_fetch(shop: Scenario) -> None:
    shop.settle()
    shop.fail(shop.fetch(), "retry", wait=300)


def failed_delivery(shop: Scenario) -> None:
    shop.settle()
    shop.fetch_and_store(1)
    shop.deliver("retry", wait=300)


WAITS: dict[Callable[[Scenario], None], float] = {
    lost_job: GRACE,
    dead_machine: LEASE / 1000,
    failed_fetch: 300,
    failed_delivery: 300,
}


def seconds_until_delivered(shop: Scenario) -> float:
    """Let time pass until the order is fetched and delivered; return how long it took."""
    started = shop.now
    for number in range(10 * HOUR // STEP):
        shop.dispatch()
        while shop.redis.lpop("rq:queue:live"):
            worker = f"new-{number}"
            outcome, fetch = shop.ledger.start_fetch(ONE, worker)
            if fetch is not None:
                shop.store(fetch, 1, worker)
            while outcome in {"fetch", "deliver"} and (delivery := shop.acquire(worker)) is not None:
                shop.complete(delivery, worker=worker)
        if shop.due_in() is None:
            return (shop.now - started) / 1000
        shop.later(STEP)
    raise AssertionError("the order stays due")


class TestARedisWhoseClockWasAhead:
    """It wrote times of the future; now it is right again, or a failover led to a server that is."""

    @pytest.mark.parametrize(
        ("ahead", "longest"), [(HOUR, HOUR), (DAY, GRACE), (400 * DAY, GRACE)], ids=["an hour", "a day", "400 days"]
    )
    @pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
    def test_what_waits_is_done_after_the_jump_and_its_wait_or_after_grace(
        self, shop: Scenario, wait: Callable[[Scenario], None], ahead: float, longest: float
    ) -> None:
        """Times farther ahead than any wait of ours are replaced by GRACE."""
        shop.later(ahead)
        wait(shop)
        shop.redis.delete("rq:queue:live")
        shop.later(-ahead)

        own_wait = WAITS[wait] if ahead == HOUR else 0
        assert seconds_until_delivered(shop) <= longest + own_wait + STEP

    def test_an_event_recorded_ahead_is_fetched_at_once(self, shop: Scenario) -> None:
        shop.later(DAY)
        shop.settle()
        shop.later(-DAY)

        assert shop.start() == "fetch"

    def test_the_leases_of_a_killed_worker_delay_nothing(self, shop: Scenario) -> None:
        """They end a day ahead; what makes the order due earlier meanwhile must not wait for them."""
        shop.later(DAY)
        shop.settle()
        shop.fetch("killed")
        shop.later(-DAY)
        shop.ledger.release_worker("another", "ended", [ONE])
        assert shop.fetch_and_store(1) == "deliver"

        shop.later(DAY)
        shop.delivery("killed")
        shop.later(-DAY)
        shop.settle()
        assert shop.fetch_and_store(2) == "deliver"
        assert shop.deliver().revision == 2

    def test_no_wait_of_ours_counts_as_a_wrong_clock(self, shop: Scenario) -> None:
        longest = [policy.RETRY_WAITS[-1] * 1.2, policy.RECHECK_WAITS[-1] * 60 * 1.2, policy.LONGEST_WAIT / 1000]
        assert max(*longest, (policy.LONGEST_RETRY + policy.BREAKER_LONGEST) / 1000) * 1000 < policy.FARTHEST

        shop.settle()
        shop.fail(shop.fetch(), "retry", wait=max(longest))
        shop.redis.delete("rq:queue:live")
        shop.dispatch()

        assert shop.due_in() == max(longest)

    def test_a_fetch_that_runs_while_the_clock_is_set_back_is_stored_and_not_repeated(self, shop: Scenario) -> None:
        shop.later(DAY)
        shop.settle()
        fetch = shop.fetch()
        shop.later(-DAY)

        assert shop.dispatch() == 0
        assert shop.store(fetch, 1) == "deliver"

        shop.redis.delete("rq:queue:live")
        assert shop.start("other") != "fetch"

    @pytest.mark.parametrize("limit", ["retry_after", "breaker", "probe", "permits", "window"])
    def test_an_api_key_works_again_at_once(self, shop: Scenario, limit: str) -> None:
        limits = Limits(concurrency=2, backfill_concurrency=1, requests_per_window=3, permit_lease=60_000)
        limiter = RateLimiter(shop.redis, "a key", "/a/company", limits, clock=shop.clock)
        shop.later(DAY)
        if limit == "retry_after":
            limiter.permit("live").failed(Throttled("throttled", http_status=429, retry_after=3000))
        if limit in {"breaker", "probe"}:
            limiter.permit("live").failed(ConnectionFault("unauthorized", http_status=401))
        if limit == "probe":
            shop.later(policy.BREAKER_FIRST / 1000 + 1)
            limiter.permit("live")
        if limit == "permits":
            for _ in range(2):
                limiter.permit("live")
        if limit == "window":
            for _ in range(3):
                with limiter.permit("live"):
                    pass
        shop.later(-DAY)

        limiter.permit("live")


def test_after_a_jump_forward_running_fetches_are_repeated_once_and_the_newest_answer_is_stored(shop: Scenario) -> None:
    """By the new time their leases have ended: one more getOrder per order, and no more."""
    shop.settle()
    old = shop.fetch("old")
    shop.later(HOUR)

    assert shop.dispatch() == 1
    new = shop.fetch("new")
    assert (shop.store(new, 2, "new"), shop.store(old, 1, "old")) == ("deliver", "refused")

    assert (shop.field("digest"), shop.start("third")) == ("2", "deliver")


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
    """Its pool works like any other: orders start at once, waits are as long, and it does not count as silent."""
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
