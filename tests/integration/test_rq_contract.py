"""The internals of RQ that this service relies on, one test for each with its reason.

Our scripts write RQ's jobs: they must equal a job that `Queue.enqueue` of the installed RQ writes, and work with RQ's
own tools. The worker and the pool rely on names and keys that RQ does not document.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Final
from unittest.mock import patch

import pytest
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import as_text, utcparse
from rq.worker import WorkerStatus
from structlog.testing import capture_logs

from app import log
from app.dev.processes import Process
from app.heartbeat import Configuration
from app.ledger import policy
from app.ledger.redis import Redis
from app.ledger.rq_jobs import BACKFILL, DELIVER_ORDER, FAILURE_TTL, FETCH_ORDER, LIVE, queue, sink_queue
from tests.lab import ONE, SAME_ID, START, Lab, now_ms, order
from tests.service import settings_of_one_company
from workers.pool import WorkerRecovery
from workers.worker import DeliveryJob, FetchJob, OrderWorker

TIMES = {"created_at", "enqueued_at"}
WORKER = "pool-live-1"


def dispatched(bare: Lab) -> None:
    bare.accept()
    bare.redis.delete("rq:queue:ota-live", "rq:queues", *bare.redis.keys("rq:job:*"))
    bare.later(policy.GRACE / 1000)
    assert bare.dispatch() == 1


def stored(shop: Lab) -> None:
    shop.accept_and_fetch()
    shop.redis.delete("rq:queue:ota-live", *shop.redis.keys("rq:job:ota-f-*"))


def dispatched_delivery(shop: Lab) -> None:
    stored(shop)
    shop.redis.delete(f"rq:queue:ota-{SHOP}", *shop.redis.keys("rq:job:*"))
    shop.later(policy.GRACE / 1000)
    assert shop.dispatch() == 1


SHOP: Final = sink_queue("shop")
FETCH: Final = (FETCH_ORDER, tuple(ONE), "fetch order")
DELIVERY: Final = (DELIVER_ORDER, (*ONE, "shop"), "deliver order")
ENQUEUED: Final[dict[str, tuple[str, tuple[str, tuple[str, ...], str], Callable[[Lab], object]]]] = {
    "event": (LIVE, FETCH, Lab.accept),
    "request": (LIVE, FETCH, Lab.request_fetch),
    "backfill": (BACKFILL, FETCH, lambda shop: shop.request_fetch(queue="backfill")),
    "dispatcher": (LIVE, FETCH, dispatched),
    "revision": (SHOP, DELIVERY, stored),
    "dispatcher of a delivery": (SHOP, DELIVERY, dispatched_delivery),
}


def fetched(bare: Lab, job_id: str) -> Job:
    return Job.fetch(job_id, connection=bare.redis, serializer=JSONSerializer)


def enqueued(bare: Lab, queue_name: str = LIVE) -> Job:
    (job_id,) = queue(queue_name, bare.redis).job_ids
    return fetched(bare, job_id)


def hash_of(bare: Lab, job: Job) -> dict[str, bytes | str]:
    """Return the fields of the job's hash as they stand in Redis."""
    return {str(as_text(name)): value for name, value in bare.redis.hgetall(job.key).items()}


@pytest.mark.parametrize("by", ENQUEUED)
def test_a_job_is_field_by_field_what_rq_itself_enqueues(shop: Lab, by: str) -> None:
    queue_name, (function, arguments, description), enqueue = ENQUEUED[by]
    enqueue(shop)
    ours = enqueued(shop, queue_name)
    queues = shop.redis.smembers("rq:queues")
    queue(queue_name, shop.redis).enqueue(
        function,
        args=arguments,
        job_timeout=policy.JOB_TIMEOUT,
        result_ttl=0,
        failure_ttl=FAILURE_TTL,
        description=description,
        job_id="theirs",
    )
    theirs = fetched(shop, "theirs")
    our_hash, their_hash = hash_of(shop, ours), hash_of(shop, theirs)
    # Nothing of an event but the ids of its order.
    assert ("CM-" in str(our_hash), ONE.order_id in str(our_hash)) == (False, True)

    assert our_hash.keys() == their_hash.keys()
    for name in our_hash.keys() - {"data", *TIMES}:
        assert (name, our_hash[name]) == (name, their_hash[name])
    # Ours is not compressed: RQ restores either form, and Lua has no zlib.
    assert ours.data == theirs.data
    assert (ours.func_name, ours.args, ours.kwargs) == (theirs.func_name, theirs.args, theirs.kwargs)
    for name in TIMES:
        at, like = str(as_text(our_hash[name])), str(as_text(their_hash[name]))
        assert re.sub(r"\d", "9", at) == re.sub(r"\d", "9", like)
        assert abs(utcparse(at) - utcparse(like)) < timedelta(minutes=1)
    assert shop.redis.ttl(ours.key) == shop.redis.ttl(theirs.key) == -1
    assert queues == shop.redis.smembers("rq:queues")


@pytest.mark.parametrize("left", [{"status": "failed", "data": "x", "exc_info": "x"}, "a text"])
def test_what_is_left_under_the_id_of_a_new_job_is_replaced(bare: Lab, left: dict[str, str] | str) -> None:
    """Redis was restored from an older copy, which counts the generations again."""
    bare.accept()
    job = enqueued(bare)
    expected = hash_of(bare, job)
    bare.redis.delete(*bare.redis.keys("ota:*"), job.key)
    if isinstance(left, str):
        bare.redis.set(job.key, left)
    for field, value in left.items() if isinstance(left, dict) else ():
        bare.redis.hset(job.key, field, value)

    bare.accept()

    times = dict.fromkeys(TIMES, "")
    assert hash_of(bare, job) | times == expected | times


def test_each_process_writes_the_jobs_of_its_own_rq(bare: Lab) -> None:
    """While a deployment is replaced, both versions write jobs in turns."""
    with patch.object(policy, "JOB_TIMEOUT", 7):
        other = Lab(bare.redis, sinks=(), now=START)
    for lab, number in ((bare, 1), (other, 2), (bare, 3), (other, 4)):
        lab.accept(order(number))

    jobs = [fetched(bare, job_id) for job_id in queue(LIVE, bare.redis).job_ids]
    assert [job.timeout for job in jobs] == [policy.JOB_TIMEOUT, 7] * 2
    assert [tuple(job.args) for job in jobs] == [order(number) for number in (1, 2, 3, 4)]


def test_job_ids_are_never_used_twice(bare: Lab) -> None:
    """RQ deletes the hash when the first job of an id ends, and skips the second without an error."""
    ids: list[str] = []
    for push in (bare.accept, bare.request_fetch, bare.dispatch, bare.request_fetch, bare.accept):
        bare.later(bare.due_in() or 0)
        push()
        ids += queue(LIVE, bare.redis).job_ids
        bare.redis.delete("rq:queue:ota-live")
        bare.try_start(worker=f"w{len(ids)}")

    assert len(ids) == len(set(ids)) == 5


def worker(bare: Lab, kind: type[OrderWorker] = OrderWorker, queues: Sequence[str] = (LIVE,)) -> OrderWorker:
    """Return a worker as the pool's children make it, in this process."""
    of_sink = any(one.startswith("sink-") for one in queues)
    return kind(
        WORKER,
        queues,
        bare.redis,
        memoryview(bytearray(8)).cast("d"),
        DeliveryJob if of_sink else FetchJob,
    )


@pytest.fixture
def signals() -> Iterator[None]:
    """Put back the signal handlers that a worker replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


FOREIGN: Final[dict[str, dict[str, object]]] = {
    "os.abort": {"data": b'["os.abort", null, [], {}]', "success_callback_name": ""},
    "JSONDecodeError": {"data": b"not json"},
    "IndexError": {"data": b"[]"},
    f"{FETCH_ORDER} with other arguments": {"data": b'["workers.jobs.fetch_order", "os", ["a", "b"], {}]'},
    "success_callback_name": {"success_callback_name": "os.abort"},
    "failure_callback_name": {"failure_callback_name": "os.abort", "timeout": "never"},
    "stopped_callback_name": {"stopped_callback_name": "os.abort", "status": "stopped"},
    "webhooks": {"webhooks": '[{"url": "http://127.0.0.1:1/", "job_status": "finished"}]'},
    "meta": {"meta": pickle.dumps(Fraction(1))},
    "dependency_ids": {"dependency_ids": "no json"},
    "repeat_intervals": {"repeats_left": 9, "repeat_intervals": "[0]"},
    "retries_left": {"retries_left": 9},
    "\ufffd": {"\udcff": "1"},
    "AssertionError": {"timeout": "never"},
    "ValueError": {"status": "foreign"},
}
"""What `job.refused` names -> what another program has written into the hash of one of our jobs."""


@pytest.mark.parametrize("named", FOREIGN)
@pytest.mark.usefixtures("signals")
def test_a_job_that_another_program_wrote_runs_nothing_and_its_order_comes_again(
    bare: Lab, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`os.abort` would end this process. An error that RQ raises while it takes a job would end the worker."""
    monkeypatch.setattr("workers.worker._log", log.get())  # one that has not been used is captured
    bare.accept()
    job = enqueued(bare)
    for name, value in FOREIGN[named].items():
        bare.redis.hset(job.key, name.encode(errors="surrogateescape"), value)  # type: ignore[arg-type]

    with capture_logs() as lines:
        worker(bare).work(burst=True, logging_level="CRITICAL")

    assert [line["function"] for line in lines if line["event"] == "job.refused"] == [named]
    assert (len(bare.queued()), bare.field("started_generation")) == (0, None)
    bare.later(policy.GRACE / 1000)
    assert (bare.dispatch(), bare.queued()) == (1, [ONE.order_id])


OTHER_CALLS: Final[dict[str, list[object]]] = {
    FETCH_ORDER: [FETCH_ORDER, None, [*ONE], {}],
    f"{DELIVER_ORDER} with other arguments": [DELIVER_ORDER, None, [*ONE, "mail"], {}],
    f"{DELIVER_ORDER} with other arguments ": [DELIVER_ORDER, None, [*SAME_ID, "shop"], {}],
}


@pytest.mark.parametrize("named", OTHER_CALLS)
@pytest.mark.usefixtures("signals")
def test_a_worker_of_a_sink_delivers_the_order_of_the_job_to_this_sink_and_does_nothing_else(
    shop: Lab, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.worker._log", log.get())
    stored(shop)
    shop.redis.hset(enqueued(shop, SHOP).key, "data", json.dumps(OTHER_CALLS[named]))
    before = shop.record()

    with capture_logs() as lines:
        worker(shop, queues=(SHOP,)).work(burst=True, logging_level="CRITICAL")

    assert [line["function"] for line in lines if line["event"] == "job.refused"] == [named.strip()]
    assert shop.record() == before


@pytest.mark.usefixtures("signals")
def test_a_worker_that_fetches_runs_no_delivery(shop: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.worker._log", log.get())
    stored(shop)
    shop.redis.lmove(f"rq:queue:ota-{SHOP}", "rq:queue:ota-live")

    with capture_logs() as lines:
        worker(shop).work(burst=True, logging_level="CRITICAL")

    assert [line["function"] for line in lines if line["event"] == "job.refused"] == [DELIVER_ORDER]


class Killed(SystemExit):
    """Ends a worker in the middle of a job, as a kill would."""


class KilledWhenTaken(OrderWorker):
    def execute_job(self, job: Job, queue: Queue) -> None:
        raise Killed


class KilledWhenStarted(OrderWorker):
    def perform_job(self, *arguments: object, **named: object) -> bool:
        raise Killed


class Noting(OrderWorker):
    def execute_job(self, job: Job, queue: Queue) -> None:
        self.connection.rpush("test:queues", queue.name)
        super().execute_job(job, queue)


@pytest.mark.usefixtures("signals")
def test_a_worker_of_two_queues_takes_the_first_one_first(bare: Lab) -> None:
    """The live workers of a pool without backfill workers serve both, and a replay delays no event."""
    bare.request_fetch(order(2), order(3), queue="backfill")
    bare.accept(order(1), order(4))

    worker(bare, Noting, (LIVE, BACKFILL)).work(burst=True, logging_level="CRITICAL")

    assert bare.redis.lrange("test:queues", 0, -1) == [b"ota-live"] * 2 + [b"ota-backfill"] * 2


@pytest.mark.parametrize("queues", [(LIVE,), (LIVE, BACKFILL), (SHOP,)], ids=["one queue", "two queues", "sink"])
@pytest.mark.parametrize("kind", [KilledWhenTaken, KilledWhenStarted])
@pytest.mark.usefixtures("signals")
def test_the_pool_finds_the_order_of_a_job_that_a_killed_worker_had_taken(
    shop: Lab, kind: type[OrderWorker], queues: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ lists it in the intermediate queue, then in the worker's executions; RQ's own recovery takes minutes."""
    # A killed worker does not unregister, which removes its executions.
    monkeypatch.setattr(kind, "teardown", lambda self: None)
    if BACKFILL in queues:
        shop.request_fetch(queue="backfill")
    elif SHOP in queues:
        stored(shop)
    else:
        shop.accept()
    with pytest.raises(Killed):
        worker(shop, kind, queues).work(burst=True, logging_level="CRITICAL")
    waits = shop.delivery_in if SHOP in queues else shop.due_in
    assert waits() == policy.GRACE / 1000

    WorkerRecovery(shop.redis, shop.ledger, [], Configuration()).release(WORKER, "killed")

    assert waits() == 0


@pytest.mark.usefixtures("signals")
def test_a_worker_has_no_thread_for_commands(bare: Lab) -> None:
    """RQ starts it in `subscribe`; it would cost each worker a thread and a second connection."""
    made = worker(bare)

    made.work(burst=True, logging_level="CRITICAL")

    assert (made.pubsub, made.pubsub_thread) == (None, None)


@pytest.mark.usefixtures("signals")
def test_a_second_signal_does_not_cut_off_a_fetch(bare: Lab) -> None:
    """RQ makes `request_force_stop` the handler when `request_stop` has run."""
    made = worker(bare)
    made._install_signal_handlers()
    made.set_state(WorkerStatus.BUSY)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)

    assert signal.getsignal(signal.SIGTERM) == made.request_force_stop
    assert made._stop_requested


def test_a_plain_rq_worker_runs_the_jobs(redis_client: Redis, redis_url: str, free_port: int, tmp_path: Path) -> None:
    """Upstream refuses the connection: RQ sees success, and the order stays pending with a time of its own.

    Another one is delivered; what the sink prints is in the log.
    """
    sink, other = "python:prints:on_order", order(2)
    bare = Lab(redis_client, sinks=(sink,), now=now_ms())
    bare.accept_and_fetch(other)
    bare.redis.delete("rq:queue:ota-live")
    (tmp_path / "prints.py").write_text("print('imported')\ndef on_order(order, context): print('taken')\n")
    settings = settings_of_one_company(redis_url) | {
        "SINKS": sink,
        "PYTHONPATH": str(tmp_path),
        "RQ_REDIS_URL": redis_url,
        "NP_BASE_URL": f"http://127.0.0.1:{free_port}",
        "NP_COMPANY_ID": ONE.company_id,
    }
    program = [str(Path(sys.executable).with_name("rq")), "worker", "--burst"]
    program += ["--serializer", "rq.serializers.JSONSerializer", f"ota-{LIVE}", f"ota-{sink_queue(sink)}"]
    bare.accept()
    job = enqueued(bare)

    with Process.start(program, env={**os.environ, **settings}, cwd=tmp_path, log=tmp_path / "log") as process:
        assert process.wait(60) == 0, process.output
        for text in ("imported", "taken"):
            assert re.search(rf'"event":"sink.output".*"text":"{text}"', process.output), process.output
    assert bare.field(f"{sink}:revision", other) == "1"

    assert (len(bare.queued()), bare.redis.exists(job.key)) == (0, 0)
    assert len(FailedJobRegistry(LIVE, connection=bare.redis, serializer=JSONSerializer)) == 0
    assert bare.fields("generation", "fetched_generation", "deferrals") == ["1", None, "1"]
    assert (bare.due_in() or 0) > 0
