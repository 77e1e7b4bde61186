"""What people do by hand: each operation is in the audit, may be repeated, and says what the order had become."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app import audit
from app.erasure import Erasure
from app.ids import OrderKey
from app.ledger.dead_letters import DeadLetter, DeadLetters
from app.ledger.work import Requested
from app.operations import Operations, Requeued
from app.replay import Plans
from tests.lab import KEYS, ONE, SINK, Lab, order


@pytest.fixture
def by_ann(lab: Lab) -> Operations:
    lab.declare()
    return Operations(lab.ledger, Plans(lab.redis, event_days=90), who="ann", why="asked by the guest")


def erase(lab: Lab, one: OrderKey = ONE) -> None:
    traces = Erasure(lab.redis, order_days=400).traces(one)
    assert traces is not None
    Erasure(lab.redis, order_days=400).erase(traces)


def letters(lab: Lab, one: OrderKey = ONE) -> list[DeadLetter]:
    return DeadLetters(lab.redis).of(one, waiting=True)


def noted(lab: Lab) -> list[tuple[str, str, str, str]]:
    """Return what the audit has, oldest first."""
    entries = [entry for _, entry in audit.newest_first(lab.redis)]
    return [(one.what, one.who, one.why, one.selected) for one in reversed(entries)]


def refetch(one: Operations, *orders: OrderKey) -> Requested:
    named = dict.fromkeys(orders or (ONE,), "")
    return one.refetch(named, queue="live", what="refetch", selected=ONE.member)


def requeue(lab: Lab, one: Operations, found: list[DeadLetter] | None = None) -> Requeued:
    found = letters(lab) if found is None else found
    return one.requeue(found, queue="live", selected=ONE.member, count=len(found))


def discard(lab: Lab, one: Operations, found: list[DeadLetter] | None = None) -> int:
    found = letters(lab) if found is None else found
    return one.discard(found, selected=ONE.member, count=len(found))


def test_a_refetch_adds_one_job_however_often_it_is_asked_for(lab: Lab, by_ann: Operations) -> None:
    lab.accept_and_fetch()
    lab.clear_queues()

    first, second = refetch(by_ann), refetch(by_ann)

    assert (first, second) == (Requested(queued=1), Requested(waiting=1))
    assert lab.queued("live") == [ONE.order_id]
    assert noted(lab) == [("refetch", "ann", "asked by the guest", ONE.member)] * 2


def test_a_refetch_counts_each_order_by_what_it_is(lab: Lab, by_ann: Operations) -> None:
    """A refetch of an erased order would keep its tombstone longer: it is not even asked for."""
    for number in (1, 2, 3):
        lab.accept_and_fetch(order(number))
    lab.overwrite(KEYS.record(order(2)), b"of another program")
    erase(lab, order(3))
    lab.redis.zadd(KEYS.orders, {order(3).member: 1})

    assert refetch(by_ann, order(1), order(2), order(3)) == Requested(queued=1, erased=1, broken=1)

    assert lab.redis.zscore(KEYS.orders, order(3).member) == 1
    assert refetch(by_ann, order(3)) == Requested(erased=1)


def test_requeue_tries_a_dead_fetch_and_failed_deliveries_and_repeated_it_finds_nothing(
    lab: Lab, by_ann: Operations
) -> None:
    """The stored revision waits for its sink, and a later fetch is dead."""
    lab.accept_and_fetch()
    lab.deliver("retry", reason="ValueError", wait=7200)
    lab.accept()
    lab.dead_letter()
    lab.clear_queues()
    found = letters(lab)

    first, second, third = requeue(lab, by_ann), requeue(lab, by_ann), requeue(lab, by_ann, found)

    assert (first.fetches, first.deliveries, first.sinks) == (Requested(queued=1), 1, frozenset({SINK}))
    assert (second.fetches, second.deliveries) == (Requested(), 0)
    # A page that was read before: one more settlement is asked for, and no further job is made.
    assert (third.fetches, third.deliveries) == (Requested(waiting=1), 0)
    assert (lab.queued("live"), (lab.delivery_in() or 0) <= 0) == ([ONE.order_id], True)
    assert noted(lab)[0] == ("requeue", "ann", "asked by the guest", ONE.member)


def test_discard_ends_dead_letters_and_repeated_it_finds_nothing(lab: Lab, by_ann: Operations) -> None:
    lab.accept_and_fetch()
    lab.dead_letter_delivery()
    lab.accept()
    lab.dead_letter()
    found = letters(lab)

    assert (discard(lab, by_ann), discard(lab, by_ann), discard(lab, by_ann, found)) == (2, 0, 0)
    assert (letters(lab), lab.is_dead(), lab.acquire_delivery()) == ([], False, None)
    assert noted(lab)[0] == ("drop", "ann", "asked by the guest", ONE.member)


def has_it(lab: Lab) -> None:
    lab.accept_and_fetch()
    lab.deliver()


def never_declared(lab: Lab) -> None:
    """The order was fetched before the sink was declared."""
    has_it(lab)
    lab.redis.hdel(KEYS.record(ONE), f"{SINK}:revision")


def dead_delivery(lab: Lab) -> None:
    lab.accept_and_fetch()
    lab.dead_letter_delivery()


def failed_delivery(lab: Lab) -> None:
    lab.accept_and_fetch()
    lab.deliver("retry", reason="ValueError", wait=7200)


def discarded_delivery(lab: Lab) -> None:
    dead_delivery(lab)
    lab.ledger.discard(ONE, SINK)


@pytest.mark.parametrize("before", [has_it, never_declared, dead_delivery, failed_delivery, discarded_delivery])
def test_the_stored_revision_is_delivered_again_once_however_often_it_is_asked_for(
    lab: Lab, by_ann: Operations, before: Callable[[Lab], None]
) -> None:
    before(lab)

    asked = [by_ann.redeliver(ONE, SINK) for _ in range(2)]

    assert (asked, lab.field("generation")) == (["queued", "waiting"], "1")
    delivery = lab.start_delivery()
    assert (delivery.revision, delivery.attempts) == (1, 1)
    assert by_ann.redeliver(ONE, SINK) == "waiting"
    lab.complete_delivery(delivery)
    assert (lab.field(f"{SINK}:revision"), lab.acquire_delivery()) == ("1", None)
    assert {tuple(rest) for _, *rest in noted(lab)} == {("ann", "asked by the guest", f"{ONE.member} to {SINK}")}


def test_nothing_is_delivered_again_of_an_order_that_was_never_fetched(lab: Lab, by_ann: Operations) -> None:
    lab.accept()

    assert (by_ann.redeliver(ONE, SINK), lab.acquire_delivery()) == ("passed", None)


OPERATIONS: dict[str, Callable[[Lab, Operations, list[DeadLetter]], Any]] = {
    "refetch": lambda _, one, __: refetch(one),
    "requeue": requeue,
    "discard": discard,
    "redeliver": lambda _, one, __: one.redeliver(ONE, SINK),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("before", [has_it, dead_delivery, failed_delivery])
def test_no_operation_brings_back_an_order_that_was_erased_since_it_was_read(
    lab: Lab, by_ann: Operations, before: Callable[[Lab], None], operation: str
) -> None:
    before(lab)
    lab.accept()
    lab.dead_letter()
    read = letters(lab)
    erase(lab)
    lab.clear_queues()

    done = OPERATIONS[operation](lab, by_ann, read)

    assert done in (
        Requested(erased=1),
        Requeued(Requested(erased=1), 0, frozenset({SINK} & {one.sink for one in read})),
        0,
        "passed",
    )
    assert (lab.queued("live"), lab.due_in(), lab.acquire_delivery(), lab.is_dead()) == ([], None, None, False)
    assert lab.archive.erased_among([ONE]) == {ONE}


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_that_dies_before_it_acts_is_in_the_audit(
    lab: Lab, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.declare()
    dead_delivery(lab)
    lab.accept()
    lab.dead_letter()

    def die(*_: object, **__: object) -> Iterator[None]:
        raise Killed

    for step in ("request_fetch", "retry_delivery", "discard"):
        monkeypatch.setattr(lab.ledger, step, die)
    one = Operations(lab.ledger, Plans(lab.redis, event_days=90), who="ann", why="test")
    with pytest.raises(Killed):
        OPERATIONS[operation](lab, one, letters(lab))

    assert [(who, why) for _, who, why, _ in noted(lab)] == [("ann", "test")]
