"""Redis loses its data, loads slowly, refuses, or has data of a newer version, while the service runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Set
from functools import partial
from typing import Any, Final

from app.dev.valkey import server_program
from app.ids import OrderKey
from app.ledger.redis import VERSION, Redis
from tests.eventually import eventually
from tests.lab import KEYS
from tests.service import Service, children

OUTAGES: Final = {"redis.refused", "redis.unavailable"}
ONE_WORKER: Final = {"WORKERS": "1", "BACKFILL_WORKERS": "0"}


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
    eventually(
        lambda: bare.cli("health", "--role", "worker", "--ready")[0] == 0, 10, what="the pool's heartbeat is back"
    )


def test_a_pool_tells_a_redis_that_refuses_from_one_that_is_away(bare: Service) -> None:
    """Each outage is logged once with its code and cause, until `redis.recovered`; that workers end is no fault."""
    address = bare.variables["REDIS_URL"]
    with Redis.from_url(address) as admin:
        client: Any = admin
        user = "ACL SETUSER ota on >x ~* +@all"
        client.execute_command(*user.split())
        bare.start("worker", **ONE_WORKER, REDIS_URL=f"redis://ota:x@127.0.0.1:{bare.valkey.port}/0")
        faults = (
            ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "redis.refused", "OOM"),
            ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "redis.refused", "READONLY"),
            ("ACL SETUSER ota -hset", user, "redis.refused", "NOPERM hset"),
            ("", user, "redis.unavailable", "ConnectionError"),
        )
        for number, (fault, repair, event, error) in enumerate(faults):
            if fault:
                client.execute_command(*fault.split())
            else:
                bare.valkey.kill()
            (line,) = eventually(partial(_logged, bare, OUTAGES, number), 10, what=f"the outage {error} is logged")
            assert (line["event"], line["error"]) == (event, error)
            assert line["cause"].startswith("Redis at 127.0.0.1")
            if not fault:
                bare.valkey.restart()
            client.execute_command(*repair.split())
            eventually(partial(_logged, bare, {"redis.recovered"}, number), 10, what="it recovers")
    (order_id,) = bare.issue()
    bare.start("web")
    assert bare.post(bare.event(order_id))[0] == 200
    bare.wait_fetched(order_id)
    assert len(_logged(bare, OUTAGES)) == 4
    assert bare.log("worker", "pool.worker_died") == []
    assert bare.log("worker", "pool.worker_ended")


def _logged(bare: Service, events: Set[str], after: int = 0) -> list[dict[str, Any]]:
    """Return the pool's lines of these events but the first `after`."""
    return [line for line in bare.log("worker") if line["event"] in events][after:]


def test_a_broken_key_of_one_order_or_of_one_step_stops_nothing_else(bare: Service) -> None:
    """Each is logged once; the pool goes on with all other orders."""
    bare.start("web")
    bare.admin("POST", "faults", {"kind": "latency", "operation": "getOrder", "calls": 1, "seconds": 20})
    broken, other = bare.issue(2)
    with Redis.from_url(bare.variables["REDIS_URL"]) as redis:
        redis.set(KEYS.reconcile(bare.company_id), "no hash")
        redis.set(KEYS.alerts, "no hash")
        redis.set(KEYS.pools, "no hash")
        pool = bare.start("worker", **ONE_WORKER)
        assert bare.post(bare.event(broken))[0] == 200
        eventually(lambda: bare.row(broken)["gets"] == 1, 10, what="the first fetch has started")
        redis.set(KEYS.record(OrderKey(bare.company_id, broken)), "no hash")
        os.kill(children(pool.pid)[0], signal.SIGKILL)

        assert bare.post(bare.event(other))[0] == 200
        bare.wait_fetched(other)

    failed = [line["what"] for line in bare.log("worker", "pool.step_failed")]
    assert sorted(failed) == sorted(set(failed))
    assert {"heartbeat", "release", "recover_dead_pools"} <= set(failed)
    assert _logged(bare, OUTAGES) == []


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
