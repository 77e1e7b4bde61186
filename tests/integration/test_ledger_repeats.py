"""A step whose answer was lost with the connection is told again: the second telling changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from app.ledger import keys, policy
from app.ledger.work import Failure
from tests.integration.ledger_model.stage import ONE, Stage, staged


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Stage]:
    with staged(redis_client) as opened:
        opened.settle()
        yield opened


@pytest.fixture
def shop(redis_client: Redis) -> Iterator[Stage]:
    """One order, fetched, with one sink."""
    with staged(redis_client, "shop") as opened:
        opened.settle()
        opened.bring(1)
        yield opened


def standing(stage: Stage) -> tuple[object, ...]:
    """Return all that is kept of the order."""
    trail = stage.redis.lrange(keys.history(ONE), 0, -1)
    return (stage.redis.hgetall(keys.record(ONE)), trail, stage.due_in(), stage.is_dead(), stage.days_kept())


def test_a_begin_told_again_is_the_same_workers_fetch_and_no_crash(stage: Stage) -> None:
    stage.fetch("a")
    assert stage.start("b") == "held"

    again = stage.fetch("a")

    assert (stage.field("crashes"), stage.field("fencing_token")) == (None, str(again.token))
    assert stage.store(again, 1, "a") == "fetched"


def test_an_order_at_home_stays_as_it_is_when_finish_is_told_again(stage: Stage) -> None:
    fetch = stage.fetch()
    assert stage.store(fetch, 1) == "fetched"
    before = standing(stage)

    assert stage.store(fetch, 1) == "fetched"

    assert standing(stage) == before


def test_a_look_is_counted_once(stage: Stage) -> None:
    fetch = stage.fetch()
    stage.store(fetch, 1, recheck=120)
    before = standing(stage)

    assert stage.store(fetch, 1, recheck=120) == "pending"

    assert (stage.field("rechecks"), standing(stage)) == ("1", before)


def test_a_finish_told_again_says_again_what_it_said(shop: Stage) -> None:
    shop.settle()
    fetch = shop.fetch()
    assert [shop.store(fetch, 2), shop.store(fetch, 2)] == ["deliver", "deliver"]

    shop.settle()
    fetch = shop.fetch()
    assert [shop.store(fetch, 3, recheck=1, give_up="unsettled") for _ in range(2)] == ["dead", "dead"]


def test_a_finish_told_again_after_the_next_fetch_has_failed_gives_it_no_new_tries(stage: Stage) -> None:
    fetch = stage.fetch("a")
    stage.store(fetch, 1, "a")
    stage.settle()
    stage.fail(stage.fetch("b"), "retry", "b")

    stage.store(fetch, 1, "a")

    assert stage.field("attempts") == "1"


@pytest.mark.parametrize(
    ("what", "verdict"),
    [
        ("retry", "retry"),
        ("client_error", "retry"),
        ("not_found", "retry"),
        ("deferred", "deferred"),
        ("dead", "dead"),
        ("deleted_upstream", "deleted_upstream"),
    ],
)
def test_a_failure_is_counted_once_and_said_twice(stage: Stage, what: Failure, verdict: str) -> None:
    fetch = stage.fetch()
    assert stage.fail(fetch, what) == verdict
    before = standing(stage)

    assert stage.fail(fetch, what) == verdict

    assert standing(stage) == before


def test_a_failure_that_was_not_heard_of_and_a_crash_are_two_things(stage: Stage) -> None:
    """A worker taken for dead that says at last how its fetch ended has not said it before."""
    fetch = stage.fetch("slow")
    stage.ledger.release_worker("slow", "killed")

    assert stage.fail(fetch, "retry", "slow") == "retry"

    assert stage.field("attempts") == "1"


def test_a_hand_told_again_is_the_same_try(shop: Stage) -> None:
    first = shop.acquire("a")

    again = shop.acquire("a")

    assert first is not None
    assert again is not None
    assert (again.revision, again.attempts, again.crashes) == (first.revision, 1, 0)


@pytest.mark.parametrize("what", ["succeeded", "retry", "dead"])
def test_a_handed_told_again_counts_once(shop: Stage, what: str) -> None:
    delivery = shop.acquire()
    assert delivery is not None
    shop.complete(delivery, what)  # type: ignore[arg-type]  # parametrize knows only str
    record = shop.redis.hgetall(keys.record(ONE))

    shop.complete(delivery, what)  # type: ignore[arg-type]  # as above

    assert shop.redis.hgetall(keys.record(ONE)) == record


class TestEnded:
    """A worker that ends by itself gave up on Redis, or was told to stop: no order is at fault."""

    def test_a_fetch_of_a_worker_that_ended_is_due_at_once_and_no_crash(self, stage: Stage) -> None:
        for number in range(policy.CRASHES_ALLOWED + 1):
            stage.fetch(f"w{number}")
            assert stage.ledger.release_worker(f"w{number}", "ended") == ONE
            assert (stage.due_in(), stage.dispatch()) == (0, 1)

        assert stage.bring(1) == "fetched"

    def test_a_hand_on_of_a_worker_that_ended_is_due_at_once_and_no_crash(self, shop: Stage) -> None:
        for number in range(policy.CRASHES_ALLOWED + 1):
            delivery = shop.acquire(f"w{number}")
            assert delivery is not None
            assert (delivery.crashes, delivery.attempts) == (0, number + 1)
            assert shop.ledger.release_worker(f"w{number}", "ended") == ONE
            assert shop.due_in() == 0


class TestCrashesOfWhat:
    """Crashes are counted for what caused them."""

    def test_a_new_event_gives_new_tries_to_an_order_whose_fetch_ended_its_workers(self, stage: Stage) -> None:
        for number in range(policy.CRASHES_ALLOWED):
            stage.fetch(f"w{number}")
            if number == policy.CRASHES_ALLOWED - 1:
                stage.settle()
            stage.ledger.release_worker(f"w{number}", "killed")

        assert stage.fetch("new").generation == 2
        assert stage.field("crashes") is None

    def test_the_new_tries_are_as_many_as_the_old_ones(self, stage: Stage) -> None:
        stage.fetch("w0")
        stage.settle()
        stage.ledger.release_worker("w0", "killed")

        for number in range(policy.CRASHES_ALLOWED):
            stage.fetch(f"v{number}")
            stage.ledger.release_worker(f"v{number}", "killed")

        assert stage.start("v") == "dead"

    def test_hand_ons_of_one_revision_that_never_ended_are_counted(self, shop: Stage) -> None:
        seen = []
        for number in range(policy.CRASHES_ALLOWED + 1):
            delivery = shop.acquire(f"w{number}")
            assert delivery is not None
            seen.append(delivery.crashes)
            shop.ledger.release_worker(f"w{number}", "killed")

        assert seen == list(range(policy.CRASHES_ALLOWED + 1))

    def test_a_lease_that_ends_is_a_crash_of_the_hand_on_too(self, shop: Stage) -> None:
        shop.acquire("a")
        shop.later(policy.DELIVERY_LEASE / 1000)

        delivery = shop.acquire("b")

        assert delivery is not None
        assert delivery.crashes == 1

    @pytest.mark.parametrize("how", ["another ending", "new content", "revived"])
    def test_they_are_forgotten_after(self, shop: Stage, how: str) -> None:
        shop.acquire("a")
        shop.ledger.release_worker("a", "killed")
        delivery = shop.acquire("b")
        assert delivery is not None
        if how == "another ending":
            shop.complete(delivery, "retry", "b")
        elif how == "new content":
            shop.ledger.release_worker("b", "killed")
            shop.settle()
            shop.bring(2)
        else:
            shop.complete(delivery, "dead", "b")
            shop.ledger.retry_delivery(ONE, "shop")
        shop.later(5)

        again = shop.acquire("c")

        assert again is not None
        assert again.crashes == 0
