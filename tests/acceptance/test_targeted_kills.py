"""A worker is killed at each of its steps in turn, and its order comes home: once, soon, and to the sink."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from app.dev.processes import Process
from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.history import FetchStored, parse_entry
from tests.eventually import eventually
from tests.pids import children, is_running
from tests.service import Service, service

SINK = """
import os, pathlib, time

def on_order(order, context):
    with open("delivered", "a") as file:
        file.write(f"{order.order_id} {context.revision}\\n")
    poison = pathlib.Path("poison")
    if poison.exists() and poison.read_text() == order.order_id:
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
"""
SOON = 5.0
"""Seconds in which an order is home when only its worker died: the pool sees that at once and ticks each second."""

# Killed here, the order is not yet stored ...
BEFORE_STORED = [
    "taken",
    "registered",
    "prepared",
    "start_fetch:before",
    "start_fetch:after",
    "permit:before",
    "permit:after",
    "get_order:before",
    "get_order:after",
    "release:before",
    "release:after",
    "store_fetch:before",
]
# ... or was not handed on for certain ...
BEFORE_HANDED = [
    "store_fetch:after",
    "acquire_delivery:before",
    "acquire_delivery:after",
    "deliver:before",
    "deliver:after",
    "complete_delivery:before",
]
# ... or all was done.
AFTERWARDS = ["complete_delivery:after", "bookkeeping:before", "bookkeeping:after", "ended"]


class Killing:
    """A service whose workers die where they are told to."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.redis = Redis.from_url(self.service.variables["REDIS_URL"])
        self.pool: Process | None = None
        self._stop_file = service.folder / "stop"

    def start(self, **variables: str) -> Process:
        argv = [sys.executable, "-m", "tests.acceptance.stopping_worker"]
        self.pool = self.service.run(argv, "worker.log", STOP_FILE=str(self._stop_file), **variables)
        self.pool.wait_for_line("pool.worker_started", 20)
        return self.pool

    def end(self) -> None:
        """Let the pool end in good order, and its keys with it."""
        if self.pool is not None and self.pool.exit_code is None:
            assert self.pool.stop(20) == 0
        self.redis.flushall()
        self._stop_file.unlink(missing_ok=True)

    def kill_at(self, *steps: str) -> None:
        """Let the next process that comes to the first step die there, then one that comes to the second."""
        draft = self._stop_file.with_suffix(".draft")
        draft.write_text(" ".join(steps))
        draft.rename(self._stop_file)

    def killed(self) -> bool:
        return not self._stop_file.exists()

    def issue(self, count: int = 1) -> list[OrderKey]:
        """Make issued orders at the Channel Manager, without events."""
        return [OrderKey(self.service.company_id, order_id) for order_id in self.service.issue(count)]

    def tell(self, *orders: OrderKey) -> None:
        """Let the webhook be told of the orders."""
        assert self.service.post(*(self.service.event(order.order_id) for order in orders))[0] == 200

    def redis_answers(self) -> bool:
        with suppress(RedisError):
            return bool(self.redis.ping())
        return False

    def record(self, order: OrderKey) -> dict[str, str]:
        found: Any = self.redis.hgetall(keys.record(order))
        return {name.decode(): value.decode() for name, value in found.items()}

    def is_home(self, order: OrderKey) -> bool:
        record = self.record(order)
        is_stored = int(record.get("fetched_generation", 0)) >= int(record.get("generation", 1))
        return is_stored and self.redis.zscore(keys.DUE, order.member) is None

    def stored(self, order: OrderKey) -> int:
        """Return how often an answer was stored."""
        entries: Any = self.redis.lrange(keys.history(order), 0, -1)
        return sum(isinstance(parse_entry(entry), FetchStored) for entry in entries)

    def deliveries(self, order: OrderKey) -> int:
        path = self.service.folder / "delivered"
        return path.read_text().count(order.order_id) if path.exists() else 0

    def gets(self, order: OrderKey) -> int:
        return int(self.service.row(order.order_id)["gets"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killing]:
    folder: Path = tmp_path_factory.mktemp("kills")
    (folder / "kill_sink.py").write_text(SINK)
    with service(folder) as one:
        one.start_valkey()
        one.start_sandbox()
        one.variables |= {"SINKS": "python:kill_sink:on_order", "UPSTREAM_TIMEOUT": "5"}
        one.start("web")
        killing = Killing(one)
        try:
            yield killing
        finally:
            killing.end()


@pytest.fixture
def killing(shared: Killing) -> Iterator[Killing]:
    """No pool runs yet; what the test starts ends with it, and Redis is empty then."""
    shared.end()
    shared.service.admin("DELETE", "faults")
    yield shared
    shared.end()


@pytest.fixture
def one_worker(shared: Killing) -> Killing:
    """One pool with one worker for all steps: it is killed and started again as they go by."""
    if shared.pool is None or shared.pool.exit_code is not None:
        shared.start(WORKERS="1", BACKFILL_WORKERS="0")
    return shared


@pytest.mark.parametrize("step", [*BEFORE_STORED, *BEFORE_HANDED, *AFTERWARDS])
def test_an_order_comes_home_though_its_worker_is_killed_at(one_worker: Killing, step: str) -> None:
    killing = one_worker
    (order,) = killing.issue()
    killing.kill_at(step)

    killing.tell(order)

    eventually(killing.killed, 10, what=f"a worker dies at {step}")
    died = time.monotonic()
    eventually(lambda: killing.is_home(order), 20, what=f"the order is home: {killing.record(order)}")
    assert time.monotonic() - died < SOON
    assert killing.stored(order) == 1
    gets, deliveries = killing.gets(order), killing.deliveries(order)
    # What was paid for and not stored is paid for twice; what was stored never.
    assert gets == (2 if step in BEFORE_STORED[BEFORE_STORED.index("get_order:after") :] else 1)
    # At least once: who dies between the sink's answer and our note of it makes a repeat.
    assert deliveries == (2 if step in {"deliver:after", "complete_delivery:before"} else 1)
    assert "crashes" not in killing.record(order)


@pytest.mark.parametrize(
    "step", ["dispatch_due:before", "dispatch_due:after", "release_worker:before", "release_worker:after"]
)
def test_the_next_pool_goes_on_where_the_pool_was_killed_at(killing: Killing, step: str) -> None:
    """Its workers die with it; what they held, or the clock gave, is not lost. A second start finds no orphans."""
    pool = killing.start(WORKERS="1", BACKFILL_WORKERS="0")
    (order,) = killing.issue()
    workers = children(pool.pid)
    # The pool comes to release_worker when it finds that its worker has died.
    killing.kill_at(*(["get_order:after"] if step.startswith("release_worker") else []), step)

    killing.tell(order)

    pool.wait(10)
    eventually(lambda: not any(map(is_running, workers)), 5, what="the children died with the pool")
    killing.start(WORKERS="1", BACKFILL_WORKERS="0")

    if killing.record(order).get("job"):
        # Its job may have been lost between queue and worker: the clock looks after GRACE, here at once.
        killing.redis.zadd(keys.DUE, {order.member: 0}, xx=True)
    eventually(lambda: killing.is_home(order), 10, what=f"the order is home: {killing.record(order)}")
    assert killing.stored(order) == 1
    assert killing.gets(order) <= 2
    assert killing.deliveries(order) >= 1


def test_an_order_whose_fetch_ends_three_workers_is_a_dead_letter_and_holds_nobody_up(killing: Killing) -> None:
    killing.start(WORKERS="1", BACKFILL_WORKERS="0")
    poison, *others = killing.issue(4)
    killing.kill_at(*["get_order:before"] * policy.CRASHES_ALLOWED)
    killing.tell(poison)
    eventually(killing.killed, 10, what="three workers died")

    killing.tell(*others)

    eventually(lambda: killing.record(poison).get("dead"), 10, what="the order is given up")
    assert killing.record(poison)["dead"] == "kills_worker"
    eventually(lambda: all(killing.is_home(order) for order in others), 10, what="the others are home")
    # A new event gives it new tries.
    killing.tell(poison)
    eventually(lambda: killing.is_home(poison), 10, what="the order is home after a new event")


def test_a_sink_that_cannot_be_interrupted_is_ended_with_its_worker_and_given_up(killing: Killing) -> None:
    """It swallows every exception and never returns; the pool kills its worker each time, and others come home."""
    killing.start(WORKERS="2", BACKFILL_WORKERS="0", OVERDUE="1")
    poison, *others = killing.issue(4)
    (killing.service.folder / "poison").write_text(poison.order_id)
    killing.tell(poison)
    eventually(lambda: killing.deliveries(poison) == 1, 10, what="the sink hangs")

    killing.tell(*others)

    eventually(lambda: all(killing.is_home(order) for order in others), 10, what="the others are home")
    eventually(lambda: killing.redis.zcard(keys.DEAD_DELIVERIES) == 1, 20, what="the hand-on is given up")
    assert killing.record(poison)["python:kill_sink:on_order:dead"] == "kills_worker"
    assert killing.deliveries(poison) == policy.CRASHES_ALLOWED
    assert killing.gets(poison) == 1
    overdue = killing.service.log("worker", "worker.timed_out")
    assert len(overdue) == policy.CRASHES_ALLOWED


def test_nothing_in_flight_is_lost_when_valkey_is_killed(killing: Killing) -> None:
    """Answers that workers have in hand wait for Redis: hardly an order is fetched twice."""
    killing.start(WORKERS="4", BACKFILL_WORKERS="0")
    orders = killing.issue(30)
    fault = {"kind": "latency", "operation": "getOrder", "seconds": 0.3}
    killing.service.admin("POST", "faults", fault)
    killing.tell(*orders)
    eventually(lambda: sum(map(killing.gets, orders)) >= 8, 10, what="some orders are fetched, some in flight")

    killing.service.valkey.kill()
    killing.service.valkey.restart()
    eventually(killing.redis_answers, 10, what="Valkey has read its data")

    eventually(lambda: all(map(killing.is_home, orders)), 30, what="all orders are home")
    assert all(killing.stored(order) == 1 for order in orders)
    assert sum(map(killing.gets, orders)) <= len(orders) + 4
    assert all(killing.deliveries(order) >= 1 for order in orders)
    assert killing.redis.zcard(keys.DEAD) == 0
