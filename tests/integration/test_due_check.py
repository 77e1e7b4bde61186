"""Damaged data: outstanding work that is not in `due` is found, and broken keys of one order stop no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.ids import OrderKey
from app.ledger import keys
from app.ledger.due_check import LEAST_KEYS, DueCheck
from app.ledger.orders import LocalCopies
from app.replay import Plans
from tests.lab import ONE, SAME_ID, Lab


def found_in_a_walk(bare: Lab) -> int:
    check = DueCheck(bare.redis)
    return sum(check.step() for _ in range(2 + bare.redis.dbsize() // LEAST_KEYS))


OUTSTANDING: dict[str, Callable[[Lab], object]] = {
    "accepted": lambda shop: None,
    "fetching": lambda shop: shop.start_fetch(),
    "failed": lambda shop: shop.fail_fetch("retry"),
    "deferred": lambda shop: shop.fail_fetch("deferred"),
    "unsettled": lambda shop: shop.store_fetch(shop.start_fetch(), 1, recheck=60),
    "to be delivered": lambda shop: shop.fetch_and_store(),
    "delivery failed": lambda shop: (shop.fetch_and_store(), shop.deliver("retry")),
    "requested": lambda shop: (shop.fetch_and_store(), shop.deliver(), shop.request_fetch()),
}


@pytest.mark.parametrize("state", OUTSTANDING)
def test_outstanding_work_without_a_due_time_is_due_at_once(shop: Lab, state: str) -> None:
    shop.accept()
    OUTSTANDING[state](shop)
    shop.redis.delete(keys.DUE, "rq:queue:live")

    assert (found_in_a_walk(shop), list(shop.due())) == (1, [ONE])


AT_REST: dict[str, Callable[[Lab], object]] = {
    "in due": lambda shop: None,
    "delivered": lambda shop: (shop.fetch_and_store(), shop.deliver()),
    "dead": lambda shop: shop.fail_fetch("dead"),
    "dead delivery": lambda shop: (shop.fetch_and_store(), shop.deliver("dead"), shop.dispatch(), shop.try_start()),
    "discarded": lambda shop: (shop.fail_fetch("dead"), shop.ledger.discard(ONE)),
}


@pytest.mark.parametrize("state", AT_REST)
def test_an_order_at_rest_is_left_alone(shop: Lab, state: str) -> None:
    shop.accept()
    AT_REST[state](shop)
    before = shop.due()

    assert found_in_a_walk(shop) == 0
    assert shop.due() == before


def test_every_record_is_read_among_many_keys(bare: Lab) -> None:
    with bare.redis.pipeline(transaction=False) as pipe:
        for number in range(3000):
            pipe.set(f"another:{number}", 1)
        pipe.execute()
    bare.accept(ONE, SAME_ID)
    bare.redis.delete(keys.DUE)

    assert found_in_a_walk(bare) == 2


def test_a_broken_record_stops_no_walk(bare: Lab) -> None:
    bare.accept()
    bare.redis.delete(keys.DUE, keys.record(SAME_ID))
    bare.redis.set(keys.record(SAME_ID), "another program")

    bare.redis.hset("ota:order:of-another-program", "a", "b")

    assert (found_in_a_walk(bare), list(bare.due())) == (1, [ONE])


@pytest.fixture
def broken(shop: Lab) -> OrderKey:
    """The order SAME_ID is fetched and its record is overwritten; ONE is fetched."""
    for order in (ONE, SAME_ID):
        shop.accept_and_fetch(order)
    shop.redis.delete(keys.record(SAME_ID))
    shop.redis.set(keys.record(SAME_ID), "another program")
    return SAME_ID


def test_a_request_for_several_orders_skips_it(shop: Lab, broken: OrderKey) -> None:
    assert shop.ledger.request_fetch([broken, ONE], queue="backfill", reason="refetch") == 1

    assert len(shop.queued("backfill")) == 1


@pytest.mark.parametrize("sinks", [(), ("shop",)])
def test_a_replay_passes_it_over_and_the_dispatcher_reports_it(
    shop: Lab, broken: OrderKey, sinks: tuple[str, ...]
) -> None:
    shop.deliver()
    plans = Plans(shop.redis, event_days=90, clock=shop.clock)
    plan = plans.file([(broken.member, None), (ONE.member, None)], rate=100, sinks=sinks)

    shop.later(1)
    fed = plans.feed(plan)

    found = plans.of(plan.id)
    assert found is not None
    assert (fed.state, found.passed, found.queued) == ("done", 1, 1)
    shop.later(121)
    assert shop.ledger.dispatch_due().broken == 1


def test_reconciling_reads_it_as_pending(shop: Lab, broken: OrderKey) -> None:
    """A request would not help: an operator must look at its keys."""
    copies = LocalCopies(shop.redis).read([broken, ONE])

    assert [copy is not None and copy.pending for copy in copies] == [True, False]


def test_content_of_another_type_is_read_as_missing(shop: Lab) -> None:
    shop.accept_and_fetch()
    shop.redis.delete(keys.content(ONE))
    shop.redis.hset(keys.content(ONE), "another", "program")

    (copy,) = LocalCopies(shop.redis).read([ONE])

    assert copy is not None
    assert copy.content is None
