"""How revisions reach the sinks: one at a time, in order, each sink for itself, without a getOrder."""

from __future__ import annotations

from typing import Any

import pytest

from app.deployment import Deployment
from app.erasure import Erasure
from app.ledger import policy
from app.ledger.history import WorkerCrashed
from app.ledger.redis import Redis
from app.ledger.rq_jobs import sink_queue
from app.ledger.work import DeliveryOutcome, Failure, WorkerEnd
from app.replay import Plans
from tests.lab import KEYS, ONE, START, WORKER, Lab, order

SHOP_QUEUE = sink_queue("shop")


def store(bare: Lab, *versions: int) -> Lab:
    """Let the order settle and be fetched, once for each version."""
    for version in versions:
        bare.accept_and_fetch(answer=version)
    return bare


def crashed(lab: Lab) -> list[str]:
    """Return the workers that the history shows to have died in a delivery to the sink."""
    return [one.worker for one in lab.history() if isinstance(one, WorkerCrashed) and one.sink == "shop"]


@pytest.fixture
def fetched(shop: Lab) -> Lab:
    """One fetched order, one sink."""
    return store(shop, 1)


@pytest.fixture
def two_sinks(redis_client: Redis) -> Lab:
    return Lab(redis_client, sinks=("shop", "mail"), now=START)


class TestOrder:
    def test_a_new_revision_is_delivered_once(self, fetched: Lab) -> None:
        assert (fetched.due_in(), fetched.delivery_in(), fetched.days_kept()) == (None, policy.GRACE / 1000, {None})
        assert fetched.queued(SHOP_QUEUE) == [ONE.order_id]
        delivery = fetched.start_delivery()
        assert (delivery.sink, delivery.revision, delivery.attempts, delivery.raw) == ("shop", 1, 1, b"1")

        fetched.complete_delivery(delivery)

        assert fetched.acquire_delivery() is None
        assert (fetched.field("shop:revision"), fetched.delivery_in(), fetched.days_kept()) == ("1", None, {400})
        assert [name for name in fetched.record() if name.startswith("shop:")] == ["shop:revision"]

    def test_a_newer_revision_replaces_those_not_yet_delivered(self, fetched: Lab) -> None:
        store(fetched, 2, 3)

        delivery = fetched.deliver()

        assert (delivery.revision, delivery.raw, fetched.acquire_delivery()) == (3, b"3", None)

    @pytest.mark.parametrize("outcome", ["succeeded", "dead"])
    def test_a_revision_stored_during_a_delivery_comes_next(self, fetched: Lab, outcome: DeliveryOutcome) -> None:
        """Its job found the sink busy with this order, so the end of the delivery pushes another."""
        delivery = fetched.start_delivery()
        fetched.accept()
        fetched.fetch_and_store(answer=2, worker="b")
        assert fetched.acquire_delivery(worker="b") is None
        fetched.clear_queues()

        fetched.complete_delivery(delivery, outcome)

        assert fetched.queued(SHOP_QUEUE) == [ONE.order_id]
        assert (fetched.field("shop:dead"), fetched.deliver().revision) == (None, 2)
        assert (fetched.acquire_delivery(), fetched.days_kept()) == (None, {400})

    def test_revisions_share_a_job_that_waits(self, fetched: Lab) -> None:
        store(fetched, 2, 3)

        assert len(fetched.jobs(SHOP_QUEUE)) == 1

    def test_two_sinks_get_an_order_at_the_same_time(self, two_sinks: Lab) -> None:
        store(two_sinks, 1)

        first, second = (two_sinks.start_delivery(sink=sink, worker=sink) for sink in two_sinks.sinks)

        assert (first.sink, second.sink, first.revision, second.revision) == ("shop", "mail", 1, 1)
        assert two_sinks.acquire_delivery(sink="mail", worker="another") is None
        for one in (first, second):
            assert two_sinks.days_kept() == {None}
            two_sinks.complete_delivery(one, worker=one.sink)
        assert (two_sinks.pending(), two_sinks.days_kept()) == (0, {400})

    def test_pools_with_the_same_sinks_deliver_it_once(self, fetched: Lab) -> None:
        fetched.clear_queues()
        fetched.later(policy.GRACE / 1000)
        other = Lab(fetched.redis, sinks=fetched.sinks, now=fetched.now)

        assert (fetched.dispatch(), other.dispatch(), len(fetched.jobs(SHOP_QUEUE))) == (1, 0, 1)
        delivery = fetched.start_delivery(worker="a")
        assert other.acquire_delivery(worker="b") is None
        fetched.complete_delivery(delivery, worker="a")
        assert (other.acquire_delivery(worker="b"), fetched.pending()) == (None, 0)

    def test_a_worker_that_was_frozen_past_its_lease_ends_the_delivery_of_no_other(self, fetched: Lab) -> None:
        """It did its work, though: the sink has the revision, and the failure of the other changes that no more."""
        frozen = fetched.start_delivery(worker="frozen")
        fetched.later(policy.DELIVERY_LEASE / 1000)
        other = fetched.start_delivery(worker="other")

        fetched.complete_delivery(frozen, worker="frozen")
        fetched.complete_delivery(other, "dead", worker="other")

        assert (fetched.field("shop:revision"), fetched.field("shop:dead"), fetched.pending()) == ("1", None, 0)

    def test_a_job_that_was_lost_leaves_nothing_in_the_record(self, fetched: Lab) -> None:
        delivery = fetched.start_delivery()
        fetched.later(policy.DELIVERY_LEASE / 1000)
        assert fetched.dispatch() == 1
        fetched.clear_queues()

        fetched.complete_delivery(delivery)

        assert [name for name in fetched.record() if name.startswith("shop:")] == ["shop:revision"]

    def test_a_refetch_puts_a_delivery_that_its_clock_lost_back_there(self, fetched: Lab) -> None:
        """`orders explain` advises it. The content is the same."""
        fetched.redis.delete(KEYS.deliveries("shop"))

        store(fetched, 1)

        assert (fetched.delivery_in(), fetched.deliver().revision) == (policy.GRACE / 1000, 1)

    def test_a_sink_that_does_not_want_the_revision_is_done_with_it(self, fetched: Lab) -> None:
        """That says nothing of whether it works."""
        fetched.accept_and_fetch(order(2), 2)
        fetched.deliver("retry", order(2), failure="ValueError")

        fetched.deliver("skipped", failure="status Issued")

        assert (fetched.field("shop:revision"), fetched.delivery_in(), fetched.days_kept()) == ("1", None, {400})
        assert [name for name in fetched.record() if name.startswith("shop:")] == ["shop:revision"]
        assert fetched.redis.exists(KEYS.sink_failing("shop"))
        store(fetched, 2)
        assert fetched.deliver().revision == 2

    def test_the_ids_of_jobs_never_come_twice(self, two_sinks: Lab) -> None:
        ids: list[str] = []

        def taken() -> None:
            ids.extend(job for sink in two_sinks.sinks for job in two_sinks.jobs(sink_queue(sink)))
            two_sinks.clear_queues()

        store(two_sinks, 1)
        taken()
        two_sinks.later(policy.GRACE / 1000)
        two_sinks.dispatch()
        taken()
        delivery = two_sinks.start_delivery()
        store(two_sinks, 2)
        taken()
        two_sinks.complete_delivery(delivery)
        two_sinks.later(1000)
        two_sinks.dispatch()
        taken()

        assert len(ids) == len(set(ids)) == 7


class TestFailing:
    def test_a_failing_sink_does_not_delay_another(self, two_sinks: Lab) -> None:
        store(two_sinks, 1)
        two_sinks.deliver("retry", wait=300)

        two_sinks.deliver(sink="mail")

        assert (two_sinks.delivery_in(), two_sinks.delivery_in(sink="mail")) == (300, None)
        assert two_sinks.days_kept() == {None}

    def test_a_retry_of_a_delivery_causes_no_getorder(self, fetched: Lab) -> None:
        for attempts in (1, 2, 3):
            assert fetched.deliver("retry", wait=300).attempts == attempts
            assert (fetched.acquire_delivery(), fetched.delivery_in()) == (None, 300)
            fetched.later(300)
            assert (fetched.dispatch(), fetched.try_start()) == (1, "nothing")

        assert fetched.field("fencing_token") == "1"

    def test_repeated_jobs_of_a_sink_that_takes_none_back_off(self, fetched: Lab) -> None:
        waits = []
        for _ in range(8):
            fetched.later(fetched.delivery_in() or 0)
            assert fetched.dispatch() == 1
            waits.append(fetched.delivery_in())

        assert waits == [120, 240, 480, 960, 1920, 3600, 3600, 3600]
        fetched.acquire_delivery()
        assert fetched.field("shop:enqueues") is None

    def test_a_dead_delivery_keeps_the_order_until_new_content_comes(self, fetched: Lab) -> None:
        fetched.deliver("dead")

        assert (fetched.acquire_delivery(), fetched.delivery_in(), fetched.days_kept()) == (None, None, {None})
        assert fetched.field("shop:dead") == "reason"
        assert fetched.redis.zrange(KEYS.dead_deliveries, 0, -1) == [f"{ONE.member} shop".encode()]

        store(fetched, 2)

        assert (fetched.field("shop:dead"), fetched.redis.zcard(KEYS.dead_deliveries)) == (None, 0)
        assert (fetched.deliver().attempts, fetched.acquire_delivery(), fetched.days_kept()) == (1, None, {400})

    @pytest.mark.parametrize("outcome", ["succeeded", "retry", "dead"])
    def test_a_repeated_complete_counts_once(self, fetched: Lab, outcome: DeliveryOutcome) -> None:
        delivery = fetched.deliver(outcome)
        record, history = fetched.record(), fetched.redis.lrange(KEYS.history(ONE), 0, -1)

        fetched.complete_delivery(delivery, outcome)

        assert (fetched.record(), fetched.redis.lrange(KEYS.history(ONE), 0, -1)) == (record, history)

    def test_a_repeated_acquire_is_the_same_attempt(self, fetched: Lab) -> None:
        first, again = fetched.start_delivery(worker="a"), fetched.start_delivery(worker="a")

        assert (again.revision, again.attempts, again.crashes) == (first.revision, 1, 0)

    def test_an_acquire_repeated_after_a_newer_revision_is_the_first_attempt_of_that(self, fetched: Lab) -> None:
        fetched.start_delivery(worker="a")
        fetched.accept()
        fetched.fetch_and_store(answer=2, worker="b")

        again = fetched.start_delivery(worker="a")

        assert (again.revision, again.attempts, again.crashes) == (2, 1, 0)

    @pytest.mark.parametrize("outcome", ["postponed", "disabled", "retry"])
    def test_after_a_replay_during_a_delivery_attempts_are_counted_from_one(
        self, fetched: Lab, outcome: DeliveryOutcome
    ) -> None:
        delivery = fetched.start_delivery()
        plans = Plans(fetched.redis, event_days=90, clock=fetched.clock)
        plan = plans.file([(ONE.member, None)], rate=100, sinks=("shop",))
        fetched.later(1)
        plans.feed(plan)

        fetched.complete_delivery(delivery, outcome)

        Deployment(fetched.redis).enable("shop")
        fetched.later(5)
        assert fetched.start_delivery().attempts == 1


class TestAFlushDuringADelivery:
    @pytest.mark.parametrize("outcome", ["succeeded", "skipped", "dead"])
    def test_another_content_under_the_same_number_is_still_delivered(
        self, fetched: Lab, outcome: DeliveryOutcome
    ) -> None:
        """Revisions are counted anew, and the order has changed since its delivery began."""
        delivery = fetched.start_delivery(worker="a")
        fetched.redis.flushdb()
        store(fetched, 2)

        fetched.complete_delivery(delivery, outcome, worker="a")

        assert (fetched.delivery_in(), fetched.days_kept()) == (policy.GRACE / 1000, {None})
        assert fetched.deliver().raw == b"2"

    def test_the_same_content_is_delivered_once(self, fetched: Lab) -> None:
        delivery = fetched.start_delivery(worker="a")
        fetched.redis.flushdb()
        store(fetched, 1)

        fetched.complete_delivery(delivery, worker="a")

        assert (fetched.acquire_delivery(), fetched.delivery_in()) == (None, None)


class TestASinkThatFailsForEverything:
    """`ota:sink-failing:<sink>`: since when no delivery has succeeded."""

    def failing(self, lab: Lab) -> tuple[int, int, int, str] | None:
        """Return the seconds since the first failure, orders, attempts and error; None while the latest succeeded."""
        found: Any = lab.redis.hgetall(KEYS.sink_failing("shop"))
        fields = {name.decode(): value.decode() for name, value in found.items()}
        if not fields:
            return None
        since = (lab.now - int(fields["since"])) // 1000
        return since, int(fields["orders"]), int(fields["attempts"]), fields["error"]

    def fail(self, lab: Lab, number: int, failure: str = "ValueError at shop.py:7") -> None:
        lab.deliver("retry", order(number), reason="ValueError", failure=failure, wait=300)

    def test_it_is_known_from_the_first_failure_until_a_delivery_succeeds(self, shop: Lab) -> None:
        for number in (1, 2, 3):
            shop.accept_and_fetch(order(number), number)
        self.fail(shop, 1)
        shop.later(300)
        self.fail(shop, 1)
        self.fail(shop, 2, "KeyError at shop.py:9")

        assert self.failing(shop) == (300, 2, 3, "KeyError at shop.py:9")
        assert (shop.field("shop:error"), shop.field("shop:error", order(2))) == (
            "ValueError at shop.py:7",
            "KeyError at shop.py:9",
        )

        shop.deliver(order=order(3))
        assert self.failing(shop) is None
        shop.later(300)
        shop.deliver()
        assert shop.field("shop:error") is None

    def test_a_later_attempt_of_one_bad_order_says_nothing_of_the_sink(self, shop: Lab) -> None:
        shop.accept_and_fetch(order(1), 1)
        shop.accept_and_fetch(order(2), 2)
        self.fail(shop, 1)
        shop.deliver(order=order(2))
        shop.later(300)

        self.fail(shop, 1)

        assert self.failing(shop) is None

    def test_a_sink_that_ends_its_worker_fails_too(self, fetched: Lab) -> None:
        fetched.start_delivery()
        fetched.ledger.release_worker(WORKER, "killed")

        assert self.failing(fetched) == (0, 1, 1, "it ended its worker, or ran too long")

    @pytest.mark.parametrize("end", ["discard", "retry", "new content", "erased"])
    def test_the_only_order_that_failed_no_longer_counts_once_it_is_resolved(self, fetched: Lab, end: str) -> None:
        fetched.deliver("dead", failure="ValueError at shop.py:7")
        assert self.failing(fetched) == (0, 1, 1, "ValueError at shop.py:7")

        if end == "discard":
            fetched.ledger.discard(ONE, "shop")
        elif end == "retry":
            fetched.ledger.retry_delivery(ONE, "shop")
        elif end == "new content":
            store(fetched, 2)
        else:
            erasure = Erasure(fetched.redis, order_days=400)
            traces = erasure.traces(ONE)
            assert traces is not None
            erasure.erase(traces)

        assert self.failing(fetched) is None

    def test_a_broken_key_of_it_stops_no_delivery(self, fetched: Lab) -> None:
        fetched.overwrite(KEYS.sink_failing("shop"), b"of another program")
        fetched.deliver("retry", wait=1)
        fetched.overwrite(KEYS.sink_failing("shop"), b"of another program")
        fetched.later(1)

        fetched.deliver()

        assert fetched.field("shop:revision") == "1"

    def test_what_waits_for_its_next_attempt_can_be_tried_at_once(self, fetched: Lab) -> None:
        fetched.deliver("retry", wait=7200)
        assert fetched.acquire_delivery() is None

        assert fetched.ledger.retry_delivery(ONE, "shop")

        assert (fetched.delivery_in(), fetched.start_delivery().attempts) == (0, 1)
        assert not fetched.ledger.retry_delivery(ONE, "shop"), "it is being delivered"

    def test_what_waits_cannot_be_discarded(self, fetched: Lab) -> None:
        fetched.deliver("retry", wait=7200)

        assert not fetched.ledger.discard(ONE, "shop")


class TestBesideAFetch:
    """A delivery does not wait for the fetch of the next settlement."""

    def test_an_order_deleted_upstream_is_still_delivered_as_it_was(self, fetched: Lab) -> None:
        fetched.deliver("retry", wait=300)
        fetched.accept()

        assert fetched.fail_fetch("deleted_upstream", worker="b") == "deleted_upstream"

        assert (fetched.due_in(), fetched.delivery_in(), fetched.days_kept()) == (None, 300, {None})
        fetched.later(300)
        assert (fetched.dispatch(), fetched.deliver().raw) == (1, b"1")

    @pytest.mark.parametrize("failure", ["dead", "deferred", "retry", "client_error"])
    def test_a_delivery_does_not_wait_for_a_fetch_that_failed(self, fetched: Lab, failure: Failure) -> None:
        fetched.deliver("retry", wait=5)
        fetched.accept()
        fetched.fail_fetch(failure, wait=4500)
        assert (fetched.acquire_delivery(), fetched.delivery_in()) == (None, 5)

        fetched.later(5)

        assert (fetched.dispatch(), fetched.deliver().revision, fetched.acquire_delivery()) == (1, 1, None)
        assert (fetched.due_in(), fetched.is_dead()) == ((None, True) if failure == "dead" else (4495, False))
        assert fetched.days_kept() == {None}

    def test_a_delivery_does_not_wait_for_a_recheck(self, fetched: Lab) -> None:
        """Unsettled content is a revision too."""
        fetched.deliver()
        fetched.accept()
        fetched.store_fetch(fetched.start_fetch(), 2, recheck=4500)
        fetched.deliver("retry", wait=5)
        assert fetched.acquire_delivery() is None

        fetched.later(5)

        assert (fetched.dispatch(), fetched.deliver().revision) == (1, 2)
        assert (fetched.acquire_delivery(), fetched.try_start(), fetched.due_in()) == (None, "nothing", 4495)

    def test_content_that_an_older_fetch_stores_for_a_dead_order_is_delivered(self, fetched: Lab) -> None:
        """Also when the worker that stored it dies before it calls the sink: the order is due."""
        fetched.deliver()
        fetched.accept()
        older = fetched.start_fetch(worker="a")
        fetched.accept()
        fetched.fail_fetch("dead", worker="b")

        assert fetched.store_fetch(older, 2, worker="a") == "pending"

        fetched.later(fetched.delivery_in() or 0)
        assert (fetched.dispatch(), fetched.due_in()) == (1, None)
        assert (fetched.deliver().revision, fetched.acquire_delivery()) == (2, None)
        assert (fetched.is_dead(), fetched.due_in(), fetched.days_kept()) == (True, None, {None})

    def test_content_that_an_older_fetch_stores_for_a_discarded_order_is_kept_until_it_is_delivered(
        self, fetched: Lab
    ) -> None:
        fetched.deliver()
        fetched.accept()
        older = fetched.start_fetch(worker="a")
        fetched.accept()
        fetched.fail_fetch("dead", worker="b")
        fetched.ledger.discard(ONE)
        assert fetched.days_kept() == {400}

        fetched.store_fetch(older, 2, worker="a")

        assert (fetched.delivery_in(), fetched.days_kept()) == (policy.GRACE / 1000, {None})
        assert (fetched.deliver().revision, fetched.days_kept()) == (2, {400})


class TestCrashes:
    @pytest.mark.parametrize("end", ["killed", "ended"])
    def test_deliveries_of_lost_workers_are_due_at_once_and_kills_count(self, fetched: Lab, end: WorkerEnd) -> None:
        for number in range(policy.CRASHES_ALLOWED + 1):
            delivery = fetched.start_delivery(worker=f"w{number}")
            crashes = number if end == "killed" else 0
            assert (delivery.revision, delivery.attempts, delivery.crashes) == (1, number + 1, crashes)
            assert (fetched.ledger.release_worker(f"w{number}", end), fetched.delivery_in()) == (ONE, 0)
        lost = [f"w{number}" for number in range(policy.CRASHES_ALLOWED + 1)] if end == "killed" else []
        assert crashed(fetched) == lost

    def test_the_end_of_a_lease_counts_as_a_crash(self, fetched: Lab) -> None:
        fetched.acquire_delivery(worker="a")
        fetched.later(policy.DELIVERY_LEASE / 1000)

        assert fetched.start_delivery(worker="b").crashes == 1
        assert crashed(fetched) == ["a"]

    @pytest.mark.parametrize("reset", ["a failure", "new content", "retry_delivery"])
    def test_crashes_are_reset_by(self, fetched: Lab, reset: str) -> None:
        fetched.acquire_delivery(worker="a")
        fetched.ledger.release_worker("a", "killed")
        delivery = fetched.start_delivery(worker="b")
        if reset == "a failure":
            fetched.complete_delivery(delivery, "retry", worker="b")
        elif reset == "new content":
            fetched.ledger.release_worker("b", "killed")
            store(fetched, 2)
        else:
            fetched.complete_delivery(delivery, "dead", worker="b")
            fetched.ledger.retry_delivery(ONE, "shop")
        fetched.later(5)

        assert fetched.start_delivery(worker="c").crashes == 0
