"""A worker is killed at each of its steps, and its order is fetched once, soon, and delivered to the sink."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.dev.processes import Process
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.history import FetchStored, parse_entry
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.lab import KEYS
from tests.service import Service, children, is_running, service

SINK = """
import os, pathlib, subprocess, time

def forks(order, context):
    if os.path.exists("children"):
        return
    # A child, one in a session of its own, and one that has detached itself from its parent.
    children = [subprocess.Popen(["sleep", "600"], start_new_session=own) for own in (False, True)]
    if os.fork() == 0:
        os.setsid()
        children = [subprocess.Popen(["sh", "-c", "sleep 600; true"])]
        pathlib.Path("detached").write_text(str(children[0].pid))
        os._exit(0)
    pathlib.Path("children").write_text(" ".join(str(pid) for pid in [os.getpid(), *(child.pid for child in children)]))
    time.sleep(600)

def on_order(order, context):
    with open("delivered", "a") as file:
        file.write(context.idempotency_key + "\\n")
    poison = pathlib.Path("poison")
    if poison.exists() and order.order_id in poison.read_text():
        if "exits" in poison.read_text():
            os._exit(0)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
"""
SINK_NAME = "python:kill_sink:on_order"
SOON = 5.0
"""Seconds until an order is fetched whose worker died: the pool notices at once and dispatches each second."""

# Step -> getOrder calls and deliveries of an order whose worker is killed there. An answer that was not stored costs a
# second getOrder, a stored one never. A delivery is repeated if its end was not recorded.
STEPS = {
    "execute_job:before": (1, 1),
    "prepare_job_execution:before": (1, 1),
    "prepare_job_execution:after": (1, 1),
    "start_fetch:before": (1, 1),
    "start_fetch:after": (1, 1),
    "permit:before": (1, 1),
    "permit:after": (1, 1),
    "get_order:before": (1, 1),
    "get_order:after": (2, 1),
    "_call_release:before": (2, 1),
    "_call_release:after": (2, 1),
    "store_fetch:before": (2, 1),
    "store_fetch:after": (1, 1),
    "acquire_delivery:before": (1, 1),
    "acquire_delivery:after": (1, 1),
    "deliver:before": (1, 1),
    "deliver:after": (1, 2),
    "complete_delivery:before": (1, 2),
    "complete_delivery:after": (1, 1),
    "handle_job_success:before": (1, 1),
    "handle_job_success:after": (1, 1),
    "execute_job:after": (1, 1),
}
# In every run: where what is lost and what is repeated changes. The nightly run has all.
ALWAYS = {
    *("execute_job:before", "start_fetch:after", "get_order:after", "store_fetch:before", "store_fetch:after"),
    *("deliver:after", "complete_delivery:after", "execute_job:after"),
}


class Killing:
    """A service whose workers die at chosen steps."""

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
        """Stop the pool and empty Redis."""
        if self.pool is not None and self.pool.exit_code is None:
            assert self.pool.stop(20) == 0
        self.redis.flushall()
        self._stop_file.unlink(missing_ok=True)

    def kill_at(self, *steps: str) -> None:
        """Let the next process die that comes to the first step, then one that comes to the second."""
        draft = self._stop_file.with_suffix(".draft")
        draft.write_text(" ".join(steps))
        draft.rename(self._stop_file)

    def killed(self) -> bool:
        return not self._stop_file.exists()

    def post(self, *orders: str) -> None:
        assert self.service.post(*map(self.service.event, orders))[0] == 200

    def key(self, order: str) -> OrderKey:
        return OrderKey(self.service.company_id, order)

    def record(self, order: str) -> dict[str, str]:
        found: Any = self.redis.hgetall(KEYS.record(self.key(order)))
        return {name.decode(): value.decode() for name, value in found.items()}

    def is_fetched(self, order: str) -> bool:
        """Return whether the order is fetched and delivered."""
        record = self.record(order)
        is_stored = int(record.get("fetched_generation", 0)) >= int(record.get("generation", 1))
        clocks, member = (KEYS.due, KEYS.deliveries(SINK_NAME)), self.key(order).member
        return is_stored and all(self.redis.zscore(clock, member) is None for clock in clocks)

    def stored(self, order: str) -> int:
        """Return the number of stored answers."""
        entries: Any = self.redis.lrange(KEYS.history(self.key(order)), 0, -1)
        return sum(isinstance(parse_entry(entry), FetchStored) for entry in entries)

    def keys(self, order: str) -> list[str]:
        """Return the idempotency key of each delivery."""
        path = self.service.folder / "delivered"
        return [key for key in path.read_text().split() if order in key] if path.exists() else []

    def deliveries(self, order: str) -> int:
        return len(self.keys(order))

    def gets(self, order: str) -> int:
        return int(self.service.row(order)["gets"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killing]:
    folder: Path = tmp_path_factory.mktemp("kills")
    (folder / "kill_sink.py").write_text(SINK)
    with service(folder) as one:
        one.start_valkey()
        one.start_sandbox()
        one.variables |= {"SINKS": SINK_NAME, "UPSTREAM_TIMEOUT": "5"}
        one.start("web")
        yield Killing(one)


@pytest.fixture
def killing(shared: Killing) -> Iterator[Killing]:
    """No pool runs; at the end the test's pool is stopped and Redis emptied."""
    shared.end()
    shared.service.admin("DELETE", "faults")
    yield shared
    shared.end()


@pytest.fixture
def one_worker(shared: Killing) -> Killing:
    """One pool with one worker for all steps."""
    if shared.pool is None or shared.pool.exit_code is not None:
        shared.start(WORKERS="1", BACKFILL_WORKERS="0")
    return shared


@pytest.mark.parametrize(
    "step", [one if one in ALWAYS else pytest.param(one, marks=pytest.mark.nightly) for one in STEPS]
)
def test_an_order_is_fetched_though_its_worker_is_killed_at(one_worker: Killing, step: str) -> None:
    killing = one_worker
    (order,) = killing.service.issue()
    killing.kill_at(step)

    killing.post(order)

    eventually(killing.killed, 10, what=f"a worker dies at {step}")
    died_at = time.monotonic()
    eventually(lambda: killing.is_fetched(order), 20, what=f"the order is fetched: {killing.record(order)}")
    assert time.monotonic() - died_at < SOON
    assert killing.stored(order) == 1
    assert (killing.gets(order), killing.deliveries(order)) == STEPS[step]
    assert len(set(killing.keys(order))) == 1, "a repeat has the same key"
    assert "crashes" not in killing.record(order)


@pytest.mark.parametrize(
    "step", ["dispatch_due:before", "dispatch_due:after", "release_worker:before", "release_worker:after"]
)
def test_the_next_pool_fetches_the_order_of_a_pool_that_was_killed_at(killing: Killing, step: str) -> None:
    """The workers die with the pool; orders that they claimed, or whose jobs were pushed, are not lost."""
    pool = killing.start(WORKERS="1", BACKFILL_WORKERS="0")
    (order,) = killing.service.issue()
    workers = children(pool.pid)
    # The pool calls release_worker when a worker has died.
    killing.kill_at(*(["get_order:after"] if step.startswith("release_worker") else []), step)

    killing.post(order)

    pool.wait(10)
    eventually(lambda: not any(map(is_running, workers)), what="the workers have died with the pool")
    killing.start(WORKERS="1", BACKFILL_WORKERS="0")

    # Its job may be lost between queue and worker; the dispatcher pushes another after GRACE, here at once.
    for clock, job in ((KEYS.due, "job"), (KEYS.deliveries(SINK_NAME), f"{SINK_NAME}:job")):
        if killing.record(order).get(job):
            killing.redis.zadd(clock, {killing.key(order).member: 0}, xx=True)
    eventually(lambda: killing.is_fetched(order), 10, what=f"the order is fetched: {killing.record(order)}")
    assert killing.stored(order) == 1
    assert killing.gets(order) <= 2
    assert killing.deliveries(order) >= 1


def test_an_order_whose_fetch_kills_three_workers_is_a_dead_letter_and_delays_no_other(killing: Killing) -> None:
    killing.start(WORKERS="1", BACKFILL_WORKERS="0")
    poison, *others = killing.service.issue(4)
    killing.kill_at(*["get_order:before"] * policy.CRASHES_ALLOWED)
    killing.post(poison)
    eventually(killing.killed, 10, what="three workers died")

    killing.post(*others)

    eventually(lambda: killing.record(poison).get("dead"), 10, what="the order is a dead letter")
    assert killing.record(poison)["dead"] == "kills_worker"
    deaths = killing.service.log("worker", "pool.worker_died")
    of_poison = [line["request_id"] for line in deaths if line["order_id"] == poison]
    assert of_poison == [killing.record(poison)["request_id"]] * policy.CRASHES_ALLOWED
    eventually(lambda: all(killing.is_fetched(order) for order in others), 10, what="the others are fetched")
    # A new event gives it new attempts.
    killing.post(poison)
    eventually(lambda: killing.is_fetched(poison), 10, what="the order is fetched after a new event")


def test_a_sink_that_hangs_is_killed_with_its_worker_and_becomes_a_dead_letter(killing: Killing) -> None:
    """It catches every exception and never returns; the pool kills its worker each time."""
    killing.start(WORKERS="2", BACKFILL_WORKERS="0", OVERDUE="1")
    poison, *others = killing.service.issue(4)
    (killing.service.folder / "poison").write_text(poison)
    killing.post(poison)
    eventually(lambda: killing.deliveries(poison) == 1, 10, what="the sink hangs")

    killing.post(*others)

    eventually(lambda: all(killing.is_fetched(order) for order in others), 10, what="the others are fetched")
    eventually(lambda: killing.redis.zcard(KEYS.dead_deliveries) == 1, 20, what="the delivery is a dead letter")
    assert killing.record(poison)["python:kill_sink:on_order:dead"] == "kills_worker"
    assert killing.deliveries(poison) == policy.CRASHES_ALLOWED
    assert killing.gets(poison) == 1
    assert len(killing.service.log("worker", "worker.timed_out")) == policy.CRASHES_ALLOWED


def test_a_sink_that_ends_its_worker_becomes_a_dead_letter_after_three_attempts(killing: Killing) -> None:
    """With exit code 0 too: an attempt a second would use up those of a day."""
    killing.start(WORKERS="1", BACKFILL_WORKERS="0")
    (poison,) = killing.service.issue()
    (killing.service.folder / "poison").write_text(f"{poison} exits")

    killing.post(poison)

    eventually(lambda: killing.redis.zcard(KEYS.dead_deliveries) == 1, 20, what="the delivery is a dead letter")
    assert killing.record(poison)["python:kill_sink:on_order:dead"] == "kills_worker"
    assert killing.deliveries(poison) == policy.CRASHES_ALLOWED


@pytest.mark.parametrize("who", ["worker", "pool"])
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose processes are left behind")
def test_processes_that_a_sink_leaves_behind_end_with(killing: Killing, who: str) -> None:
    pool = killing.start(WORKERS="1", BACKFILL_WORKERS="0", SINKS="python:kill_sink:forks", OVERDUE="600")
    files = [killing.service.folder / name for name in ("children", "detached")]
    for file in files:
        file.unlink(missing_ok=True)
    killing.post(*killing.service.issue())
    eventually(lambda: all(file.exists() and file.read_text() for file in files), 10, what="the sink has forked")
    worker, *left = [int(pid) for file in files for pid in file.read_text().split()]
    left += eventually(lambda: children(left[-1]), what="the last one has forked too")
    assert len(left) == 4
    assert all(map(is_running, left))

    os.kill(worker, signal.SIGKILL)
    if who == "pool":
        os.kill(pool.pid, signal.SIGTERM)

    eventually(lambda: not any(map(is_running, left)), what="they have ended")
