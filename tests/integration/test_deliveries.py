"""How revisions reach the sinks (invariant 6): one at a time, in order, each sink for itself, without a getOrder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from app.ledger import keys, policy
from app.ledger.work import DeliveryOutcome, Failure
from tests.integration.ledger_scenario import ONE, Scenario, open_scenario


def store(scenario: Scenario, *versions: int) -> Scenario:
    """Let the order settle and be fetched, once for each version."""
    for version in versions:
        scenario.settle()
        scenario.fetch_and_store(version)
    return scenario


@pytest.fixture
def fetched(shop: Scenario) -> Scenario:
    """One fetched order, one sink."""
    return store(shop, 1)


@pytest.fixture
def two_sinks(redis_client: Redis) -> Iterator[Scenario]:
    """One fetched order, two sinks."""
    with open_scenario(redis_client, "shop", "mail") as scenario:
        yield store(scenario, 1)


class TestOrder:
    def test_a_new_revision_is_delivered_once(self, fetched: Scenario) -> None:
        assert (fetched.due_in(), fetched.days_kept()) == (policy.DELIVERY_LEASE / 1000, {None})
        delivery = fetched.delivery()
        assert (delivery.sink, delivery.revision, delivery.attempts, delivery.raw) == ("shop", 1, 1, b"1")

        fetched.complete(delivery)

        assert fetched.acquire() is None
        assert (fetched.field("shop:revision"), fetched.due_in(), fetched.days_kept()) == ("1", None, {400})

    def test_unchanged_content_is_not_delivered_again(self, fetched: Scenario) -> None:
        fetched.deliver()
        fetched.settle()

        assert fetched.fetch_and_store(1) == "fetched"

        assert fetched.acquire() is None

    def test_an_order_has_one_delivery_at_a_time(self, fetched: Scenario) -> None:
        first = fetched.delivery("a")
        assert fetched.acquire("b") is None

        fetched.complete(first, worker="a")
        store(fetched, 2)

        assert fetched.delivery("b").revision == 2

    def test_a_newer_revision_replaces_those_not_yet_delivered(self, fetched: Scenario) -> None:
        store(fetched, 2, 3)

        delivery = fetched.deliver()

        assert (delivery.revision, delivery.raw, fetched.acquire()) == (3, b"3", None)

    @pytest.mark.parametrize("outcome", ["succeeded", "dead"])
    def test_a_revision_stored_during_a_delivery_comes_next(self, fetched: Scenario, outcome: DeliveryOutcome) -> None:
        delivery = fetched.delivery()
        fetched.settle()
        fetched.fetch_and_store(2, "b")
        assert fetched.acquire("b") is None

        fetched.complete(delivery, outcome)

        assert (fetched.field("shop:dead"), fetched.deliver().revision) == (None, 2)
        assert (fetched.acquire(), fetched.days_kept()) == (None, {400})

    def test_each_sink_has_its_own_position(self, two_sinks: Scenario) -> None:
        sinks = [two_sinks.deliver().sink, two_sinks.deliver().sink]

        assert (sorted(sinks), two_sinks.acquire()) == (["mail", "shop"], None)
        assert two_sinks.fields("shop:revision", "mail:revision") == ["1", "1"]

    def test_an_order_whose_worker_died_after_the_last_delivery_still_expires(self, fetched: Scenario) -> None:
        fetched.deliver()
        assert fetched.days_kept() == {None}

        fetched.later(fetched.due_in() or 0)
        assert (fetched.dispatch(), fetched.start()) == (1, "nothing")

        assert (fetched.due_in(), fetched.days_kept()) == (None, {400})


class TestFailing:
    def test_a_failing_sink_does_not_delay_another(self, two_sinks: Scenario) -> None:
        """A failed delivery ends its job, since RQ's time limit strikes once per job: the next job is due at once."""
        failed = two_sinks.deliver("retry", wait=300)
        assert two_sinks.due_in() == 0
        assert (two_sinks.dispatch(), two_sinks.start()) == (1, "deliver")

        assert {failed.sink, two_sinks.deliver().sink} == {"shop", "mail"}

        assert (two_sinks.acquire(), two_sinks.due_in(), two_sinks.days_kept()) == (None, 300, {None})

    def test_a_retry_of_a_delivery_causes_no_getorder(self, fetched: Scenario) -> None:
        for attempts in (1, 2, 3):
            assert fetched.deliver("retry", wait=300).attempts == attempts
            assert (fetched.acquire(), fetched.due_in()) == (None, 300)
            fetched.later(300)
            assert (fetched.dispatch(), fetched.start()) == (1, "deliver")

        assert fetched.field("fencing_token") == "1"

    def test_a_dead_delivery_keeps_the_order_until_new_content_comes(self, fetched: Scenario) -> None:
        fetched.deliver("dead")

        assert (fetched.acquire(), fetched.due_in(), fetched.days_kept()) == (None, None, {None})
        assert fetched.field("shop:dead") == "reason"
        assert fetched.redis.zrange(keys.DEAD_DELIVERIES, 0, -1) == [f"{ONE.member} shop".encode()]

        store(fetched, 2)

        assert (fetched.field("shop:dead"), fetched.redis.zcard(keys.DEAD_DELIVERIES)) == (None, 0)
        assert (fetched.deliver().attempts, fetched.acquire(), fetched.days_kept()) == (1, None, {400})

    def test_a_worker_frozen_past_its_lease_does_not_undo_a_later_delivery(self, fetched: Scenario) -> None:
        frozen = fetched.delivery("frozen")
        fetched.later(policy.DELIVERY_LEASE / 1000)
        store(fetched, 2)
        fetched.deliver(worker="b")
        store(fetched, 3)
        fetched.delivery("b")

        fetched.complete(frozen, worker="frozen")

        assert (fetched.field("shop:revision"), fetched.acquire("frozen")) == ("2", None)

    @pytest.mark.parametrize("outcome", ["succeeded", "retry", "dead"])
    def test_a_repeated_complete_counts_once(self, fetched: Scenario, outcome: DeliveryOutcome) -> None:
        delivery = fetched.deliver(outcome)
        record, history = fetched.redis.hgetall(keys.record(ONE)), fetched.redis.lrange(keys.history(ONE), 0, -1)

        fetched.complete(delivery, outcome)

        assert fetched.redis.hgetall(keys.record(ONE)) == record
        assert fetched.redis.lrange(keys.history(ONE), 0, -1) == history

    def test_a_repeated_acquire_is_the_same_attempt(self, fetched: Scenario) -> None:
        first, again = fetched.delivery("a"), fetched.delivery("a")

        assert (again.revision, again.attempts, again.crashes) == (first.revision, 1, 0)


class TestBesideAFetch:
    """A delivery does not wait for the fetch of the next settlement."""

    def test_an_order_deleted_upstream_is_still_delivered_as_it_was(self, fetched: Scenario) -> None:
        fetched.deliver("retry", wait=300)
        fetched.settle()

        assert fetched.fail(fetched.fetch("b"), "deleted_upstream", "b") == "deleted_upstream"

        assert (fetched.due_in(), fetched.days_kept()) == (300, {None})
        fetched.later(300)
        assert (fetched.dispatch(), fetched.start(), fetched.deliver().raw) == (1, "deliver", b"1")

    @pytest.mark.parametrize("failure", ["dead", "deferred", "retry", "client_error"])
    def test_a_delivery_does_not_wait_for_a_fetch_that_failed(self, fetched: Scenario, failure: Failure) -> None:
        fetched.deliver("retry", wait=5)
        fetched.settle()
        fetched.fail(fetched.fetch(), failure, wait=4500)
        assert fetched.acquire() is None
        assert (fetched.due_in() or 99) <= 5

        fetched.later(5)
        fetched.dispatch()

        assert fetched.start() == "deliver"
        assert (fetched.deliver().revision, fetched.acquire()) == (1, None)
        assert (fetched.due_in(), fetched.is_dead()) == ((None, True) if failure == "dead" else (4495, False))

    def test_a_delivery_does_not_wait_for_a_recheck(self, fetched: Scenario) -> None:
        """Unsettled content is a revision too."""
        fetched.deliver()
        fetched.settle()
        fetched.store(fetched.fetch(), 2, recheck=4500)
        fetched.deliver("retry", wait=5)
        assert fetched.acquire() is None

        fetched.later(5)
        fetched.dispatch()

        assert (fetched.start(), fetched.deliver().revision) == ("deliver", 2)
        assert (fetched.acquire(), fetched.start(), fetched.due_in()) == (None, "nothing", 4495)

    def test_content_that_an_older_fetch_stores_for_a_dead_order_is_delivered(self, fetched: Scenario) -> None:
        """Also when the worker that stored it dies before it calls the sink: the order is due."""
        fetched.deliver()
        fetched.settle()
        older = fetched.fetch("a")
        fetched.settle()
        fetched.fail(fetched.fetch("b"), "dead", "b")

        assert fetched.store(older, 2, "a") == "pending"

        fetched.later(fetched.due_in() or 0)
        assert (fetched.dispatch(), fetched.start()) == (1, "deliver")
        assert (fetched.deliver().revision, fetched.acquire()) == (2, None)
        assert (fetched.is_dead(), fetched.due_in(), fetched.days_kept()) == (True, None, {None})


class TestCrashes:
    def test_deliveries_of_killed_workers_are_due_at_once_and_counted_as_crashes(self, fetched: Scenario) -> None:
        for number in range(policy.CRASHES_ALLOWED + 1):
            delivery = fetched.delivery(f"w{number}")
            assert (delivery.revision, delivery.attempts, delivery.crashes) == (1, number + 1, number)
            assert fetched.ledger.release_worker(f"w{number}", "killed") == ONE
            assert fetched.due_in() == 0

    def test_deliveries_of_workers_that_ended_by_themselves_are_due_at_once_and_no_crash(
        self, fetched: Scenario
    ) -> None:
        for number in range(policy.CRASHES_ALLOWED + 1):
            delivery = fetched.delivery(f"w{number}")
            assert (delivery.crashes, delivery.attempts) == (0, number + 1)
            assert fetched.ledger.release_worker(f"w{number}", "ended") == ONE
            assert fetched.due_in() == 0

    def test_the_end_of_a_lease_counts_as_a_crash(self, fetched: Scenario) -> None:
        fetched.acquire("a")
        fetched.later(policy.DELIVERY_LEASE / 1000)

        assert fetched.delivery("b").crashes == 1

    @pytest.mark.parametrize("reset", ["a failure", "new content", "retry_delivery"])
    def test_crashes_are_reset_by(self, fetched: Scenario, reset: str) -> None:
        fetched.acquire("a")
        fetched.ledger.release_worker("a", "killed")
        delivery = fetched.delivery("b")
        if reset == "a failure":
            fetched.complete(delivery, "retry", "b")
        elif reset == "new content":
            fetched.ledger.release_worker("b", "killed")
            store(fetched, 2)
        else:
            fetched.complete(delivery, "dead", "b")
            fetched.ledger.retry_delivery(ONE, "shop")
        fetched.later(5)

        assert fetched.delivery("c").crashes == 0
