"""Readiness: each way in which a real Redis server cannot keep invariant 1 is reported."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from app import bootstrap
from app.dev.valkey import Valkey, start
from app.health import Check, Health
from tests.eventually import eventually


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
        redis = bootstrap.for_web(url)
        try:
            return await Health(redis).checks()
        finally:
            await redis.aclose()

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
        ({"maxmemory": "1"}, "memory", "not ready"),
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


def test_a_server_that_forbids_config_has_unknown_durability(server: Valkey, client: Redis) -> None:
    """Managed Redis does; that is not a fault."""
    client.acl_setuser("managed", enabled=True, nopass=True, categories=["+@all"], commands=["-config"], keys=["*"])

    state, found = checks(f"redis://managed:x@127.0.0.1:{server.port}/0")

    assert (state, found["durable"].ok, found["durable"].detail[:10]) == ("ready", True, "unverified")


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
