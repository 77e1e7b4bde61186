"""The internals of RQ that this service relies on, one test for each with its reason.

Our scripts write RQ's jobs: they must equal a job that `Queue.enqueue` of the installed RQ writes, and work with RQ's
own tools. The worker and the pool rely on names and keys that RQ does not document.
"""

from __future__ import annotations

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
from app.ledger.rq_jobs import BACKFILL, FAILURE_TTL, FETCH_ORDER, LIVE, queue
from tests.lab import ONE, Lab, now_ms, order
from tests.service import settings_of_one_company
from workers.pool import WorkerRecovery
from workers.worker import OrderWorker

TIMES = {"created_at", "enqueued_at"}
WORKER = "pool-live-1"


def dispatched(bare: Lab) -> None:
    bare.accept()
    bare.redis.delete("rq:queue:ota-live", "rq:queues", *bare.redis.keys("rq:job:*"))
    bare.later(policy.GRACE / 1000)
    assert bare.dispatch() == 1


ENQUEUED: Final[dict[str, tuple[str, Callable[[Lab], object]]]] = {
    "event": (LIVE, Lab.accept),
    "request": (LIVE, Lab.request_fetch),
    "backfill": (BACKFILL, lambda bare: bare.request_fetch(queue="backfill")),
    "dispatcher": (LIVE, dispatched),
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
def test_a_job_is_field_by_field_what_rq_itself_enqueues(bare: Lab, by: str) -> None:
    queue_name, enqueue = ENQUEUED[by]
    enqueue(bare)
    ours = enqueued(bare, queue_name)
    queues = bare.redis.smembers("rq:queues")
    queue(queue_name, bare.redis).enqueue(
        FETCH_ORDER,
        args=tuple(ONE),
        job_timeout=policy.JOB_TIMEOUT,
        result_ttl=0,
        failure_ttl=FAILURE_TTL,
        description="fetch order",
        job_id="theirs",
    )
    theirs = fetched(bare, "theirs")
    our_hash, their_hash = hash_of(bare, ours), hash_of(bare, theirs)
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
    assert bare.redis.ttl(ours.key) == bare.redis.ttl(theirs.key) == -1
    assert queues == bare.redis.smembers("rq:queues")


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
    return kind(WORKER, queues, bare.redis, memoryview(bytearray(8)).cast("d"))


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


@pytest.mark.parametrize("queues", [(LIVE,), (LIVE, BACKFILL)], ids=["one queue", "two queues"])
@pytest.mark.parametrize("kind", [KilledWhenTaken, KilledWhenStarted])
@pytest.mark.usefixtures("signals")
def test_the_pool_finds_the_order_of_a_job_that_a_killed_worker_had_taken(
    bare: Lab, kind: type[OrderWorker], queues: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ lists it in the intermediate queue, then in the worker's executions; RQ's own recovery takes minutes."""
    # A killed worker does not unregister, which removes its executions.
    monkeypatch.setattr(kind, "teardown", lambda self: None)
    if BACKFILL in queues:
        bare.request_fetch(queue="backfill")
    else:
        bare.accept()
    with pytest.raises(Killed):
        worker(bare, kind, queues).work(burst=True, logging_level="CRITICAL")
    assert bare.due_in() == policy.GRACE / 1000

    WorkerRecovery(bare.redis, bare.ledger, [], Configuration()).release(WORKER, "killed")

    assert bare.due_in() == 0


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


def test_a_plain_rq_worker_runs_the_job(bare: Lab, redis_url: str, free_port: int, tmp_path: Path) -> None:
    """Upstream refuses the connection: RQ sees success, and the order stays pending with a time of its own.

    What the sink prints is in the log.
    """
    (tmp_path / "prints.py").write_text("print('imported')\ndef on_order(order, context): pass\n")
    settings = settings_of_one_company(redis_url) | {
        "SINKS": "python:prints:on_order",
        "PYTHONPATH": str(tmp_path),
        "RQ_REDIS_URL": redis_url,
        "NP_BASE_URL": f"http://127.0.0.1:{free_port}",
        "NP_COMPANY_ID": ONE.company_id,
    }
    program = [str(Path(sys.executable).with_name("rq")), "worker", "--burst"]
    program += ["--serializer", "rq.serializers.JSONSerializer", f"ota-{LIVE}"]
    bare.now = now_ms()
    bare.accept()
    job = enqueued(bare)

    with Process.start(program, env={**os.environ, **settings}, cwd=tmp_path, log=tmp_path / "log") as process:
        assert process.wait(60) == 0, process.output
        assert re.search(r'"event":"sink.output".*"text":"imported"', process.output), process.output

    assert (len(bare.queued()), bare.redis.exists(job.key)) == (0, 0)
    assert len(FailedJobRegistry(LIVE, connection=bare.redis, serializer=JSONSerializer)) == 0
    assert bare.fields("generation", "fetched_generation", "deferrals") == ["1", None, "1"]
    assert (bare.due_in() or 0) > 0
