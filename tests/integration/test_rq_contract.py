"""The internals of RQ that this service relies on, one test for each with its reason.

Our scripts write RQ's jobs: they must equal a job that `Queue.enqueue` of the installed RQ writes, and work with RQ's
own tools. The worker and the pool rely on names and keys that RQ does not document.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import as_text, utcparse
from rq.worker import WorkerStatus

from app.dev.processes import Process
from app.ledger import keys, policy
from app.ledger.rq_jobs import BACKFILL, DESCRIPTION, FAILURE_TTL, FETCH_ORDER, LIVE, queue
from tests.clock import now_ms
from tests.environment import without_settings
from tests.integration.ledger_scenario import ONE, SAME_ID, Scenario, open_scenario
from workers.pool import WorkerRecovery
from workers.worker import FetchWorker

TIMES = {"created_at", "enqueued_at"}
WORKER = "pool-live-1"


@pytest.fixture
def scenario(redis_client: Redis) -> Iterator[Scenario]:
    with open_scenario(redis_client) as opened:
        yield opened


def settled(scenario: Scenario) -> None:
    scenario.settle()


def requested(scenario: Scenario) -> None:
    scenario.request()


def requested_for_backfill(scenario: Scenario) -> None:
    scenario.request(queue="backfill")


def dispatched(scenario: Scenario) -> None:
    scenario.settle()
    scenario.redis.delete("rq:queue:live", "rq:queues", *scenario.redis.keys("rq:job:*"))
    scenario.later(policy.GRACE / 1000)
    assert scenario.dispatch() == 1


PUSHES = [settled, requested, requested_for_backfill, dispatched]


def fetched(scenario: Scenario, job_id: str) -> Job:
    return Job.fetch(job_id, connection=scenario.redis, serializer=JSONSerializer)


def pushed(scenario: Scenario, queue_name: str = LIVE) -> Job:
    (job_id,) = queue(queue_name, scenario.redis).job_ids
    return fetched(scenario, job_id)


def hash_of(scenario: Scenario, job: Job) -> dict[str, bytes | str]:
    """Return the fields of the job's hash as they stand in Redis."""
    return {str(as_text(name)): value for name, value in scenario.redis.hgetall(job.key).items()}


@pytest.mark.parametrize("push", PUSHES)
def test_a_job_is_field_by_field_what_rq_itself_enqueues(scenario: Scenario, push: Callable[[Scenario], None]) -> None:
    push(scenario)
    queue_name = BACKFILL if push is requested_for_backfill else LIVE
    ours = pushed(scenario, queue_name)
    queues = scenario.redis.smembers("rq:queues")
    queue(queue_name, scenario.redis).enqueue(
        FETCH_ORDER,
        args=tuple(ONE),
        job_timeout=policy.JOB_TIMEOUT,
        result_ttl=0,
        failure_ttl=FAILURE_TTL,
        description=DESCRIPTION,
        job_id="theirs",
    )
    theirs = fetched(scenario, "theirs")
    our_hash, their_hash = hash_of(scenario, ours), hash_of(scenario, theirs)

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
    assert scenario.redis.ttl(ours.key) == scenario.redis.ttl(theirs.key) == -1
    assert queues == scenario.redis.smembers("rq:queues")


@pytest.mark.parametrize("push", PUSHES)
def test_a_job_is_seen_by_rqs_own_objects(scenario: Scenario, push: Callable[[Scenario], None]) -> None:
    push(scenario)
    queue_name = BACKFILL if push is requested_for_backfill else LIVE
    seen = Queue(queue_name, connection=scenario.redis, serializer=JSONSerializer)

    (job,) = seen.jobs

    assert (job.func_name, job.args, job.kwargs) == (FETCH_ORDER, list(ONE), {})
    assert (job.get_status(), job.origin, job.description) == (JobStatus.QUEUED, queue_name, DESCRIPTION)
    assert (job.timeout, job.result_ttl, job.failure_ttl) == (policy.JOB_TIMEOUT, 0, FAILURE_TTL)
    assert (seen.count, seen.get_job_position(job.id)) == (1, 0)
    assert [one.name for one in Queue.all(connection=scenario.redis)] == [queue_name]


def test_job_ids_are_never_used_twice(scenario: Scenario) -> None:
    """RQ deletes the hash when the first job of an id ends, and skips the second without an error."""
    ids: list[str] = []
    for push in (scenario.settle, scenario.request, scenario.dispatch, scenario.request, scenario.settle):
        scenario.later(scenario.due_in() or 0)
        push()
        ids += queue(LIVE, scenario.redis).job_ids
        scenario.redis.delete("rq:queue:live")
        scenario.start(f"w{len(ids)}")

    assert len(ids) == len(set(ids)) == 5


def test_the_job_hash_names_nothing_but_the_ids(scenario: Scenario) -> None:
    scenario.settle()

    texts = str(hash_of(scenario, pushed(scenario)))

    assert ("reference" in texts, "current" in texts, ONE.order_id in texts) == (False, False, True)


def worker(scenario: Scenario, kind: type[FetchWorker] = FetchWorker) -> FetchWorker:
    """Return a worker as the pool's children make it, in this process."""
    return kind(WORKER, LIVE, scenario.redis, memoryview(bytearray(8)).cast("d"))


@pytest.fixture
def signals() -> Iterator[None]:
    """Put back the signal handlers that a worker replaces."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "data", [b'["os.abort", null, [], {}]', b"not json", b"[]"], ids=["foreign", "unreadable", "too short"]
)
@pytest.mark.usefixtures("signals")
def test_rq_runs_a_job_through_the_functions_that_fetch_job_overrides(scenario: Scenario, data: bytes) -> None:
    """A foreign job runs neither its function nor a callback that its hash names: `os.abort` would end this process."""
    scenario.settle()
    job = pushed(scenario)
    scenario.redis.hset(job.key, mapping={"data": data, "success_callback_name": "os.abort"})

    worker(scenario).work(burst=True, logging_level="CRITICAL")

    assert (scenario.waiting(), scenario.redis.exists(job.key), scenario.field("started_generation")) == (0, 0, None)


class Killed(SystemExit):
    """Ends a worker in the middle of a job, as a kill would."""


class KilledWhenTaken(FetchWorker):
    def execute_job(self, job: Job, queue: Queue) -> None:
        raise Killed


class KilledWhenStarted(FetchWorker):
    def perform_job(self, *arguments: object, **named: object) -> bool:
        raise Killed


@pytest.mark.parametrize("kind", [KilledWhenTaken, KilledWhenStarted])
@pytest.mark.usefixtures("signals")
def test_the_pool_finds_the_order_of_a_job_that_a_killed_worker_had_taken(
    scenario: Scenario, kind: type[FetchWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ lists it in the intermediate queue, then in the worker's executions; RQ's own recovery takes minutes."""
    # A killed worker does not unregister, which removes its executions.
    monkeypatch.setattr(kind, "teardown", lambda self: None)
    scenario.settle()
    with pytest.raises(Killed):
        worker(scenario, kind).work(burst=True, logging_level="CRITICAL")
    assert scenario.due_in() == policy.GRACE / 1000

    WorkerRecovery(scenario.redis, scenario.ledger, []).release(WORKER, "killed")

    assert scenario.due_in() == 0


@pytest.mark.usefixtures("signals")
def test_a_worker_has_no_thread_for_commands(scenario: Scenario) -> None:
    """RQ starts it in `subscribe`; it would cost each worker a thread and a second connection."""
    made = worker(scenario)

    made.work(burst=True, logging_level="CRITICAL")

    assert (made.pubsub, made.pubsub_thread) == (None, None)


@pytest.mark.usefixtures("signals")
def test_a_second_signal_does_not_cut_off_a_fetch(scenario: Scenario) -> None:
    """RQ makes `request_force_stop` the handler when `request_stop` has run."""
    made = worker(scenario)
    made._install_signal_handlers()
    made.set_state(WorkerStatus.BUSY)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)

    assert signal.getsignal(signal.SIGTERM) == made.request_force_stop
    assert made._stop_requested


class TestTools:
    """RQ's own programs, started as anybody would."""

    @pytest.fixture
    def rq(self, redis_url: str, free_port: int, tmp_path: Path) -> Callable[..., str]:
        """Run `rq ...` to its end and return what it wrote; upstream refuses every connection."""
        env = {
            **without_settings(os.environ),
            "RQ_REDIS_URL": redis_url,
            "REDIS_URL": redis_url,
            "NP_BASE_URL": f"http://127.0.0.1:{free_port}",
            "NP_API_KEY": "key",
            "NP_TENANT": "tenant",
            "NP_ENVIRONMENT": "Production",
            "NP_COMPANY": "CRONUS",
            "NP_COMPANY_ID": ONE.company_id,
            "CLIENT_STATE": "state",
        }

        def run(*arguments: str) -> str:
            program = str(Path(sys.executable).with_name("rq"))
            with Process.start([program, *arguments], env=env, cwd=tmp_path, log=tmp_path / "log") as process:
                assert process.wait(60) == 0, process.output
                return process.output

        return run

    def test_rq_info_counts_our_jobs(self, scenario: Scenario, rq: Callable[..., str]) -> None:
        scenario.settle()
        scenario.request(SAME_ID, "backfill")

        output = rq("info", "--raw", "--only-queues")

        assert "queue live 1," in output
        assert "queue backfill 1," in output

    def test_a_plain_rq_worker_works_the_job_off(self, scenario: Scenario, rq: Callable[..., str]) -> None:
        """Upstream refuses the connection: RQ sees success, and the order stays pending with a time of its own."""
        scenario.now = now_ms()
        scenario.settle()
        job = pushed(scenario)

        rq("worker", "--burst", "--serializer", "rq.serializers.JSONSerializer", LIVE)

        assert (scenario.waiting(), scenario.redis.exists(job.key)) == (0, 0)
        assert len(FailedJobRegistry(LIVE, connection=scenario.redis, serializer=JSONSerializer)) == 0
        assert (scenario.field("generation"), scenario.field("fetched_generation"), scenario.field("attempts")) == (
            "1",
            None,
            "1",
        )
        due = scenario.redis.zscore(keys.DUE, ONE.member)
        assert due is not None
        assert due / 1000 > time.time()
