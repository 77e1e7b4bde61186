"""Orders with outstanding work that are not in `due` are found and dispatched."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.ledger import keys
from app.ledger.due_check import LEAST_KEYS, DueCheck
from tests.integration.ledger_scenario import ONE, SAME_ID, Scenario


def found_in_a_walk(scenario: Scenario) -> int:
    check = DueCheck(scenario.redis)
    return sum(check.step() for _ in range(2 + scenario.redis.dbsize() // LEAST_KEYS))


OUTSTANDING: dict[str, Callable[[Scenario], object]] = {
    "accepted": lambda shop: None,
    "fetching": lambda shop: shop.fetch(),
    "failed": lambda shop: shop.fail(shop.fetch(), "retry"),
    "deferred": lambda shop: shop.fail(shop.fetch(), "deferred"),
    "unsettled": lambda shop: shop.store(shop.fetch(), 1, recheck=60),
    "to be delivered": lambda shop: shop.fetch_and_store(1),
    "delivery failed": lambda shop: (shop.fetch_and_store(1), shop.deliver("retry")),
    "requested": lambda shop: (shop.fetch_and_store(1), shop.deliver(), shop.request()),
}


@pytest.mark.parametrize("state", OUTSTANDING)
def test_outstanding_work_without_a_due_time_is_due_at_once(shop: Scenario, state: str) -> None:
    shop.settle()
    OUTSTANDING[state](shop)
    shop.redis.delete(keys.DUE, "rq:queue:live")

    assert (found_in_a_walk(shop), shop.redis.zrange(keys.DUE, 0, -1)) == (1, [ONE.member.encode()])


AT_REST: dict[str, Callable[[Scenario], object]] = {
    "in due": lambda shop: None,
    "delivered": lambda shop: (shop.fetch_and_store(1), shop.deliver()),
    "dead": lambda shop: shop.fail(shop.fetch(), "dead"),
    "dead delivery": lambda shop: (shop.fetch_and_store(1), shop.deliver("dead"), shop.dispatch(), shop.start()),
    "discarded": lambda shop: (shop.fail(shop.fetch(), "dead"), shop.ledger.discard(ONE)),
}


@pytest.mark.parametrize("state", AT_REST)
def test_an_order_at_rest_is_left_alone(shop: Scenario, state: str) -> None:
    shop.settle()
    AT_REST[state](shop)
    before = shop.redis.zrange(keys.DUE, 0, -1, withscores=True)

    assert found_in_a_walk(shop) == 0
    assert shop.redis.zrange(keys.DUE, 0, -1, withscores=True) == before


def test_every_record_is_read_among_many_keys(scenario: Scenario) -> None:
    with scenario.redis.pipeline(transaction=False) as pipe:
        for number in range(3000):
            pipe.set(f"another:{number}", 1)
        pipe.execute()
    scenario.settle(ONE)
    scenario.settle(SAME_ID)
    scenario.redis.delete(keys.DUE)

    assert found_in_a_walk(scenario) == 2


def test_a_broken_record_stops_no_walk(scenario: Scenario) -> None:
    scenario.settle()
    scenario.redis.delete(keys.DUE, keys.record(SAME_ID))
    scenario.redis.set(keys.record(SAME_ID), "another program")

    scenario.redis.hset("ota:order:of-another-program", "a", "b")

    assert (found_in_a_walk(scenario), scenario.redis.zrange(keys.DUE, 0, -1)) == (1, [ONE.member.encode()])
