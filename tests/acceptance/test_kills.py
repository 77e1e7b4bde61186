"""Parts are killed with SIGKILL or stopped, and every order is fetched."""

from __future__ import annotations

import os
import signal
import time

from app.dev.processes import Process
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.integration.relay import relay
from tests.service import Service, children, is_running

ONE_WORKER = {"WORKERS": "1", "BACKFILL_WORKERS": "0"}
THREE_WORKERS = {"WORKERS": "2", "BACKFILL_WORKERS": "1"}


def fetching(bare: Service, **workers: str) -> tuple[Process, Process, str]:
    """Start web and a pool, and return both with an order whose getOrder has started and takes two seconds."""
    web, pool = bare.start("web"), bare.start("worker", **workers)
    bare.admin("POST", "faults", {"kind": "latency", "operation": "getOrder", "calls": 1, "seconds": 2})
    (order_id,) = bare.issue()
    assert bare.post(bare.event(order_id))[0] == 200
    eventually(lambda: bare.row(order_id)["gets"] == 1, 10, what="the first fetch has started")
    return web, pool, order_id


def test_an_order_is_fetched_soon_though_the_connection_breaks_after_rq_has_moved_its_job(bare: Service) -> None:
    """Redis has moved the job to RQ's intermediate queue, and no worker has its id; GRACE would be two minutes."""
    bare.start("web")
    with relay(bare.valkey.port) as network:
        bare.start("worker", **ONE_WORKER, REDIS_URL=network.url(bare.variables["REDIS_URL"]))
        (order_id,) = bare.issue()
        network.cut_at = b"ota-f-" + bare.company_id.encode()

        assert bare.post(bare.event(order_id))[0] == 200

        bare.wait_fetched(order_id, within=10)
        assert network.cut_at == b""
        assert bare.row(order_id)["gets"] == 1


def test_sigterm_lets_a_fetch_end_and_leaves_no_process_behind(bare: Service) -> None:
    web, pool, order_id = fetching(bare, **THREE_WORKERS)
    workers = children(pool.pid)

    for process in (pool, web):
        os.kill(process.pid, signal.SIGTERM)

    assert (pool.wait(20), web.wait(10)) == (0, 0)
    assert not any(map(is_running, workers))
    assert len(bare.fetched(order_id)) == 1


def test_a_second_ctrl_c_does_not_cut_off_a_fetch(bare: Service) -> None:
    """A terminal sends SIGINT to the pool and its workers; RQ takes a second one, a second later, for a cold stop."""
    _, pool, order_id = fetching(bare, **ONE_WORKER)

    os.killpg(pool.pid, signal.SIGINT)
    second = time.monotonic() + 1.2
    eventually(lambda: time.monotonic() > second, what="RQ takes the next signal for a second one")
    os.killpg(pool.pid, signal.SIGINT)

    assert pool.wait(20) == 0
    assert (len(bare.fetched(order_id)), bare.row(order_id)["gets"]) == (1, 1)


def test_a_pool_survives_an_outage_of_redis_and_logs_it_once(bare: Service) -> None:
    """A worker that dies of the outage is started once more, and that one waits for Redis."""
    bare.start("web")
    pool = bare.start("worker", WORKERS="4", BACKFILL_WORKERS="1")
    bare.valkey.kill()
    eventually(lambda: bare.log("worker", "redis.unavailable"), what="the pool notices the outage")
    until = time.monotonic() + 2
    eventually(lambda: time.monotonic() > until, what="each part has tried Redis several times")
    assert pool.exit_code is None
    bare.valkey.restart()
    eventually(lambda: bare.log("worker", "redis.recovered"), what="the pool notices the end of the outage")

    (order_id,) = bare.issue()
    eventually(lambda: bare.post(bare.event(order_id))[0] == 200, 10, what="web accepts events again")
    bare.wait_fetched(order_id, within=10)

    events = [line["event"] for line in bare.log("worker")]
    assert (events.count("redis.unavailable"), events.count("redis.recovered")) == (1, 1)
    assert events.count("pool.worker_started") <= 2 * 5, " ".join(events)
    assert len(events) < 40, " ".join(events)


def test_a_pool_stops_cleanly_during_an_outage_of_redis(bare: Service) -> None:
    pool = bare.start("worker", WORKERS="2", BACKFILL_WORKERS="0", UPSTREAM_TIMEOUT="1")
    bare.valkey.kill()
    eventually(lambda: bare.log("worker", "redis.unavailable"), what="the pool notices the outage")
    workers = children(pool.pid)
    health = ("health", "--role", "worker")
    assert [bare.cli(*health)[0], bare.cli(*health, "--ready")[0]] == [0, 1]

    os.kill(pool.pid, signal.SIGTERM)

    assert pool.wait(20) == 0
    assert not any(map(is_running, workers))


def test_an_unreadable_entry_in_the_list_of_pools_is_ignored(bare: Service) -> None:
    """During a rolling upgrade another version may write other fields."""
    with Redis.from_url(bare.variables["REDIS_URL"]) as redis:
        redis.hset("ota:pools", "other-version", '{"machine": "m", "pid": 1, "since": "x"}')
    bare.start("worker", **ONE_WORKER)
    eventually(lambda: bare.cli("health", "--role", "worker", "--ready")[0] == 0, 10, what="the pool is healthy")
    assert bare.log("worker", "pool.failed") == []
