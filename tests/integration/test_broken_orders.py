"""One order whose keys another program has overwritten: every step of all other orders goes on."""

from __future__ import annotations

import pytest

from app.ids import OrderKey
from app.ledger import keys
from app.ledger.orders import Archive
from app.replay import Plans
from tests.integration.ledger_scenario import ONE, SAME_ID, Scenario


@pytest.fixture
def broken(shop: Scenario) -> OrderKey:
    """The order SAME_ID is fetched and its record is overwritten; ONE is fetched."""
    for order in (ONE, SAME_ID):
        shop.settle(order)
        shop.fetch_and_store(1, order=order)
    shop.redis.delete(keys.record(SAME_ID))
    shop.redis.set(keys.record(SAME_ID), "another program")
    return SAME_ID


def test_a_request_for_several_orders_skips_it(shop: Scenario, broken: OrderKey) -> None:
    assert shop.ledger.request_fetch([broken, ONE], queue="backfill", reason="refetch") == 1

    assert shop.waiting("backfill") == 1


@pytest.mark.parametrize("sinks", [(), ("shop",)])
def test_a_replay_passes_it_over_and_the_dispatcher_reports_it(
    shop: Scenario, broken: OrderKey, sinks: tuple[str, ...]
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


def test_reconciling_reads_it_as_pending(shop: Scenario, broken: OrderKey) -> None:
    """A request would not help: an operator must look at its keys."""
    copies = Archive(shop.redis).copies([broken, ONE])

    assert [copy is not None and copy.pending for copy in copies] == [True, False]


def test_content_of_another_type_is_read_as_missing(shop: Scenario) -> None:
    shop.settle()
    shop.fetch_and_store(1)
    shop.redis.delete(keys.content(ONE))
    shop.redis.hset(keys.content(ONE), "another", "program")

    (copy,) = Archive(shop.redis).copies([ONE])

    assert copy is not None
    assert copy.content is None
