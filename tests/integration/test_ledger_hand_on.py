"""How revisions reach the sinks (invariant 6): one at a time, in order, each sink for itself, without a getOrder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from app.ledger import keys, policy
from app.ledger.work import Delivery, Failure
from tests.integration.ledger_model.stage import ONE, Stage, staged


def stored(stage: Stage, *versions: int) -> Stage:
    """Let the order settle and be fetched, once a version."""
    for version in versions:
        stage.settle()
        stage.bring(version)
    return stage


def begun(stage: Stage, worker: str = "w") -> Delivery:
    """Begin a hand-on, and insist that one is due."""
    delivery = stage.acquire(worker)
    assert delivery is not None
    return delivery


def taken(stage: Stage, worker: str = "w") -> Delivery:
    """Let the sink take what comes next."""
    delivery = begun(stage, worker)
    stage.complete(delivery, worker=worker)
    return delivery


def dead_sinks(stage: Stage) -> list[object]:
    return list(stage.redis.zrange(keys.DEAD_DELIVERIES, 0, -1))


@pytest.fixture
def shop(redis_client: Redis) -> Iterator[Stage]:
    """One order, fetched, with one sink."""
    with staged(redis_client, "shop") as stage:
        yield stored(stage, 1)


@pytest.fixture
def shop_and_mail(redis_client: Redis) -> Iterator[Stage]:
    """One order, fetched, with two sinks."""
    with staged(redis_client, "shop", "mail") as stage:
        yield stored(stage, 1)


def test_a_new_revision_is_owed_to_the_sink_and_then_nothing_is(shop: Stage) -> None:
    assert (shop.due_in(), shop.days_kept()) == (policy.DELIVERY_LEASE / 1000, {None})
    delivery = begun(shop)
    assert (delivery.sink, delivery.revision, delivery.attempts, delivery.raw) == ("shop", 1, 1, b"1")

    shop.complete(delivery)

    assert shop.acquire() is None
    assert (shop.field("shop:revision"), shop.due_in(), shop.days_kept()) == ("1", None, {400})


def test_unchanged_content_is_not_handed_on_again(shop: Stage) -> None:
    taken(shop)
    shop.settle()

    assert shop.bring(1) == "fetched"

    assert shop.acquire() is None


def test_one_hand_on_an_order_at_a_time(shop: Stage) -> None:
    taken(shop, "a")
    stored(shop, 2)
    first = begun(shop, "a")

    assert shop.acquire("b") is None

    shop.complete(first, worker="a")
    stored(shop, 3)
    assert shop.acquire("b") is not None


def test_a_newer_revision_replaces_those_not_yet_handed_on(shop: Stage) -> None:
    stored(shop, 2, 3)

    delivery = taken(shop)

    assert (delivery.revision, delivery.raw, shop.acquire()) == (3, b"3", None)


def test_a_revision_stored_during_a_hand_on_comes_next(shop: Stage) -> None:
    delivery = begun(shop)
    shop.settle()
    shop.bring(2, "b")
    assert shop.acquire("b") is None

    shop.complete(delivery)

    assert taken(shop).revision == 2
    assert (shop.acquire(), shop.days_kept()) == (None, {400})


def test_each_sink_has_its_own_position(shop_and_mail: Stage) -> None:
    stage = shop_and_mail

    sinks = [taken(stage).sink, taken(stage).sink]

    assert (sorted(sinks), stage.acquire()) == (["mail", "shop"], None)
    assert (stage.field("shop:revision"), stage.field("mail:revision")) == ("1", "1")


def test_a_failing_sink_does_not_hold_up_another(shop_and_mail: Stage) -> None:
    stage = shop_and_mail
    failing = begun(stage)
    stage.complete(failing, "retry", wait=300)

    assert taken(stage).sink != failing.sink

    assert (stage.acquire(), stage.due_in(), stage.days_kept()) == (None, 300, {None})


def test_the_retry_of_a_sink_never_causes_a_getorder(shop: Stage) -> None:
    for tries in (1, 2, 3):
        delivery = begun(shop)
        assert delivery.attempts == tries
        shop.complete(delivery, "retry", wait=300)
        assert (shop.acquire(), shop.due_in()) == (None, 300)
        shop.later(300)
        assert (shop.dispatch(), shop.start()) == (1, "deliver")

    assert shop.field("fencing_token") == "1"


def test_a_dead_sink_keeps_the_order_without_an_end(shop: Stage) -> None:
    delivery = begun(shop)
    shop.complete(delivery, "dead")

    assert (shop.acquire(), shop.due_in(), shop.days_kept()) == (None, None, {None})
    assert (shop.field("shop:dead"), dead_sinks(shop)) == ("reason", [f"{ONE.member} shop".encode()])


def test_new_content_revives_a_dead_sink(shop: Stage) -> None:
    delivery = begun(shop)
    shop.complete(delivery, "dead")

    stored(shop, 2)

    assert (shop.field("shop:dead"), dead_sinks(shop)) == (None, [])
    assert (taken(shop).attempts, shop.acquire(), shop.days_kept()) == (1, None, {400})


def test_a_sink_that_refuses_what_is_old_by_now_still_gets_the_new(shop: Stage) -> None:
    delivery = begun(shop)
    stored(shop, 2)

    shop.complete(delivery, "dead")

    assert (shop.field("shop:dead"), taken(shop).revision) == (None, 2)


def test_a_hand_on_whose_worker_ended_is_due_at_once(shop: Stage) -> None:
    assert shop.acquire("a") is not None
    assert shop.acquire("b") is None

    assert shop.ledger.release_worker("a", "killed") == ONE

    assert shop.due_in() == 0
    again = begun(shop, "b")
    assert (again.revision, again.attempts) == (1, 2)


def test_a_worker_frozen_past_its_lease_does_not_undo_what_another_did(shop: Stage) -> None:
    frozen = begun(shop, "frozen")
    shop.later(policy.DELIVERY_LEASE / 1000)
    stored(shop, 2)
    taken(shop, "b")
    stored(shop, 3)
    assert shop.acquire("b") is not None

    shop.complete(frozen, worker="frozen")

    assert shop.field("shop:revision") == "2"
    assert shop.acquire("frozen") is None


def test_an_order_whose_worker_died_after_the_last_hand_on_gets_its_end(shop: Stage) -> None:
    delivery = begun(shop)
    shop.complete(delivery)
    assert shop.days_kept() == {None}

    shop.later(shop.due_in() or 0)
    assert (shop.dispatch(), shop.start()) == (1, "nothing")

    assert (shop.due_in(), shop.days_kept()) == (None, {400})


def test_an_order_that_is_gone_is_still_handed_on_as_it_was(shop: Stage) -> None:
    delivery = begun(shop)
    shop.complete(delivery, "retry", wait=300)
    shop.settle()

    assert shop.fail(shop.fetch("b"), "deleted_upstream", "b") == "deleted_upstream"

    assert (shop.due_in(), shop.days_kept()) == (300, {None})
    shop.later(300)
    assert (shop.dispatch(), shop.start(), taken(shop).raw) == (1, "deliver", b"1")


@pytest.mark.parametrize("what", ["dead", "deferred", "retry", "client_error"])
def test_a_hand_on_does_not_wait_for_a_fetch_that_fails(shop: Stage, what: Failure) -> None:
    """The sink's next try comes in 5 s, whatever becomes of the next settlement's fetch, and costs no getOrder."""
    shop.complete(begun(shop), "retry", wait=5)
    shop.settle()
    shop.fail(shop.fetch(), what, wait=4500)
    assert shop.acquire() is None
    assert (shop.due_in() or 99) <= 5

    shop.later(5)
    shop.dispatch()

    assert shop.start() == "deliver"
    assert (taken(shop).revision, shop.acquire()) == (1, None)
    assert (shop.due_in(), shop.is_dead()) == ((None, True) if what == "dead" else (4495, False))


def test_a_sink_is_tried_again_while_the_order_waits_for_its_next_look(shop: Stage) -> None:
    """Unsettled content is a revision too; the next look at the order is 75 minutes away."""
    shop.complete(begun(shop))
    shop.settle()
    shop.store(shop.fetch(), 2, recheck=4500)
    shop.complete(begun(shop), "retry", wait=5)
    assert shop.acquire() is None

    shop.later(5)
    shop.dispatch()

    assert shop.start() == "deliver"
    assert taken(shop).revision == 2
    assert (shop.acquire(), shop.start()) == (None, "nothing")
    assert shop.due_in() == 4495


def test_what_one_sink_refuses_another_gets_with_the_next_job_at_once(shop_and_mail: Stage) -> None:
    """RQ's time limit strikes once a job, so a hand-on that failed ends the job."""
    stage = shop_and_mail
    failed = begun(stage)
    stage.complete(failed, "retry", wait=60)
    assert stage.due_in() == 0

    assert stage.dispatch() == 1
    assert stage.start() == "deliver"

    assert {failed.sink, taken(stage).sink} == {"shop", "mail"}


def test_what_an_older_fetch_brings_for_an_order_given_up_is_handed_on(shop: Stage) -> None:
    """The worker that stored it may die before it calls the sink: the clock knows."""
    shop.complete(begun(shop))
    shop.settle()
    older = shop.fetch("a")
    shop.settle()
    shop.fail(shop.fetch("b"), "dead", "b")

    assert shop.store(older, 2, "a") == "pending"

    shop.later(shop.due_in() or 0)
    assert (shop.dispatch(), shop.start()) == (1, "deliver")
    assert (taken(shop).revision, shop.acquire()) == (2, None)
    assert (shop.is_dead(), shop.due_in(), shop.days_kept()) == (True, None, {None})
