"""How many round trips to Redis a fetched order costs: those of our steps, and those of RQ's worker around them.

A round trip is one request and its answer on one connection; a pipeline is one. docs/performance.md has the table.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from redis.connection import Connection
from rq import SimpleWorker
from rq.serializers import JSONSerializer

from app.dev.sandbox.process import Sandbox
from app.ledger.keys import DEFAULT_PREFIX
from app.ledger.rate_limit import Limits, RateLimiter
from app.ledger.redis import Redis, client_of
from app.ledger.rq_jobs import LIVE
from tests.eventually import eventually
from tests.lab import API_KEY, LEASE, WORKER, company
from tests.lab_upstream import WorkerLab, worker_lab
from workers import jobs
from workers.worker import OrderWorker

ORDERS: Final = 20
MOST: Final = 4
"""Ours for each order, also for one that waits for its permit."""


class Counted:
    """What a client sends, from now on."""

    def __init__(self, client: Redis) -> None:
        self.trips = 0
        counted = self

        class Counting(Connection):
            def send_packed_command(self, command: Any, check_health: bool = True) -> None:
                counted.trips += 1
                super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]  # as redis-py has it

        client.connection_pool.reset()
        client.connection_pool.connection_class = Counting
        client.ping()  # the next command finds a connection
        self.trips = 0


@pytest.fixture
def lab(redis_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerLab]:
    """A lab whose jobs run in RQ's worker, in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with worker_lab(redis_url, sandbox) as one:
        one.use_key(API_KEY)
        monkeypatch.setattr(jobs, "_processor", one.processor)
        yield one
    for number, handler in before.items():
        signal.signal(number, handler)


def order_worker(redis: Redis) -> OrderWorker:
    return OrderWorker(WORKER, [LIVE], redis, memoryview(bytearray(8)).cast("d"))


def plain_worker(redis: Redis) -> SimpleWorker:
    return SimpleWorker([f"ota-{LIVE}"], name=WORKER, connection=redis, serializer=JSONSerializer)


def run(lab: WorkerLab, kind: Callable[[Redis], SimpleWorker], orders: int) -> tuple[int, int]:
    """Return the round trips, ours and RQ's, of a worker that starts, fetches so many orders, and ends."""
    lab.issue(orders)
    ours = Counted(lab.redis)
    with client_of(Redis, lab.url, DEFAULT_PREFIX) as redis:
        theirs = Counted(redis)
        kind(redis).work(burst=True, logging_level="CRITICAL", max_jobs=orders)
        made = ours.trips, theirs.trips
    assert not lab.pending()
    return made


def per_order(lab: WorkerLab, kind: Callable[[Redis], SimpleWorker]) -> tuple[float, float]:
    """Return the round trips of one order more, ours and RQ's."""
    run(lab, kind, 1)  # which loads the scripts
    (ours_1, theirs_1), (ours, theirs) = run(lab, kind, 1), run(lab, kind, 1 + ORDERS)
    return (ours - ours_1) / ORDERS, (theirs - theirs_1) / ORDERS


def test_a_fetched_order_costs_three_round_trips_and_four_of_rq(lab: WorkerLab) -> None:
    """Start with permit, release of the permit, store; RQ: take the job, read it, note its start, and its end."""
    assert per_order(lab, order_worker) == (3, 4)


def test_the_worker_of_rq_itself_would_make_27(lab: WorkerLab) -> None:
    """Of RQ 3.0; if a later one makes fewer, less of OrderWorker may be needed."""
    ours, theirs = per_order(lab, plain_worker)

    assert ours == 3
    assert 20 <= theirs <= 30


def test_an_order_that_waits_for_its_permit_costs_one_round_trip_more(lab: WorkerLab, redis_client: Redis) -> None:
    """The worker that releases a permit hands it over, so that the one that waits need not ask again."""
    path = company("venue", lab.company_id, "Sandbox", "sandbox").path
    limits = Limits(concurrency=5, backfill_concurrency=1, requests_per_window=6000, permit_lease=LEASE)
    others = RateLimiter(redis_client, API_KEY, path, limits, clock=lab.clock)
    run(lab, order_worker, 1)
    held = [others.permit("live") for _ in range(5)]

    def release_when_it_waits() -> None:
        eventually(lambda: redis_client.keys("ota:waiting:*"), what="the worker waits")
        with held[0]:
            pass

    releasing = threading.Thread(target=release_when_it_waits)
    releasing.start()
    ours, _ = run(lab, order_worker, 1)
    releasing.join()

    assert ours == MOST
