"""Upstream fails: an order that can never succeed becomes a dead letter, and an outage kills no order."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from app.dev.sandbox.process import Sandbox
from app.ledger import policy
from app.ledger.history import FetchFailed
from app.ledger.rate_limit import WINDOW
from tests.lab import KEYS, WORKER, now_ms
from tests.lab_upstream import Shop, WorkerLab, worker_lab

DAY = 86_400
MANY = 2000
MOST = 900
"""Requests in five minutes that the key of these tests allows."""


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def lab(redis_url: str, sandbox: Sandbox, shop: Shop) -> Iterator[WorkerLab]:
    with worker_lab(redis_url, sandbox, {"shop": shop}, requests_per_window=MOST) as one:
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


def test_an_order_with_a_permanent_500_becomes_a_dead_letter_and_others_do_not(lab: WorkerLab, shop: Shop) -> None:
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
def test_a_delivery_always_refused_is_a_dead_letter(lab: WorkerLab, shop: Shop, error: type[BaseException]) -> None:
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
    assert (lab.pending(), lab.redis.zcard(KEYS.dead_deliveries), lab.dead()) == (0, 1, 0)
    assert "canary" not in repr(lab.history(poison))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Writing 20,000 log lines of deferred orders takes half the time of a test."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()


def most_in_a_window(calls: list[int]) -> int:
    """Return the largest number of calls within upstream's five minutes."""
    return max(number + 1 - bisect_left(calls, call - WINDOW + 1000) for number, call in enumerate(calls))


def test_after_half_an_hour_of_outage_all_orders_are_fetched_at_the_allowed_rate(lab: WorkerLab) -> None:
    lab.issue(MANY)
    lab.fault(kind="status", status=503)

    lab.run_for(30 * 60)

    assert (lab.pending(), lab.dead()) == (MANY, 0)
    probes, runs = len(lab.calls), lab.runs
    # Only probes of the breaker reach upstream; each order runs about once per opening.
    assert probes < 30
    assert runs < 11 * MANY
    lab.clear_faults()
    lab.run_for(20 * 60)
    assert (lab.pending(), lab.dead()) == (0, 0)
    assert len(lab.calls) - probes == MANY
    assert most_in_a_window(lab.calls) <= MOST
    assert lab.runs - runs < 2 * MANY


def test_after_an_expired_key_is_replaced_all_orders_are_fetched(lab: WorkerLab) -> None:
    """A refused key uses no attempt of any order, however long it lasts."""
    orders = lab.issue(300)
    lab.fault(kind="status", status=401)
    lab.run_for(3600)
    assert (lab.pending(), lab.dead()) == (len(orders), 0)
    assert {lab.field("attempts", order) for order in orders} == {None}
    refused = len(lab.calls)
    assert refused < 100

    lab.clear_faults()
    lab.use_key("second-key")
    lab.run_for(10 * 60)

    assert (lab.pending(), lab.dead()) == (0, 0)
    assert len(lab.calls) == refused + len(orders)


@pytest.mark.parametrize(("retry_after", "wait"), [("90", 90), (None, 5)], ids=["Retry-After", "no Retry-After"])
def test_no_worker_calls_while_the_key_is_throttled(lab: WorkerLab, retry_after: str | None, wait: int) -> None:
    """A 429 defers all orders of the key, uses no attempt, and makes no dead letter."""
    orders = lab.issue(100)
    lab.fault(kind="status", status=429, calls=3, retry_after=retry_after)

    lab.run_for(30 * 60)

    assert (lab.pending(), lab.dead()) == (0, 0)
    assert len(lab.calls) == len(orders) + 3
    pauses = [later - sooner for sooner, later in zip(lab.calls, lab.calls[1:], strict=False)]
    assert all(pause >= wait * 1000 for pause in pauses[:3])
    assert not any(
        isinstance(entry, FetchFailed) and entry.outcome == "retry" for order in orders for entry in lab.history(order)
    )


def test_a_worker_without_the_sink_goes_on_fetching_at_full_speed(redis_url: str, sandbox: Sandbox) -> None:
    """It passes each delivery on to the pool with the sink; only jobs with nothing for it make it rest for longer."""
    with worker_lab(redis_url, sandbox) as lab:
        lab.now = now_ms()
        lab.declare(sinks=("python:json:dumps",))
        started = time.monotonic()
        for one in lab.issue(12):
            lab.processor.process(one, WORKER)

        assert time.monotonic() - started < 4
        assert len(lab.calls) == 12
        assert len(lab.jobs()) == 24, "one of each event, and one that went back"
