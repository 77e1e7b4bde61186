"""When orders are looked at again, how long they are kept, and whose they are: each test is a sentence."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from redis import Redis

from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.ledger import DISPATCH_LIMIT, Ledger
from app.ledger.rq_jobs import BACKFILL, LIVE, queue
from app.ledger.work import Dispatched
from tests.integration.ledger_model.parts import LEASE
from tests.integration.ledger_model.stage import ONE, SAME_ID, Stage, staged

GRACE = policy.GRACE / 1000
LEASE_SECONDS = LEASE / 1000
SENT = "2026-11-22T10:00:00.1234567Z"


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Stage]:
    with staged(redis_client) as opened:
        yield opened


def many(number: int) -> list[OrderKey]:
    return [OrderKey(ONE.company_id, f"00000000-0000-4000-8000-{order:012}") for order in range(number)]


class TestClock:
    def test_a_lost_job_comes_back_after_grace(self, stage: Stage) -> None:
        stage.settle()
        stage.redis.delete("rq:queue:live")

        stage.later(GRACE - 0.001)
        assert stage.dispatch() == 0
        stage.later(0.001)
        assert stage.dispatch() == 1

        assert (stage.waiting(), stage.start()) == (1, "fetch")

    def test_the_wait_doubles_while_nobody_begins_and_no_longer_than_an_hour(self, stage: Stage) -> None:
        stage.settle()
        waits = []
        for _ in range(8):
            stage.later(stage.due_in() or 0)
            assert stage.dispatch() == 1
            waits.append((stage.due_in() or 0) / GRACE)

        assert waits == [1, 2, 4, 8, 16, 30, 30, 30]

    def test_a_begin_sets_the_wait_back(self, stage: Stage) -> None:
        stage.settle()
        for _ in range(3):
            stage.later(stage.due_in() or 0)
            stage.dispatch()
        stage.fail(stage.fetch(), "retry", wait=5)

        stage.later(5)
        stage.dispatch()

        assert stage.due_in() == GRACE

    def test_two_tickers_at_the_same_moment_push_one_job_an_order(self, stage: Stage, redis_url: str) -> None:
        stage.ledger.request_fetch(many(300), queue="backfill", reason="replay")
        stage.later(GRACE)
        together, pushed = threading.Barrier(2), []

        def tick() -> None:
            with Redis.from_url(redis_url) as client:
                ledger = Ledger(client, order_days=400, fetch_lease=LEASE, clock=stage.clock)
                client.ping()
                together.wait(10)
                pushed.append(ledger.dispatch_due().enqueued)

        threads = [threading.Thread(target=tick) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert (sum(pushed), stage.waiting(BACKFILL)) == (300, 600)

    def test_one_tick_pushes_more_orders_than_one_script_looks_at(self, stage: Stage) -> None:
        orders = [
            OrderKey(ONE.company_id, f"00000000-0000-4000-8000-{number:012}") for number in range(DISPATCH_LIMIT + 1)
        ]
        stage.ledger.request_fetch(orders, queue="backfill", reason="replay")
        stage.later(GRACE)

        assert stage.dispatch() == DISPATCH_LIMIT + 1

    def test_a_nudge_hurries_what_is_owed_and_nothing_else(self, stage: Stage) -> None:
        stage.settle()
        stage.settle(SAME_ID)
        stage.bring(1, order=SAME_ID)

        stage.ledger.release_worker("nobody", "ended", [ONE, SAME_ID])

        assert (stage.due_in(ONE), stage.due_in(SAME_ID)) == (0, None)

    def test_a_ticker_forgets_what_nobody_is_owed(self, stage: Stage) -> None:
        stage.settle()
        stage.bring(1)
        stage.redis.zadd(keys.DUE, {ONE.member: stage.now})

        assert (stage.dispatch(), stage.due_in()) == (0, None)


class TestKeeping:
    def test_an_order_has_an_end_only_while_nothing_is_owed(self, stage: Stage) -> None:
        stage.settle()
        assert stage.days_kept() == {None}
        fetch = stage.fetch()
        assert stage.days_kept() == {None}
        stage.store(fetch, 1)
        assert stage.days_kept() == {400}

        stage.settle()
        assert stage.days_kept() == {None}

    def test_its_end_is_counted_from_the_last_change(self, stage: Stage) -> None:
        stage.settle()
        stage.bring(1)
        self.age(stage)

        stage.settle()
        stage.bring(2)

        assert stage.days_kept() == {400}

    def test_a_duplicate_is_no_change(self, stage: Stage) -> None:
        stage.hear(SENT)
        stage.bring(1)
        self.age(stage)

        assert stage.hear(SENT) == "duplicate"

        assert stage.days_kept() == {10}

    def age(self, stage: Stage) -> None:
        """Let 390 days pass for the keys of the order: their time is the server's."""
        for name in (keys.record(ONE), keys.history(ONE), keys.content(ONE)):
            stage.redis.pexpire(name, 10 * policy.DAY)


class TestTwoCompanies:
    """Two companies may have an order of the same orderId: nothing of one reaches the other."""

    def test_each_is_fetched_for_its_own_settlement(self, stage: Stage) -> None:
        assert [stage.settle(ONE), stage.settle(SAME_ID)] == ["queued", "queued"]

        assert stage.bring(1, order=ONE) == "fetched"

        assert (stage.field("fetched_generation", SAME_ID), stage.due_in(SAME_ID)) == (None, GRACE)
        assert stage.bring(7, order=SAME_ID) == "fetched"
        assert (stage.field("digest", ONE), stage.field("digest", SAME_ID)) == ("1", "7")

    def test_the_same_event_of_the_other_company_is_no_duplicate(self, stage: Stage) -> None:
        assert [stage.hear(SENT, ONE), stage.hear(SENT, SAME_ID)] == ["queued", "queued"]

    def test_each_has_its_own_jobs(self, stage: Stage) -> None:
        stage.settle(ONE)
        stage.settle(SAME_ID)

        ids = queue(LIVE, stage.redis).job_ids

        assert [one[2:75] for one in ids] == [f"{order.company_id}-{order.order_id}" for order in (ONE, SAME_ID)]

    def test_each_has_its_own_dead_letter(self, stage: Stage) -> None:
        for order in (ONE, SAME_ID):
            stage.settle(order)
            stage.fail(stage.fetch(order=order), "dead", order=order)

        stage.settle(ONE)

        assert (stage.is_dead(ONE), stage.is_dead(SAME_ID)) == (False, True)

    def test_each_has_its_own_worker(self, stage: Stage) -> None:
        for worker, order in (("a", ONE), ("b", SAME_ID)):
            stage.settle(order)
            stage.fetch(worker, order)

        assert stage.ledger.release_worker("b", "killed") == SAME_ID

        assert (stage.due_in(ONE), stage.due_in(SAME_ID)) == (LEASE_SECONDS, 0)


def test_an_order_whose_record_another_program_overwrote_stops_no_other(stage: Stage) -> None:
    """It is put off and counted; those before and after it get their jobs."""
    orders = many(5)
    stage.ledger.request_fetch(orders, queue="live", reason="replay")
    stage.redis.delete("rq:queue:live")
    stage.redis.set(keys.record(orders[2]), "of another program")
    stage.later(GRACE)

    assert stage.ledger.dispatch_due() == Dispatched(5, 4, 1)
    assert stage.redis.llen("rq:queue:live") == 4
    assert stage.ledger.dispatch_due() == Dispatched(0, 0, 0)
