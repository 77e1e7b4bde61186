"""Redis loses its data, loads slowly, or has data of a newer version, while the service runs."""

from __future__ import annotations

import time

from app.dev.valkey import server_program
from app.ids import OrderKey
from app.ledger.redis import VERSION, Redis
from tests.eventually import eventually
from tests.lab import KEYS
from tests.service import Service, children


def test_a_flushed_redis_needs_no_restart_of_web_or_workers(bare: Service) -> None:
    """Scripts, RQ's worker registrations and the pool's heartbeat are lost; new events work at once."""
    bare.start("web")
    pool = bare.start("worker", WORKERS="1", BACKFILL_WORKERS="1")
    order_id = bare.issue()[0]
    event = bare.event(order_id)
    assert bare.post(event)[1]["queued"] == 1
    bare.wait_fetched(order_id)
    workers = children(pool.pid)

    with Redis.from_url(bare.variables["REDIS_URL"]) as redis:
        redis.flushall()
        redis.script_flush()
    assert bare.post(event)[1]["queued"] == 1, "the duplicate mark is lost"

    bare.wait_fetched(order_id, times=2, within=20)
    assert children(pool.pid) == workers
    assert bare.log("worker", "pool.worker_died") == []
    eventually(lambda: bare.cli("health", "--role", "worker")[0] == 0, 10, what="the pool's heartbeat is back")


def test_newer_data_stops_the_pool_and_not_the_web_process(bare: Service) -> None:
    """A rolling upgrade: the new version wrote first. Old workers exit with code 4 and write nothing."""
    bare.start("web")
    pool = bare.start("worker", WORKERS="1", BACKFILL_WORKERS="0")
    order_id = bare.issue()[0]
    with Redis.from_url(bare.variables["REDIS_URL"]) as redis:
        redis.set(KEYS.schema, VERSION + 1)

        assert pool.wait(10) == 4
        status, answer = bare.post(bare.event(order_id))
        assert (status, answer["reason"]) == (503, "other_schema")
        assert bare.launch("worker").wait(20) == 4
        assert not redis.exists(KEYS.record(OrderKey(bare.company_id, order_id)))

        lines = bare.log("worker", "service.other_schema")
        assert [(line["held"], line["ours"]) for line in lines] == [(str(VERSION + 1), VERSION)] * 2
        redis.set(KEYS.schema, VERSION)
    assert bare.post(bare.event(order_id))[0] == 200
    bare.start("worker", WORKERS="1", BACKFILL_WORKERS="0")
    bare.wait_fetched(order_id)


def test_posts_are_answered_while_redis_loads_its_data_and_their_orders_are_fetched_afterwards(bare: Service) -> None:
    """Redis answers LOADING, or late: each POST is answered within seconds."""
    bare.start("web")
    first = bare.issue()[0]
    assert bare.post(bare.event(first))[0] == 200
    with Redis.from_url(bare.variables["REDIS_URL"]) as redis:
        for number in range(300):
            redis.set(f"ballast:{number}", "x" * 500)
        redis.bgrewriteaof()
        eventually(lambda: not redis.info("persistence")["aof_rewrite_in_progress"], 10, what="the file is rewritten")
    bare.valkey.kill()
    config = bare.valkey.data_dir / "valkey.conf"
    with config.open("a") as file:
        file.write("key-load-delay 10000\nloading-process-events-interval-bytes 1024\n")
    bare.run([server_program(), str(config)], "slow-valkey.log", LC_ALL="C")
    bare.launch("worker", WORKERS="1", BACKFILL_WORKERS="0")

    second = bare.issue()[0]
    answers: list[int] = []
    while not answers or answers[-1] != 200:
        started = time.monotonic()
        answers.append(bare.post(bare.event(second))[0])
        assert time.monotonic() - started < 4

    assert set(answers) == {200, 503}
    for order_id in (first, second):
        bare.wait_fetched(order_id)
    assert bare.log("worker", "pool.worker_died") == []
