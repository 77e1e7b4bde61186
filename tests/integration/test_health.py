"""Readiness: each way in which a real Redis server cannot keep invariant 1 is reported."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from app import bootstrap
from app.dev.processes import Process
from app.dev.valkey import Valkey, start
from app.health import Check, Health
from app.intake.recorder import Inbox
from app.ledger import redis as redis_module
from app.ledger.keys import DEFAULT_PREFIX
from app.ledger.redis import Redis, old_server
from tests.eventually import eventually
from tests.service import settings_of_one_company

OF_THE_FUTURE = """
from app.cli.main import main
from app.ledger import redis
redis.LOWEST = (99, 0)
main()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A server that each test may configure."""
    with start(tmp_path_factory.mktemp("configured")) as running:
        yield running


@pytest.fixture
def client(server: Valkey) -> Iterator[Redis]:
    """A client of the server, which is durable when the test begins."""
    durable = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory": "0", "maxmemory-policy": "noeviction"}
    with Redis.from_url(server.url, socket_timeout=5) as redis:
        redis.replicaof("NO", "ONE")
        redis.config_set(*(word for pair in durable.items() for word in pair))
        yield redis


def checks(url: str) -> tuple[str, dict[str, Check]]:
    """Return the state and each check of a Redis."""

    async def ask() -> list[Check]:
        async with bootstrap.for_web(url, DEFAULT_PREFIX) as redis:
            return await Health(Inbox(redis, dedup_days=7, event_days=90).probe, redis).checks()

    found = asyncio.run(ask())
    return Health.state(found), {check.name: check for check in found}


def failed(found: dict[str, Check]) -> set[str]:
    return {name for name, check in found.items() if not check.ok}


@pytest.mark.parametrize(
    ("changes", "check", "expected"),
    [
        ({}, None, "ready"),
        ({"maxmemory": "1gb"}, None, "ready"),
        ({"maxmemory-policy": "allkeys-lru"}, None, "ready"),
        ({"appendonly": "no"}, "durable", "degraded"),
        ({"appendfsync": "no"}, "durable", "degraded"),
        ({"maxmemory": "1gb", "maxmemory-policy": "allkeys-lru"}, "memory", "degraded"),
        ({"maxmemory": "1"}, "writable", "not ready"),
    ],
    ids=lambda value: " ".join(value.values()) or "durable" if isinstance(value, dict) else None,
)
def test_a_server_that_may_lose_events_is_degraded_and_one_that_takes_none_is_not_ready(
    server: Valkey, client: Redis, changes: dict[str, str], check: str | None, expected: str
) -> None:
    for name, value in changes.items():
        client.config_set(name, value)

    state, found = checks(server.url)

    assert (state, failed(found)) == (expected, {check} - {None})


def test_a_replica_is_not_ready(server: Valkey, client: Redis) -> None:
    """After a failover without a new address, every write would be refused."""
    client.replicaof("127.0.0.1", "1")

    state, found = checks(server.url)

    assert (state, "writable" in failed(found)) == ("not ready", True)


@pytest.mark.parametrize(
    ("commands", "keys", "expected"),
    [
        (["+@all", "-config"], ["*"], ("ready", True, "unverified")),
        (["+@all", "-@dangerous"], ["*"], ("ready", True, "unverified")),
        (["+@all", "-@stream"], ["*"], ("not ready", False, "NOPERM xadd")),
        (["+@all", "-hset"], ["*"], ("not ready", False, "NOPERM hset")),
        (["+@all", "-evalsha"], ["*"], ("not ready", False, "NOPERM evalsha")),
        (["+@all"], ["ota:*"], ("not ready", False, "NOPERM key")),
        (["+@all"], ["ota:*", "rq:queue*"], ("not ready", False, "NOPERM")),
        (["+@all"], ["ota:*", "rq:*"], ("ready", True, "appendonly")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_user_is_judged_by_what_it_may_record(
    server: Valkey, client: Redis, commands: list[str], keys: list[str], expected: tuple[str, bool, str]
) -> None:
    """And not by what it may ask: managed Redis forbids CONFIG or INFO, which is not a fault."""
    categories = [one for one in commands if "@" in one]
    others = [one for one in commands if "@" not in one]
    client.acl_setuser(
        "other", enabled=True, nopass=True, categories=categories, commands=others, keys=keys, reset=True
    )

    state, found = checks(f"redis://other:x@127.0.0.1:{server.port}/0")

    details = " ".join(check.detail for check in found.values())
    assert (state, found["writable"].ok) == expected[:2], found
    assert expected[2] in details


def test_readiness_leaves_nothing_behind(server: Valkey, client: Redis) -> None:
    client.flushdb()

    assert (checks(server.url)[0], client.keys("*")) == ("ready", [])


def test_a_wrong_password_is_not_ready_and_not_shown(server: Valkey, client: Redis) -> None:
    state, found = checks(f"redis://:canary@127.0.0.1:{server.port}/0")

    assert (state, set(found)) == ("not ready", {"redis"})
    assert "canary" not in found["redis"].detail


@pytest.mark.parametrize(
    ("fault", "detail"),
    [(Valkey.pause, "no answer (TimeoutError)"), (Valkey.kill, "no answer (ConnectionError)")],
    ids=["frozen", "killed"],
)
def test_a_server_that_does_not_answer_is_not_ready_in_time(own_valkey: Valkey, fault: Any, detail: str) -> None:
    fault(own_valkey)
    started = time.monotonic()

    state, found = checks(own_valkey.url)

    assert (state, set(found), found["redis"].detail) == ("not ready", {"redis"}, detail)
    assert time.monotonic() - started < 2.5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full of Linux stands for a full disk")
def test_a_server_with_a_full_disk_is_not_ready(own_valkey: Valkey) -> None:
    """Redis refuses writes from then on, and reports it before a write."""
    files = own_valkey.data_dir / "appendonlydir"
    (files / "appendonly.aof.2.incr.aof").symlink_to("/dev/full")
    with Redis.from_url(own_valkey.url) as client:
        # The rewrite continues in the next file, which is the full disk.
        client.bgrewriteaof()
        with pytest.raises(ResponseError, match="MISCONF"):
            eventually(lambda: client.set("key", "value") is None, what="a refused write")

        state, found = checks(own_valkey.url)

    assert (state, failed(found)) == ("not ready", {"writable"})


@pytest.mark.parametrize(
    ("server", "version", "is_old"),
    [("redis", "6.0.14", True), ("redis", "6.2.0", False), ("valkey", "7.2.5", False), ("redis", "10.0.0", False)],
)
def test_a_server_is_known_by_what_it_answers_to_hello(server: str, version: str, is_old: bool) -> None:
    fields = {b"server": server.encode(), b"version": version.encode(), b"proto": 2}
    needed = f"the server is Redis {version}: Redis 6.2 or Valkey 7.2 or later is needed"

    for hello in (fields, [part for pair in fields.items() for part in pair]):
        found = old_server(hello)
        assert (str(found) if found else None) == (needed if is_old else None)


def test_a_server_that_is_too_old_is_named_and_no_worker_starts(
    own_valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current server stands for an old one: it lacks a command, and the lowest version is higher."""
    monkeypatch.setattr(redis_module, "LOWEST", (99, 0))
    with Redis.from_url(own_valkey.url) as client:
        client.acl_setuser("default", enabled=True, commands=["-zadd"])

    state, found = checks(own_valkey.url)

    assert (state, found["writable"].detail[:21]) == ("not ready", "the server is Valkey ")
    env = os.environ | settings_of_one_company(own_valkey.url)
    with Process.start([sys.executable, "-c", OF_THE_FUTURE, "worker"], env=env, log=tmp_path / "log") as pool:
        assert pool.wait(20) == 3
    assert ("service.old_server" in pool.output, "pool.worker_started" in pool.output) == (True, False)
