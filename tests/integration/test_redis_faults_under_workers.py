"""Redis fails while a worker holds an answer: the answer is stored when Redis is back, without a second getOrder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from redis import Redis
from redis.exceptions import RedisError

from app.dev import valkey as server
from app.dev.sandbox.process import Sandbox
from app.dev.valkey import Valkey
from app.ids import OrderKey
from app.ledger import keys
from app.ledger.history import FetchStored
from tests.eventually import eventually
from tests.integration.relay import relay
from tests.lab_upstream import Shop, WorkerLab, worker_lab

UNAVAILABLE = 0.3
"""Seconds; a worker in these tests repeats a step until its lease ends, for a minute."""


class AnswerLost(RedisError):
    """Redis ran the script, and the connection broke before the answer came."""


class MachineDied(BaseException):
    """Ends the worker; no pool sees it."""


@dataclass
class Fault:
    """Before the interrupted step `before` runs, and after it `error` is raised; only once."""

    url: str
    before: Callable[[], None] = lambda: None
    error: BaseException | None = None
    happened: bool = False

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            first, self.happened = not self.happened, True
            if first:
                self.before()
            answer = call(*arguments, **named)
            if first and self.error:
                raise self.error
            return answer

        return step


def interrupt(part: object, step: str, fault: Fault) -> None:
    """Put the fault around a step of the worker's ledger or limiter."""
    setattr(part, step, fault.around(getattr(part, step)))


@pytest.fixture
def read_only(own_valkey: Valkey) -> Iterator[Fault]:
    """Redis refuses writes for a while."""
    timers: list[threading.Timer] = []

    def replicate(*master: str) -> None:
        with Redis.from_url(own_valkey.url) as client:
            client.execute_command("REPLICAOF", *master)

    def refuse_writes() -> None:
        replicate("127.0.0.1", "1")
        timers.append(threading.Timer(UNAVAILABLE, replicate, ("NO", "ONE")))
        timers[0].start()

    yield Fault(own_valkey.url, refuse_writes)
    for timer in timers:
        timer.join()


@pytest.fixture(params=["killed", "read-only", "answer lost"])
def fault(request: pytest.FixtureRequest) -> Fault:
    if request.param == "read-only":
        found: Fault = request.getfixturevalue("read_only")
        return found
    if request.param == "answer lost":
        return Fault(request.getfixturevalue("redis_url"), error=AnswerLost())
    own: Valkey = request.getfixturevalue("own_valkey")

    def restart() -> None:
        own.kill()
        own.restart()

    return Fault(own.url, restart)


def stored_answers(lab: WorkerLab, order: OrderKey) -> int:
    return sum(isinstance(entry, FetchStored) for entry in lab.history(order))


STEPS: Final[dict[str, Callable[[WorkerLab], object]]] = {
    "start_fetch": lambda lab: lab.ledger,
    "_release": lambda lab: lab.limiter,
    "store_fetch": lambda lab: lab.ledger,
    "acquire_delivery": lambda lab: lab.ledger,
    "complete_delivery": lambda lab: lab.ledger,
}
"""The part of the service that each step belongs to; `_release` is the script, within the retries of the limiter."""


@pytest.mark.parametrize("step", STEPS)
def test_an_answer_is_stored_and_delivered_once_wherever_redis_fails(sandbox: Sandbox, fault: Fault, step: str) -> None:
    """One getOrder, one stored answer, one delivery; no attempt and no crash is counted."""
    shop = Shop()
    with worker_lab(fault.url, sandbox, {"shop": shop}) as lab:
        interrupt(STEPS[step](lab), step, fault)
        (order,) = lab.issue()

        lab.work()

        assert fault.happened
        assert (len(lab.calls), lab.pending(), shop.received) == (1, 0, [order.order_id])
        assert stored_answers(lab, order) == 1
        assert {lab.field(name, order) for name in ("attempts", "crashes", "deferrals", "shop:crashes")} == {None}


def test_a_failure_is_recorded_when_redis_is_back_and_counted_once(sandbox: Sandbox, fault: Fault) -> None:
    with worker_lab(fault.url, sandbox) as lab:
        interrupt(lab.ledger, "fail_fetch", fault)
        lab.fault(kind="status", status=503)
        (order,) = lab.issue()

        lab.work()

        assert (lab.field("attempts", order), lab.field("lease", order), lab.pending()) == ("1", None, 1)


def test_redis_unavailable_before_the_getorder_uses_no_attempt(sandbox: Sandbox, read_only: Fault) -> None:
    with worker_lab(read_only.url, sandbox) as lab:
        interrupt(lab.limiter, "permit", read_only)
        (order,) = lab.issue()

        lab.work()

        assert (lab.field("attempts", order), lab.field("error", order)) == (None, "redis_unavailable")
        lab.run_for(60)
        assert (len(lab.calls), lab.pending()) == (1, 0)


def test_a_worker_follows_a_failover(own_valkey: Valkey, sandbox: Sandbox, tmp_path: Path) -> None:
    """The former primary is a replica now and answers READONLY; only a new connection leads to the new one."""
    with (
        server.start(tmp_path / "second") as second,
        relay(own_valkey.port) as address,
        worker_lab(address.url(own_valkey.url), sandbox) as lab,
        Redis.from_url(own_valkey.url) as old,
        Redis.from_url(second.url) as new,
    ):

        def fail_over() -> None:
            password = own_valkey.url.partition("://:")[2].partition("@")[0]
            new.config_set("masterauth", password)
            new.config_set("requirepass", password)
            old.config_set("repl-diskless-sync-delay", 0)
            new.execute_command("REPLICAOF", "127.0.0.1", own_valkey.port)
            eventually(lambda: new.exists(keys.DUE) == 1, 20, what="the second server has the data")
            new.execute_command("REPLICAOF", "NO", "ONE")
            address.target = second.port
            old.execute_command("REPLICAOF", "127.0.0.1", second.port)

        interrupt(lab.ledger, "store_fetch", Fault("", fail_over))
        (order,) = lab.issue()

        lab.work()

        assert (len(lab.calls), lab.pending(), lab.field("fetched_generation", order)) == (1, 0, "1")
        assert new.hget(keys.record(order), "fetched_generation") == b"1"


@pytest.mark.parametrize("step", ["start_fetch", "store_fetch", "complete_delivery"])
def test_an_order_is_fetched_soon_after_its_workers_machine_died(redis_url: str, sandbox: Sandbox, step: str) -> None:
    """The lease ends. That of a delivery is longer: a sink may take two minutes."""
    shop = Shop()
    with worker_lab(redis_url, sandbox, {"shop": shop}) as lab:
        interrupt(lab.ledger, step, Fault(redis_url, error=MachineDied()))
        (order,) = lab.issue()
        with pytest.raises(MachineDied):
            lab.work()

        lab.run_for(120)

        assert lab.field("fetched_generation", order) == "1"
        lab.run_for(60)
        assert (lab.pending(), order.order_id in shop.received, stored_answers(lab, order)) == (0, True, 1)
