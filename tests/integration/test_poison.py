"""An order that can never succeed becomes a dead letter after a bounded number of attempts and delays no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from app.dev.sandbox import process as sandbox_process
from app.dev.sandbox.process import Sandbox
from app.ledger import keys, policy
from tests.lab_upstream import Shop, WorkerLab, worker_lab

DAY = 86_400


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with sandbox_process.start() as one:
        yield one


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def lab(redis_url: str, sandbox: Sandbox, shop: Shop) -> Iterator[WorkerLab]:
    with worker_lab(redis_url, sandbox, {"shop": shop}) as one:
        yield one


@pytest.mark.parametrize(
    ("fault", "reason", "calls"),
    [
        ({"kind": "status", "status": 400, "code": "generic_error"}, "bad_request", 5),
        ({"kind": "rubbish"}, "unreadable_answer", 5),
        ({"kind": "truncated"}, "unreadable_answer", 5),
        ({"kind": "wrong_order"}, "wrong_order", 5),
        ({"kind": "status", "status": 404, "code": "resource_not_found"}, "order_missing", None),
    ],
    ids=["400", "rubbish", "truncated", "another order", "404"],
)
def test_an_order_with_a_permanently_bad_answer_becomes_a_dead_letter(
    lab: WorkerLab, shop: Shop, fault: dict[str, Any], reason: str, calls: int | None
) -> None:
    poison, *others = lab.issue(4)
    lab.fault(order_id=poison.order_id, **fault)

    lab.run_for(1)
    assert sorted(shop.received) == sorted(order.order_id for order in others)
    lab.run_for(DAY)

    assert (lab.field("dead", poison), lab.pending(), lab.dead()) == (reason, 0, 1)
    made = len(lab.calls) - len(others)
    assert made == calls if calls else made < 20
    assert poison.order_id not in shop.called


def test_an_order_with_a_permanent_500_becomes_a_dead_letter_while_others_are_fetched(
    lab: WorkerLab, shop: Shop
) -> None:
    """Answers for other orders keep the breaker closed: it opens after five failures in a row."""
    poison, *others = lab.issue(4)
    lab.fault(order_id=poison.order_id, kind="status", status=500)

    for _ in range(40):
        lab.run_for(3600)
        others += lab.issue(1)

    assert lab.field("dead", poison) == "http_500"
    assert len(lab.calls) - len(others) <= len(policy.RETRY_WAITS) + 1
    lab.run_for(600)
    assert sorted(shop.received) == sorted(order.order_id for order in others)


class Refused(Exception):
    """What the sinks of these tests raise."""


@pytest.mark.parametrize(
    "error", [Refused, SystemExit, KeyboardInterrupt, TimeoutError], ids=lambda kind: kind.__name__
)
def test_a_delivery_that_the_sink_always_refuses_becomes_a_dead_letter(
    lab: WorkerLab, shop: Shop, error: type[BaseException]
) -> None:
    """Whatever the sink raises: bounded attempts, one getOrder, and a reason that names only the type."""

    def refuse(order_id: str) -> None:
        if order_id == poison.order_id:
            raise error("canary")

    shop.trouble = refuse
    poison, *others = lab.issue(4)

    lab.run_for(1)
    assert sorted(shop.received) == sorted(order.order_id for order in others)
    lab.run_for(2 * DAY)

    assert lab.field("shop:dead", poison) == error.__name__
    assert shop.called.count(poison.order_id) == len(policy.RETRY_WAITS) + 1
    assert len(lab.calls) == 4
    assert (lab.pending(), lab.redis.zcard(keys.DEAD_DELIVERIES), lab.dead()) == (0, 1, 0)
    assert "canary" not in repr(lab.history(poison))


def test_an_order_that_does_not_exist_becomes_a_dead_letter(lab: WorkerLab, shop: Shop) -> None:
    others = lab.issue(3)
    ghost = others[0]._replace(order_id="ffffffff-ffff-ffff-ffff-ffffffffffff")
    lab.accept(ghost)

    lab.run_for(DAY)

    assert (lab.field("dead", ghost), lab.pending()) == ("order_missing", 0)
    assert len(shop.received) == len(others)
