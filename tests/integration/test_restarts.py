"""Redis fails while a worker holds an answer, or comes back with less than it had: restored, flushed or killed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx
import pytest
from redis.exceptions import RedisError

from app.dev import valkey as server
from app.dev.sandbox.process import Sandbox
from app.dev.valkey import Valkey
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.history import FetchStored
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.integration.relay import relay
from tests.lab import DUPLICATE, KEYS, ONE, QUEUED, SAME_ID, START, Lab
from tests.lab_upstream import Shop, WorkerLab, worker_lab
from tests.service import HOOK, item, serving, settings_of_one_company

GRACE = policy.GRACE / 1000
SENT, SENT_LATER = "2026-11-22T10:00:00Z", "2026-11-22T11:00:00Z"


class Copy:
    """A copy of what a server has on disk."""

    def __init__(self, server: Valkey, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._data = server.data_dir / "appendonlydir"

    def take(self) -> None:
        self._server.stop()
        shutil.copytree(self._data, self._folder)
        self._server.restart()

    def put_back(self) -> None:
        self._server.stop()
        shutil.rmtree(self._data)
        shutil.copytree(self._folder, self._data)
        self._server.restart()


class TestAnOlderCopyIsRestored:
    """The folder of Redis is copied, the service works on, and the copy is put back."""

    @pytest.fixture
    def shop(self, own_valkey: Valkey) -> Iterator[Lab]:
        with Redis.from_url(own_valkey.url, socket_timeout=5) as client:
            yield Lab(client, sinks=("shop",), now=START)

    @pytest.fixture
    def copy(self, own_valkey: Valkey, tmp_path: Path) -> Copy:
        return Copy(own_valkey, tmp_path / "copy")

    def test_events_since_the_copy_are_accepted_again_older_ones_are_duplicates(self, shop: Lab, copy: Copy) -> None:
        """Without its event an order is missing until a request, such as that of reconcile."""
        shop.accept(ONE, timestamp=SENT)
        copy.take()
        shop.accept(SAME_ID, timestamp=SENT_LATER)
        copy.put_back()

        assert shop.try_start(SAME_ID) == "nothing"
        assert (shop.accept(ONE, timestamp=SENT), shop.accept(SAME_ID, timestamp=SENT_LATER)) == (DUPLICATE, QUEUED)
        assert shop.try_start(SAME_ID) == "fetch"

    def test_an_order_fetched_since_the_copy_is_pending_and_fetched_again(self, shop: Lab, copy: Copy) -> None:
        shop.accept()
        copy.take()
        assert shop.fetch_and_store() == "fetched"
        copy.put_back()

        shop.later(GRACE)
        assert shop.dispatch() == 1
        assert shop.fetch_and_store(worker="after") == "fetched"

    def test_a_running_fetch_counts_for_no_settlement_of_the_restored_ledger(self, shop: Lab, copy: Copy) -> None:
        """It saw three settlements of a ledger that is no more: the next ones must not look fetched."""
        shop.accept()
        copy.take()
        shop.accept()
        shop.accept()
        fetch = shop.start_fetch(worker="before")
        copy.put_back()

        assert shop.store_fetch(fetch, 1, worker="before") == "refused"
        for version in range(2, 4):
            assert shop.accept_and_fetch(answer=version) == "fetched"
            assert shop.field("digest") == str(version)


class TestRedisIsFlushed:
    def test_a_running_fetch_does_not_count_as_that_of_a_new_event(self, shop: Lab) -> None:
        """It was read before the event came, and the new record never gave its fencing token."""
        for _ in range(3):
            shop.accept()
        fetch = shop.start_fetch(worker="before")
        shop.redis.flushall()
        assert shop.store_fetch(fetch, 1, worker="before") == "refused"
        assert shop.fail_fetch("retry", fetch=fetch, worker="before") == "refused"
        assert shop.redis.keys("*") == [KEYS.schema.encode()]
        shop.accept()

        assert shop.store_fetch(fetch, 1, worker="before") == "refused"

        assert shop.fetch_and_store(answer=2, worker="after") == "fetched"
        assert (shop.field("digest"), shop.field("fetched_generation")) == ("2", "1")

    def test_a_fetch_that_failed_for_good_makes_no_dead_letter_of_a_new_event(self, shop: Lab) -> None:
        shop.accept()
        fetch = shop.start_fetch(worker="before")
        shop.redis.flushall()
        shop.accept()

        assert shop.fail_fetch("dead", fetch=fetch, worker="before") == "refused"

        assert not shop.is_dead()
        assert shop.try_start(worker="after") == "fetch"

    def test_a_running_delivery_does_not_count_as_one_of_the_new_content(self, shop: Lab) -> None:
        for version in range(3):
            shop.accept_and_fetch(answer=version)
        delivery = shop.start_delivery(worker="before")
        assert delivery.revision == 3
        shop.redis.flushall()
        shop.accept_and_fetch(answer=9)

        shop.complete_delivery(delivery, worker="before")

        again = shop.start_delivery(worker="after")
        assert (again.revision, again.raw) == (1, b"9")


def test_nothing_that_was_answered_200_is_lost_when_redis_is_killed(own_valkey: Valkey, tmp_path: Path) -> None:
    """Four senders POST batches while Redis is killed and comes back, twice; the append-only file has all of it."""
    acknowledged: list[str] = []
    statuses: set[int] = set()
    stop = threading.Event()

    def send(port: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as http:
            while not stop.is_set():
                ids = [str(uuid4()) for _ in range(5)]
                answer = http.post(HOOK, json={"values": [item(one) for one in ids]})
                statuses.add(answer.status_code)
                if answer.status_code == 200:
                    acknowledged.extend(ids)

    def more() -> None:
        """Wait until the web process, which runs all the time, has acknowledged 100 more events."""
        before = len(acknowledged)
        eventually(lambda: len(acknowledged) > before + 100, what="events are acknowledged")

    with serving(tmp_path, settings_of_one_company(own_valkey.url)) as web, ThreadPoolExecutor(4) as threads:
        senders = [threads.submit(send, web.port) for _ in range(4)]
        try:
            for _ in range(2):
                more()
                own_valkey.kill()
                own_valkey.restart()
            more()
        finally:
            stop.set()
    for sender in senders:
        sender.result()

    with Redis.from_url(own_valkey.url) as client:
        lab = Lab(client)
        recorded = {event["order"] for event in lab.events()}
        due = {order.order_id for order in lab.due()}
    assert set(acknowledged) <= recorded
    assert recorded == due
    assert statuses <= {200, 503}


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
def refusing(own_valkey: Valkey) -> Iterator[Callable[[str, str], Fault]]:
    """Makes a fault that begins with one command and ends a while later with another."""
    timers: list[threading.Timer] = []

    def run(command: str) -> None:
        with Redis.from_url(own_valkey.url) as client:
            client.execute_command(*command.split())

    def refuse(begin: str, end: str) -> None:
        run(begin)
        timers.append(threading.Timer(UNAVAILABLE, run, (end,)))
        timers[0].start()

    yield lambda begin, end: Fault(own_valkey.url, partial(refuse, begin, end))
    for timer in timers:
        timer.join()


READ_ONLY: Final = ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE")


@pytest.fixture(params=["killed", "read-only", "answer lost"])
def fault(request: pytest.FixtureRequest) -> Fault:
    if request.param == "read-only":
        found: Fault = request.getfixturevalue("refusing")(*READ_ONLY)
        return found
    if request.param == "answer lost":
        return Fault(request.getfixturevalue("redis_url"), error=AnswerLost())
    own: Valkey = request.getfixturevalue("own_valkey")

    with Redis.from_url(own.url) as client:
        # With everysec a server on a busy disk holds back its writes for up to two seconds, and a kill loses them.
        client.config_set("appendfsync", "always")

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

        assert (lab.field("deferrals", order), lab.field("lease", order), lab.pending()) == ("1", None, 1)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        READ_ONLY,
        ("ACL SETUSER default -zadd", "ACL SETUSER default +zadd"),
        ("CONFIG SET min-replicas-to-write 1", "CONFIG SET min-replicas-to-write 0"),
    ],
)
def test_redis_unavailable_before_the_getorder_uses_no_attempt(
    sandbox: Sandbox, refusing: Callable[[str, str], Fault], begin: str, end: str
) -> None:
    """The start of the fetch gets no permit: its worker asks alone, as where it has waited for one in vain."""
    fault = refusing(begin, end)
    with worker_lab(fault.url, sandbox) as lab:
        start = lab.ledger.start_fetch
        setattr(lab.ledger, "start_fetch", lambda order, worker, _: start(order, worker))  # noqa: B010  # as `interrupt`
        interrupt(lab.limiter, "permit", fault)
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
            eventually(lambda: new.exists(KEYS.due) == 1, 20, what="the second server has the data")
            new.execute_command("REPLICAOF", "NO", "ONE")
            address.target = second.port
            old.execute_command("REPLICAOF", "127.0.0.1", second.port)

        interrupt(lab.ledger, "store_fetch", Fault("", fail_over))
        (order,) = lab.issue()

        lab.work()

        assert (len(lab.calls), lab.pending(), lab.field("fetched_generation", order)) == (1, 0, "1")
        assert new.hget(KEYS.record(order), "fetched_generation") == b"1"


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
