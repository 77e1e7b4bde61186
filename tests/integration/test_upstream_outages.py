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
from tests.integration.workbench import Workbench, workbench

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
def bench(redis_url: str, sandbox: Sandbox) -> Iterator[Workbench]:
    with workbench(redis_url, sandbox, requests_per_window=MOST) as one:
        yield one


def most_in_a_window(calls: list[int]) -> int:
    """Return the largest number of calls within upstream's five minutes."""
    return max(number + 1 - bisect_left(calls, call - WINDOW + 1000) for number, call in enumerate(calls))


def test_after_half_an_hour_of_outage_all_orders_are_fetched_at_the_allowed_rate(bench: Workbench) -> None:
    bench.issue(MANY)
    bench.fault(kind="status", status=503)

    bench.later(30 * 60)

    assert (bench.pending(), bench.dead()) == (MANY, 0)
    probes, runs = len(bench.calls), bench.runs
    # Only probes of the breaker reach upstream; each order runs about once per opening.
    assert probes < 30
    assert runs < 11 * MANY
    bench.mend()
    bench.later(20 * 60)
    assert (bench.pending(), bench.dead()) == (0, 0)
    assert len(bench.calls) - probes == MANY
    assert most_in_a_window(bench.calls) <= MOST
    assert bench.runs - runs < 2 * MANY


def test_after_an_expired_key_is_replaced_all_orders_are_fetched(bench: Workbench) -> None:
    """A refused key uses no attempt of any order, however long it lasts."""
    orders = bench.issue(300)
    bench.fault(kind="status", status=401)
    bench.later(3600)
    assert (bench.pending(), bench.dead()) == (len(orders), 0)
    assert {bench.field(order, "attempts") for order in orders} == {None}
    refused = len(bench.calls)
    assert refused < 100

    bench.mend()
    bench.use_key("second-key")
    bench.later(10 * 60)

    assert (bench.pending(), bench.dead()) == (0, 0)
    assert len(bench.calls) == refused + len(orders)


@pytest.mark.parametrize(("retry_after", "wait"), [("90", 90), (None, 5)], ids=["Retry-After", "no Retry-After"])
def test_no_worker_calls_while_the_key_is_throttled(bench: Workbench, retry_after: str | None, wait: int) -> None:
    """A 429 defers all orders of the key, uses no attempt, and makes no dead letter."""
    orders = bench.issue(100)
    bench.fault(kind="status", status=429, calls=3, retry_after=retry_after)

    bench.later(30 * 60)

    assert (bench.pending(), bench.dead()) == (0, 0)
    assert len(bench.calls) == len(orders) + 3
    pauses = [later - sooner for sooner, later in zip(bench.calls, bench.calls[1:], strict=False)]
    assert all(pause >= wait * 1000 for pause in pauses[:3])
    assert not any(
        isinstance(entry, FetchFailed) and entry.outcome == "retry"
        for order in orders
        for entry in bench.history(order)
    )
