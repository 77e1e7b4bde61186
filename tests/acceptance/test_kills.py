"""Parts are killed with SIGKILL, and every order comes home."""

from __future__ import annotations

import os
import signal
import time

from redis import Redis

from tests.eventually import eventually
from tests.pids import children, is_running
from tests.service import Service


def test_an_order_comes_home_when_its_worker_is_killed_in_mid_fetch(bare: Service) -> None:
    """The pool knows its child by name: what it held is due at once, and a fresh worker fetches it."""
    bare.start("web")
    pool = bare.start("worker", WORKERS="1", BACKFILL_WORKERS="0")
    bare.subscribe()
    bare.admin("POST", "faults", {"kind": "hang", "operation": "getOrder", "calls": 1, "seconds": 15})
    order_id = bare.create("KILL-1", "31001")
    eventually(lambda: bare.row(order_id)["gets"] == 1, 10, what="the first fetch hangs")

    (worker,) = children(pool.pid)
    os.kill(worker, signal.SIGKILL)

    bare.wait_fetched(order_id, within=10)
    died = bare.log("worker", "pool.worker_died")
    assert [line["order_id"] for line in died] == [order_id]
    assert bare.row(order_id)["gets"] == 2


def test_an_order_comes_home_when_the_whole_pool_is_killed_and_none_of_its_workers_lives_on(bare: Service) -> None:
    """Children die with the pool; the next pool on this machine takes over at once what they held."""
    bare.start("web")
    pool = bare.start("worker", WORKERS="2", BACKFILL_WORKERS="1")
    bare.subscribe()
    bare.admin("POST", "faults", {"kind": "hang", "operation": "getOrder", "calls": 1, "seconds": 15})
    order_id = bare.create("KILL-2", "31001")
    eventually(lambda: bare.row(order_id)["gets"] == 1, 10, what="the first fetch hangs")
    workers = children(pool.pid)
    assert len(workers) == 3

    os.kill(pool.pid, signal.SIGKILL)
    pool.wait(10)
    eventually(lambda: not any(map(is_running, workers)), 5, what="the children died with the pool")
    bare.start("worker", WORKERS="2", BACKFILL_WORKERS="1")

    bare.wait_fetched(order_id, within=10)


def test_no_order_is_lost_when_web_is_killed_between_two_posts(bare: Service) -> None:
    """What was answered 200 before the kill is fetched, and a fresh web process takes the next."""
    web = bare.start("web")
    first = bare.issue()[0]
    assert bare.post(bare.event(first))[0] == 200
    os.kill(web.pid, signal.SIGKILL)
    web.wait(10)
    bare.start("web")
    second = bare.issue()[0]
    assert bare.post(bare.event(second))[0] == 200
    bare.start("worker", WORKERS="2", BACKFILL_WORKERS="0")

    for order_id in (first, second):
        bare.wait_fetched(order_id, within=10)


def test_nothing_acknowledged_is_lost_when_valkey_is_killed_after_the_answer(bare: Service) -> None:
    """The append-only file has it; workers that waited for Redis fetch it when it is back."""
    bare.start("web")
    bare.start("worker", WORKERS="2", BACKFILL_WORKERS="0")
    bare.admin("POST", "faults", {"kind": "status", "operation": "getOrder", "status": 503, "calls": 1})
    order_id = bare.issue()[0]
    assert bare.post(bare.event(order_id))[0] == 200
    bare.valkey.kill()
    bare.valkey.restart()

    bare.wait_fetched(order_id, within=30)


def test_sigterm_lets_a_fetch_under_way_end_and_leaves_no_process_behind(bare: Service) -> None:
    """A worker finishes its fetch, then all of the pool ends with exit code 0."""
    web = bare.start("web")
    pool = bare.start("worker", WORKERS="2", BACKFILL_WORKERS="1")
    bare.admin("POST", "faults", {"kind": "latency", "operation": "getOrder", "seconds": 2, "calls": 1})
    order_id = bare.issue()[0]
    assert bare.post(bare.event(order_id))[0] == 200
    eventually(lambda: bare.row(order_id)["gets"] == 1, 10, what="the fetch is under way")
    workers = children(pool.pid)

    for process in (pool, web):
        os.kill(process.pid, signal.SIGTERM)

    assert pool.wait(20) == 0
    assert web.wait(10) == 0
    assert not any(map(is_running, workers))
    assert len(bare.fetched(order_id)) == 1


def test_ctrl_c_counts_once_however_often_and_for_whom_it_is_meant(bare: Service) -> None:
    """A terminal sends SIGINT to the whole group; the pool stops in good order, and its workers end their fetch."""
    bare.start("web")
    pool = bare.start("worker", WORKERS="2", BACKFILL_WORKERS="0")
    bare.admin("POST", "faults", {"kind": "latency", "operation": "getOrder", "seconds": 2, "calls": 1})
    order_id = bare.issue()[0]
    assert bare.post(bare.event(order_id))[0] == 200
    eventually(lambda: bare.row(order_id)["gets"] == 1, 10, what="the fetch is under way")

    os.killpg(pool.pid, signal.SIGINT)
    second = time.monotonic() + 1.2
    # RQ takes a second signal, at least a second later, for a cold stop.
    eventually(lambda: time.monotonic() > second, 5, what="RQ would see two signals")
    os.killpg(pool.pid, signal.SIGINT)

    assert pool.wait(20) == 0
    assert len(bare.fetched(order_id)) == 1
    assert bare.row(order_id)["gets"] == 1


def test_a_pool_outlives_ten_seconds_without_redis_and_says_so_once(bare: Service) -> None:
    """No worker spins and no log fills: one line when Redis goes, one when it is back; then orders come home."""
    bare.start("web")
    pool = bare.start("worker", WORKERS="4", BACKFILL_WORKERS="1")
    bare.valkey.kill()
    eventually(lambda: bare.log("worker", "redis.unavailable"), 5, what="the pool sees it")
    until = time.monotonic() + 10
    eventually(lambda: time.monotonic() > until, 15, what="ten seconds pass")
    assert pool.exit_code is None
    bare.valkey.restart()
    eventually(lambda: bare.log("worker", "redis.recovered"), 5, what="the pool sees it")

    order_id = bare.issue()[0]
    eventually(lambda: bare.post(bare.event(order_id))[0] == 200, 10, what="web takes events again")

    bare.wait_fetched(order_id, within=10)
    assert len(bare.log("worker", "redis.unavailable")) == 1
    assert len(bare.log("worker", "redis.recovered")) == 1
    assert len(bare.log("worker")) < 40, [line["event"] for line in bare.log("worker")]


def test_a_pool_ends_in_good_order_while_redis_is_away(bare: Service) -> None:
    """Workers that wait for Redis hold nobody up who stops the service."""
    pool = bare.start("worker", WORKERS="2", BACKFILL_WORKERS="0", UPSTREAM_TIMEOUT="1")
    bare.valkey.kill()
    eventually(lambda: bare.log("worker", "redis.unavailable"), 5, what="the pool sees it")
    workers = children(pool.pid)

    os.kill(pool.pid, signal.SIGTERM)

    assert pool.wait(20) == 0
    assert not any(map(is_running, workers))


def test_what_another_version_says_in_the_list_of_pools_is_passed_over(bare: Service) -> None:
    """A rolling upgrade may bring other words; the pool goes on, and `health` still finds the ones it can read."""
    redis = Redis.from_url(bare.variables["REDIS_URL"])
    redis.hset("ota:pools", "of-the-future", '{"machine": "m", "pid": 1, "since": "x"}')
    bare.start("worker", WORKERS="1", BACKFILL_WORKERS="0")
    eventually(lambda: bare.cli("health", "--role", "worker")[0] == 0, 10, what="the pool is alive and well")
    assert bare.log("worker", "pool.failed") == []
    redis.close()
