"""While upstream is unavailable, refuses the key or throttles, no order dies; all are fetched afterwards."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator

import pytest
import structlog

from app.dev.sandbox import process as sandbox_process
from app.dev.sandbox.process import Sandbox
from app.ledger.history import FetchFailed
from app.ledger.rate_limit import WINDOW
from tests.lab_upstream import WorkerLab, worker_lab

MANY = 2000
MOST = 900
"""Requests in five minutes that the key of these tests allows."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with sandbox_process.start() as one:
        yield one


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Writing 20,000 log lines of deferred orders takes half the time of a test."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()


@pytest.fixture
def lab(redis_url: str, sandbox: Sandbox) -> Iterator[WorkerLab]:
    with worker_lab(redis_url, sandbox, requests_per_window=MOST) as one:
        yield one


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
