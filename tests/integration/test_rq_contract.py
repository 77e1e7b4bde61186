"""Our scripts write RQ's jobs by themselves: what they write must be what RQ writes, and what RQ's own tools work with.

The yardstick is a job that RQ's `Queue.enqueue` wrote with the same arguments, by the RQ that is installed.
"""

from __future__ import annotations

import os
import re
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

from app import bootstrap
from app.dev.processes import Process
from app.ledger import keys, policy
from app.ledger.rq_jobs import BACKFILL, DESCRIPTION, FAILURE_TTL, FETCH_ORDER, LIVE, queue
from tests.environment import without_settings
from tests.integration.ledger_scenario import ONE, SAME_ID, Scenario, open_scenario
from workers.worker import FetchJob, FetchWorker, Stopwatch

TIMES = {"created_at", "enqueued_at"}


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Scenario]:
    with open_scenario(redis_client) as opened:
        yield opened


def settled(stage: Scenario) -> None:
    stage.settle()


def wanted(stage: Scenario) -> None:
    stage.request()


def wanted_backfill(stage: Scenario) -> None:
    stage.request(queue="backfill")


def ticked(stage: Scenario) -> None:
    stage.settle()
    stage.redis.delete("rq:queue:live", "rq:queues", *stage.redis.keys("rq:job:*"))
    stage.later(policy.GRACE / 1000)
    assert stage.dispatch() == 1


PUSHES = [settled, wanted, wanted_backfill, ticked]


def fetched(stage: Scenario, job_id: str) -> Job:
    return Job.fetch(job_id, connection=stage.redis, serializer=JSONSerializer)


def pushed(stage: Scenario, lane: str = LIVE) -> Job:
    (job_id,) = queue(lane, stage.redis).job_ids
    return fetched(stage, job_id)


def hash_of(stage: Scenario, job: Job) -> dict[str, bytes | str]:
    """Return the fields of the job's hash as they stand in Redis."""
    return {str(as_text(name)): value for name, value in stage.redis.hgetall(job.key).items()}


@pytest.mark.parametrize("push", PUSHES)
def test_a_job_is_field_by_field_what_rq_itself_enqueues(stage: Scenario, push: Callable[[Scenario], None]) -> None:
    push(stage)
    lane = BACKFILL if push is wanted_backfill else LIVE
    ours = pushed(stage, lane)
    queues = stage.redis.smembers("rq:queues")
    queue(lane, stage.redis).enqueue(
        FETCH_ORDER,
        args=tuple(ONE),
        job_timeout=policy.JOB_TIMEOUT,
        result_ttl=0,
        failure_ttl=FAILURE_TTL,
        description=DESCRIPTION,
        job_id="theirs",
    )
    theirs = fetched(stage, "theirs")
    our_hash, their_hash = hash_of(stage, ours), hash_of(stage, theirs)

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
    assert stage.redis.ttl(ours.key) == stage.redis.ttl(theirs.key) == -1
    assert queues == stage.redis.smembers("rq:queues")


@pytest.mark.parametrize("push", PUSHES)
def test_a_job_is_seen_by_rqs_own_objects(stage: Scenario, push: Callable[[Scenario], None]) -> None:
    push(stage)
    lane = BACKFILL if push is wanted_backfill else LIVE
    seen = Queue(lane, connection=stage.redis, serializer=JSONSerializer)

    (job,) = seen.jobs

    assert (job.func_name, job.args, job.kwargs) == (FETCH_ORDER, list(ONE), {})
    assert (job.get_status(), job.origin, job.description) == (JobStatus.QUEUED, lane, DESCRIPTION)
    assert (job.timeout, job.result_ttl, job.failure_ttl) == (policy.JOB_TIMEOUT, 0, FAILURE_TTL)
    assert (seen.count, seen.get_job_position(job.id)) == (1, 0)
    assert [one.name for one in Queue.all(connection=stage.redis)] == [lane]


def test_job_ids_are_never_used_twice(stage: Scenario) -> None:
    """RQ deletes the hash with the first job of an id, and skips the second in silence."""
    ids: list[str] = []
    for push in (stage.settle, stage.request, stage.dispatch, stage.request, stage.settle):
        stage.later(stage.due_in() or 0)
        push()
        ids += queue(LIVE, stage.redis).job_ids
        stage.redis.delete("rq:queue:live")
        stage.start(f"w{len(ids)}")

    assert len(ids) == len(set(ids)) == 5


def test_the_job_hash_names_nothing_but_the_ids(stage: Scenario) -> None:
    stage.settle()

    texts = str(hash_of(stage, pushed(stage)))

    assert ("reference" in texts, "current" in texts, ONE.order_id in texts) == (False, False, True)


@pytest.mark.parametrize(
    "data", [b'["os.abort", null, [], {}]', b"not json", b"[]"], ids=["foreign", "unreadable", "too short"]
)
def test_a_job_that_is_not_ours_ends_without_running_anything(stage: Scenario, data: bytes) -> None:
    """Neither its function nor a callback that its hash names: `os.abort` would end this process."""
    stage.settle()
    job = pushed(stage)
    stage.redis.hset(job.key, mapping={"data": data, "success_callback_name": "os.abort"})
    worker = FetchWorker(
        [queue(LIVE, stage.redis)], connection=stage.redis, serializer=JSONSerializer, job_class=FetchJob
    )
    worker.stopwatch = Stopwatch()
    worker.log_result_lifespan = False

    worker.work(burst=True, logging_level="CRITICAL")

    assert (stage.waiting(), stage.redis.exists(job.key), stage.field("begun")) == (0, 0, None)


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

    def test_rq_info_counts_our_jobs(self, stage: Scenario, rq: Callable[..., str]) -> None:
        stage.settle()
        stage.request(SAME_ID, "backfill")

        told = rq("info", "--raw", "--only-queues")

        assert "queue live 1," in told
        assert "queue backfill 1," in told

    def test_a_plain_rq_worker_works_the_job_off(self, stage: Scenario, rq: Callable[..., str]) -> None:
        """Upstream refuses the connection: RQ sees success, and the order stays owed with a time of its own."""
        stage.now = bootstrap.clock()
        stage.settle()
        job = pushed(stage)

        rq("worker", "--burst", "--serializer", "rq.serializers.JSONSerializer", LIVE)

        assert (stage.waiting(), stage.redis.exists(job.key)) == (0, 0)
        assert len(FailedJobRegistry(LIVE, connection=stage.redis, serializer=JSONSerializer)) == 0
        assert (stage.field("generation"), stage.field("fetched_generation"), stage.field("attempts")) == (
            "1",
            None,
            "1",
        )
        due = stage.redis.zscore(keys.DUE, ONE.member)
        assert due is not None
        assert due / 1000 > time.time()
