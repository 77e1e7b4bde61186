"""The dispatcher's times, and clocks that are wrong.

The time of the Redis server dates everything, so a machine whose clock is hours off harms nothing. Where the clock of
Redis itself was ahead, what waits is due as much later, and never later than FARTHEST.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from app.dev.processes import Process
from app.errors import ConnectionFault, Throttled
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.ledger import DISPATCH_LIMIT, Ledger
from app.ledger.rate_limit import Limits, RateLimiter
from app.ledger.redis import Redis
from app.ledger.rq_jobs import BACKFILL, sink_queue
from app.ledger.work import Dispatched
from tests.eventually import eventually
from tests.lab import KEYS, LEASE, ONE, SAME_ID, VENUE, Lab, order

HOUR, DAY = 3600, 86400
GRACE = policy.GRACE / 1000
STEP = 60


def orders(number: int) -> list[OrderKey]:
    return list(map(order, range(number)))


class TestDispatcher:
    def test_a_lost_job_is_replaced_after_grace(self, bare: Lab) -> None:
        bare.accept()
        bare.clear_queues()

        bare.later(GRACE - 0.001)
        assert bare.dispatch() == 0
        bare.later(0.001)
        assert bare.dispatch() == 1

        assert (len(bare.queued()), bare.try_start()) == (1, "fetch")

    def test_the_wait_doubles_up_to_an_hour_until_a_fetch_starts(self, bare: Lab) -> None:
        bare.accept()
        waits = []
        for _ in range(8):
            bare.later(bare.due_in() or 0)
            assert bare.dispatch() == 1
            waits.append((bare.due_in() or 0) / GRACE)
        assert waits == [1, 2, 4, 8, 16, 30, 30, 30]

        bare.fail_fetch("retry", wait=5)
        bare.later(5)
        bare.dispatch()

        assert bare.due_in() == GRACE

    def test_two_dispatchers_at_the_same_time_enqueue_one_job_per_order(self, bare: Lab, redis_url: str) -> None:
        """Of more orders than one script call takes."""
        bare.request_fetch(*orders(DISPATCH_LIMIT + 1), queue="backfill")
        bare.later(GRACE)
        together, enqueued = threading.Barrier(2), []

        def dispatch() -> None:
            with Redis.from_url(redis_url) as client:
                ledger = Ledger(client, order_days=400, fetch_lease=LEASE, clock=bare.clock)
                client.ping()
                together.wait(10)
                enqueued.append(ledger.dispatch_due().enqueued)

        with ThreadPoolExecutor(2) as threads:
            for _ in range(2):
                threads.submit(dispatch)

        assert (sum(enqueued), len(bare.queued(BACKFILL))) == (DISPATCH_LIMIT + 1, 2 * DISPATCH_LIMIT + 2)

    def test_an_order_with_a_broken_record_stops_no_other(self, bare: Lab) -> None:
        """It is counted and its time moved; those before and after it get their jobs."""
        bare.request_fetch(*orders(5))
        bare.clear_queues()
        bare.redis.set(KEYS.record(orders(5)[2]), "of another program")
        bare.later(GRACE)

        assert bare.ledger.dispatch_due() == Dispatched(5, 4, 1)
        assert len(bare.queued()) == 4
        assert bare.ledger.dispatch_due() == Dispatched(0, 0, 0)

    def test_only_pending_orders_of_a_lost_job_are_due_at_once(self, bare: Lab) -> None:
        bare.accept()
        bare.accept_and_fetch(SAME_ID)

        bare.ledger.release_worker("unknown", "ended", [ONE, SAME_ID])

        assert (bare.due_in(ONE), bare.due_in(SAME_ID)) == (0, None)

    def test_a_due_order_that_is_not_pending_leaves_due(self, bare: Lab) -> None:
        bare.accept_and_fetch()
        bare.redis.zadd(KEYS.due, {ONE.member: bare.now})

        assert (bare.dispatch(), bare.due_in()) == (0, None)


WAITS: Final[dict[str, tuple[float, Callable[[Lab], object]]]] = {
    "lost job": (GRACE, Lab.accept),
    "dead machine": (LEASE / 1000, lambda shop: (shop.accept(), shop.start_fetch())),
    "failed fetch": (300, lambda shop: (shop.accept(), shop.fail_fetch("retry", wait=300))),
    "failed delivery": (300, lambda shop: (shop.accept_and_fetch(), shop.deliver("retry", wait=300))),
}
"""What waits, the seconds it waits, and the steps that lead to it."""


def seconds_until_delivered(shop: Lab) -> float:
    """Let time pass until the order is fetched and delivered; return how long it took."""
    started = shop.now
    for number in range(10 * HOUR // STEP):
        shop.dispatch()
        worker = f"new-{number}"
        while shop.redis.lpop("rq:queue:ota-live"):
            _, fetch, _ = shop.ledger.start_fetch(ONE, worker)
            if fetch is not None:
                shop.store_fetch(fetch, 1, worker=worker)
        while shop.redis.lpop(f"rq:queue:ota-{sink_queue('shop')}"):
            if (delivery := shop.acquire_delivery(worker=worker)) is not None:
                shop.complete_delivery(delivery, worker=worker)
        if not shop.pending():
            return (shop.now - started) / 1000
        shop.later(STEP)
    raise AssertionError("the order stays due")


class TestARedisWhoseClockWasAhead:
    """It wrote times of the future; now it is right again, or a failover led to a server that is."""

    @pytest.mark.parametrize(
        ("ahead", "longest"), [(HOUR, HOUR), (DAY, GRACE), (400 * DAY, GRACE)], ids=["an hour", "a day", "400 days"]
    )
    @pytest.mark.parametrize("wait", WAITS)
    def test_what_waits_is_done_after_wait_or_grace(self, shop: Lab, wait: str, ahead: float, longest: float) -> None:
        """Times farther ahead than any wait of ours are replaced by GRACE."""
        seconds, steps = WAITS[wait]
        shop.later(ahead)
        steps(shop)
        shop.clear_queues()
        shop.later(-ahead)

        assert seconds_until_delivered(shop) <= longest + (seconds if ahead == HOUR else 0) + STEP

    def test_the_leases_of_a_killed_worker_delay_nothing(self, shop: Lab) -> None:
        """They end a day ahead; what makes the order due earlier meanwhile must not wait for them."""
        shop.later(DAY)
        shop.accept()
        shop.start_fetch(worker="killed")
        shop.later(-DAY)
        shop.ledger.release_worker("another", "ended", [ONE])
        assert shop.fetch_and_store(answer=1) == "fetched"

        shop.later(DAY)
        shop.start_delivery(worker="killed")
        shop.later(-DAY)
        assert shop.accept_and_fetch(answer=2) == "fetched"
        assert shop.deliver().revision == 2

    def test_an_event_replaces_what_one_from_the_future_wrote(self, shop: Lab) -> None:
        shop.later(DAY)
        shop.accept(status="Draft")
        shop.later(-DAY)
        shop.accept(status="Issued")

        assert shop.fields("last_event_status", "last_event_at") == ["Issued", str(shop.now)]

    def test_no_wait_of_ours_counts_as_a_wrong_clock(self, shop: Lab) -> None:
        longest = [policy.RETRY_WAITS[-1] * 1.2, policy.RECHECK_WAITS[-1] * 60 * 1.2, policy.LONGEST_WAIT / 1000]
        longest.append(policy.POSTPONED_LONGEST / 1000)
        assert max(*longest, (policy.LONGEST_RETRY + policy.BREAKER_LONGEST) / 1000) * 1000 < policy.FARTHEST

        shop.accept()
        shop.fail_fetch("retry", wait=max(longest))
        shop.clear_queues()
        shop.dispatch()

        assert shop.due_in() == max(longest)

    def test_a_fetch_that_runs_while_the_clock_is_set_back_is_stored_and_not_repeated(self, shop: Lab) -> None:
        shop.later(DAY)
        shop.accept()
        fetch = shop.start_fetch()
        shop.later(-DAY)

        assert shop.dispatch() == 0
        assert shop.store_fetch(fetch, 1) == "fetched"

        shop.clear_queues()
        assert shop.try_start(worker="other") != "fetch"

    @pytest.mark.parametrize("limit", ["retry_after", "breaker", "probe", "permits", "window"])
    def test_an_api_key_works_again_at_once(self, shop: Lab, limit: str) -> None:
        limits = Limits(concurrency=2, backfill_concurrency=1, requests_per_window=9, permit_lease=60_000)
        limiter = RateLimiter(shop.redis, "a key", "/a/company", limits, clock=shop.clock)
        shop.later(DAY)
        if limit == "retry_after":
            limiter.permit("live").failed(Throttled("throttled", http_status=429, retry_after=3000))
        elif limit == "window":
            for _ in range(limits.requests_per_window):
                with limiter.permit("live"):
                    pass
        elif limit == "permits":
            for _ in range(limits.concurrency):
                limiter.permit("live")
        else:
            for _ in range(policy.BREAKER_FAILURES):
                limiter.permit("live").failed(ConnectionFault("unauthorized", http_status=401))
        if limit == "probe":
            shop.later(policy.BREAKER_FIRST / 1000 + 1)
            limiter.permit("live")
        shop.later(-DAY)

        limiter.permit("live")


def test_after_a_jump_forward_running_fetches_are_repeated_once_and_the_newest_answer_is_stored(shop: Lab) -> None:
    """By the new time their leases have ended: one more getOrder per order, and no more."""
    shop.accept()
    old = shop.start_fetch(worker="old")
    shop.later(HOUR)

    assert shop.dispatch() == 1
    new = shop.start_fetch(worker="new")
    assert (shop.store_fetch(new, 2, worker="new"), shop.store_fetch(old, 1, worker="old")) == ("fetched", "refused")

    assert (shop.field("digest"), shop.try_start(worker="third")) == ("2", "nothing")


OFF = """
import time, sys
real = time.time
time.time = lambda: real() + {hours} * 3600
from app.cli.main import main
sys.argv = ["ota-receiver", "worker"]
main()
"""


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_machine_whose_clock_is_off_harms_nothing(lab: Lab, redis_client: Redis, tmp_path: Path, hours: int) -> None:
    """Its pool works like any other: orders start at once, waits are as long, and it does not count as silent."""
    lab.accept(order(1))
    env = lab.env | {"WORKERS": "1", "BACKFILL_WORKERS": "0", "LOG_FORMAT": "json"}
    log = tmp_path / "log"
    with Process.start([sys.executable, "-c", OFF.format(hours=hours)], env=env, cwd=tmp_path, log=log) as pool:
        pool.wait_for_line("fetch.deferred", within=15)
        record = eventually(lambda: redis_client.hgetall(KEYS.record(order(1))), what="the record")
        (heartbeat,) = redis_client.hvals(KEYS.pools)
        now = redis_client.time()[0] * 1000
        due = redis_client.zscore(KEYS.due, order(1).member)

        assert abs(json.loads(heartbeat)["at"] - now) < 5_000
        assert due is not None
        assert 0 < due - now < 10_000
        assert abs(int(record[b"last_event_at"]) - now) < 20_000
        assert lab.run_command("health", "--role", "worker", "--ready").code == 0
        assert VENUE not in lab.run_command("status").err
