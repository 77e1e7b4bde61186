"""Redis fails while a worker has an answer in hand: the answer is stored when Redis is back, and not paid for twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from app.dev import valkey
from app.dev.sandbox import process as sandbox_process
from app.dev.sandbox.process import Sandbox
from app.dev.valkey import Valkey
from app.ledger import keys
from app.ledger.history import FetchStored
from tests.eventually import eventually
from tests.integration.relay import relay
from tests.integration.workbench import Taking, Workbench, workbench

AWAY = 0.3
"""Seconds; a worker's patience in these tests is the lease, a minute."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with sandbox_process.start() as one:
        yield one


class Interrupted:
    """A part of the service around one of whose steps, once, something happens to Redis."""

    def __init__(self, part: object, step: str, when: str, happen: Callable[[], None]) -> None:
        self._part, self._step, self._when, self._happen = part, step, when, happen
        self.happened = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        if name != self._step or self.happened:
            return found

        def step(*arguments: Any, **named: Any) -> Any:
            if self.happened:
                return found(*arguments, **named)
            self.happened = True
            self._happen()
            answer = found(*arguments, **named)
            if self._when == "answer lost":
                # The server did it; the connection broke before the answer came.
                raise RedisConnectionLost
            if self._when == "machine dies":
                raise MachineDied
            return answer

        return step


class RedisConnectionLost(RedisError):
    """As redis-py would say it."""


class MachineDied(BaseException):
    """Stands for the end of a machine: nobody tells the ledger anything any more."""


def interrupt(bench: Workbench, part: str, step: str, when: str, happen: Callable[[], None]) -> None:
    def wrap(name: str, one: Any) -> object:
        if name != part:
            return one
        if step == "release":
            # Within the retries of the limiter: the script of a permit's release.
            one._release = Interrupted(one, "_release", when, happen)._release
            return one
        return Interrupted(one, step, when, happen)

    bench.use_key("key", wrap)


WHEN = ["killed", "read-only", "answer lost"]
STEPS = [
    ("ledger", "start_fetch"),
    ("limiter", "release"),
    ("ledger", "store_fetch"),
    ("ledger", "acquire_delivery"),
    ("ledger", "complete_delivery"),
]


def no_trouble() -> None:
    """Do nothing: the step itself is what goes wrong."""


@pytest.fixture
def trouble(own_valkey: Valkey, when: str) -> Iterator[Callable[[], None]]:
    """What happens to Redis in this test."""
    threads: list[threading.Timer] = []

    def crash() -> None:
        own_valkey.kill()
        own_valkey.restart()

    def refuse_for_a_while() -> None:
        with Redis.from_url(own_valkey.url) as client:
            client.execute_command("REPLICAOF", "127.0.0.1", 1)
        threads.append(threading.Timer(AWAY, take_writes_again))
        threads[0].start()

    def take_writes_again() -> None:
        with Redis.from_url(own_valkey.url) as client:
            client.execute_command("REPLICAOF", "NO", "ONE")

    yield {
        "killed": crash,
        "read-only": refuse_for_a_while,
        "answer lost": no_trouble,
    }[when]
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(("part", "step"), STEPS, ids=[step for _, step in STEPS])
@pytest.mark.parametrize("when", WHEN)
def test_an_answer_outlasts_redis(
    own_valkey: Valkey, sandbox: Sandbox, trouble: Callable[[], None], when: str, part: str, step: str
) -> None:
    """One getOrder, one stored answer, one hand-on, no try and no crash counted; whichever step it was."""
    shop = Taking()
    with workbench(own_valkey.url, sandbox, {"shop": shop}) as bench:
        interrupt(bench, part, step, when, trouble)
        (order,) = bench.issue()

        bench.work()

        assert (len(bench.calls), bench.owed(), shop.taken) == (1, 0, [order.order_id])
        assert sum(isinstance(entry, FetchStored) for entry in bench.history(order)) == 1
        assert {bench.field(order, name) for name in ("attempts", "crashes", "deferrals", "shop:crashes")} == {None}


@pytest.mark.parametrize("when", WHEN)
def test_a_failure_is_told_when_redis_is_back_and_counted_once(
    own_valkey: Valkey, sandbox: Sandbox, trouble: Callable[[], None], when: str
) -> None:
    with workbench(own_valkey.url, sandbox) as bench:
        interrupt(bench, "ledger", "fail_fetch", when, trouble)
        bench.fault(kind="status", status=503)
        (order,) = bench.issue()

        bench.work()

        assert (bench.field(order, "attempts"), bench.field(order, "lease"), bench.owed()) == ("1", None, 1)


@pytest.mark.parametrize("when", ["read-only"])
def test_redis_unavailable_before_the_getorder_burns_no_try(
    own_valkey: Valkey, sandbox: Sandbox, trouble: Callable[[], None], when: str
) -> None:
    with workbench(own_valkey.url, sandbox) as bench:
        interrupt(bench, "limiter", "permit", when, trouble)
        (order,) = bench.issue()

        bench.work()

        assert (bench.field(order, "attempts"), bench.field(order, "error")) == (None, "redis_unavailable")
        bench.later(60)
        assert (len(bench.calls), bench.owed()) == (1, 0)


def test_a_worker_follows_a_failover_though_its_old_connection_lives_on(
    own_valkey: Valkey, sandbox: Sandbox, tmp_path: Path
) -> None:
    """The old master is a replica now and answers READONLY; only a new connection leads to the new one."""
    with (
        valkey.start(tmp_path / "second") as second,
        relay(own_valkey.port) as address,
        workbench(address.url(own_valkey.url), sandbox) as bench,
        Redis.from_url(own_valkey.url) as old,
        Redis.from_url(second.url) as new,
    ):

        def fail_over() -> None:
            password = own_valkey.url.partition("://:")[2].partition("@")[0]
            new.config_set("masterauth", password)
            new.config_set("requirepass", password)
            new.execute_command("REPLICAOF", "127.0.0.1", own_valkey.port)
            eventually(lambda: new.exists(keys.DUE) == 1, 20, what="the second server has the data")
            new.execute_command("REPLICAOF", "NO", "ONE")
            address.target = second.port
            old.execute_command("REPLICAOF", "127.0.0.1", second.port)

        interrupt(bench, "ledger", "store_fetch", "failed over", fail_over)
        (order,) = bench.issue()

        bench.work()

        assert (len(bench.calls), bench.owed(), bench.field(order, "fetched_generation")) == (1, 0, "1")
        assert new.hget(keys.record(order), "fetched_generation") == b"1"


@pytest.mark.parametrize("step", ["start_fetch", "store_fetch", "complete_delivery"])
def test_an_order_is_home_within_two_minutes_of_the_end_of_a_machine(
    own_valkey: Valkey, sandbox: Sandbox, step: str
) -> None:
    """Nobody sees that its worker died: the lease ends. A hand-on has a longer one: a sink may take two minutes."""
    shop = Taking()
    with workbench(own_valkey.url, sandbox, {"shop": shop}) as bench:
        interrupt(bench, "ledger", step, "machine dies", no_trouble)
        (order,) = bench.issue()
        with pytest.raises(MachineDied):
            bench.work()

        bench.later(120)

        assert bench.field(order, "fetched_generation") == "1"
        bench.later(60)
        assert (bench.owed(), order.order_id in shop.taken) == (0, True)
        assert sum(isinstance(entry, FetchStored) for entry in bench.history(order)) == 1


def test_a_job_that_was_lost_with_its_machine_comes_back_after_grace(own_valkey: Valkey, sandbox: Sandbox) -> None:
    with workbench(own_valkey.url, sandbox) as bench:
        (order,) = bench.issue()
        bench.redis.delete("rq:queue:live")

        bench.later(120)

        assert (bench.field(order, "fetched_generation"), bench.owed(), len(bench.calls)) == ("1", 0, 1)
