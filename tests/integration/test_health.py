"""Readiness is a promise about invariant 1: each way in which a real server cannot keep it shows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from app import bootstrap
from app.dev.valkey import Valkey, start
from app.health import Check, Health
from tests.eventually import eventually

SOUND = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory": "0", "maxmemory-policy": "noeviction"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A server that the tests of this file make sick; each begins with a sound one."""
    with start(tmp_path_factory.mktemp("sick")) as running:
        yield running


@pytest.fixture
def client(server: Valkey) -> Iterator[Redis]:
    with Redis.from_url(server.url, socket_timeout=5) as redis:
        redis.replicaof("NO", "ONE")
        redis.config_set(
            "appendonly", "yes", "appendfsync", "everysec", "maxmemory", 0, "maxmemory-policy", "noeviction"
        )
        yield redis


def configure(client: Redis, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        client.config_set(name, value)


def checks(url: str) -> dict[str, Check]:
    async def ask() -> list[Check]:
        redis = bootstrap.for_web(url)
        try:
            return await Health(redis).checks()
        finally:
            await redis.aclose()

    return {check.name: check for check in asyncio.run(ask())}


def state(found: dict[str, Check]) -> str:
    return Health.state(list(found.values()))


def sick(found: dict[str, Check]) -> set[str]:
    return {name for name, check in found.items() if not check.ok}


def test_a_durable_server_is_ready(server: Valkey, client: Redis) -> None:
    found = checks(server.url)

    assert (state(found), sick(found)) == ("ready", set())
    assert found["durable"].detail == "appendonly yes, appendfsync everysec"


@pytest.mark.parametrize(
    ("setting", "check", "word"),
    [
        ({"appendonly": "no"}, "durable", "degraded"),
        ({"appendfsync": "no"}, "durable", "degraded"),
        ({"maxmemory": "1gb", "maxmemory-policy": "allkeys-lru"}, "memory", "degraded"),
        ({"maxmemory": "1"}, "memory", "not ready"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_a_server_that_may_forget_is_told_apart_from_one_that_takes_nothing(
    server: Valkey, client: Redis, setting: dict[str, str], check: str, word: str
) -> None:
    """A weaker promise is degraded, no promise at all is not ready."""
    configure(client, setting)

    found = checks(server.url)

    assert (state(found), sick(found)) == (word, {check})


def test_a_bounded_server_that_evicts_nothing_is_ready(server: Valkey, client: Redis) -> None:
    client.config_set("maxmemory", "1gb")

    assert state(checks(server.url)) == "ready"


def test_an_evicting_policy_without_a_bound_evicts_nothing(server: Valkey, client: Redis) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")

    assert state(checks(server.url)) == "ready"


def test_a_replica_is_not_ready(server: Valkey, client: Redis) -> None:
    """A fail-over without a new address: every write would be refused."""
    client.replicaof("127.0.0.1", "1")

    found = checks(server.url)

    assert (state(found), "writable" in sick(found)) == ("not ready", True)


def test_where_config_is_forbidden_durability_is_unverified_and_not_sick(server: Valkey, client: Redis) -> None:
    """As in managed Redis."""
    client.acl_setuser("managed", enabled=True, nopass=True, categories=["+@all"], commands=["-config"], keys=["*"])

    found = checks(f"redis://managed:x@127.0.0.1:{server.port}/0")

    assert (state(found), found["durable"].ok) == ("ready", True)
    assert found["durable"].detail.startswith("unverified")


def test_a_wrong_password_is_not_ready_and_the_password_is_not_told(server: Valkey, client: Redis) -> None:
    found = checks(f"redis://:canary@127.0.0.1:{server.port}/0")

    assert (state(found), set(found)) == ("not ready", {"redis"})
    assert "canary" not in found["redis"].detail


def test_a_frozen_server_is_not_ready_in_time(own_valkey: Valkey) -> None:
    own_valkey.pause()
    started = time.monotonic()

    found = checks(own_valkey.url)

    assert (state(found), set(found)) == ("not ready", {"redis"})
    assert time.monotonic() - started < 2.5


def test_a_server_that_is_gone_is_not_ready(own_valkey: Valkey) -> None:
    own_valkey.kill()

    found = checks(own_valkey.url)

    assert (state(found), set(found)) == ("not ready", {"redis"})
    assert found["redis"].detail == "no answer (ConnectionError)"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is played by /dev/full, which Linux has")
def test_a_server_that_cannot_write_its_file_is_not_ready(own_valkey: Valkey) -> None:
    """A full disk: Redis refuses writes from then on, and says so before it is asked."""
    files = own_valkey.data_dir / "appendonlydir"
    (files / "appendonly.aof.2.incr.aof").symlink_to("/dev/full")
    with Redis.from_url(own_valkey.url) as client:
        # The rewrite goes on in the next file, which is the full disk.
        client.bgrewriteaof()
        with pytest.raises(ResponseError, match="MISCONF"):
            eventually(lambda: client.set("key", "value") is None, what="a refused write")

        found = checks(own_valkey.url)

    assert (state(found), sick(found)) == ("not ready", {"writable"})
