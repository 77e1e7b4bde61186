"""Readiness: each way in which a real Redis server cannot record events durably is reported."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from redis.exceptions import BusyLoadingError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from app import bootstrap
from app.dev.processes import Process
from app.dev.valkey import Valkey, start
from app.errors import StoreUnavailable
from app.health import Check, Health
from app.intake.recorder import Inbox
from app.ledger import redis as redis_module
from app.ledger.keys import DEFAULT_PREFIX
from app.ledger.redis import SERVER_STATES, Redis, code, for_command, is_unavailable, old_server, source
from app.ledger.rights import NEEDED, acl_name, missing
from tests.eventually import eventually
from tests.lab_upstream import Upstream
from tests.service import SELF_SIGNED, serving, settings_of_one_company

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
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


def test_the_event_that_readiness_records_is_apart_from_every_deployment(server: Valkey, client: Redis) -> None:
    """Also from one whose KEY_PREFIX begins as ours does."""
    for prefix in ("ota", "ota-probe", "ota-f", "ota-live"):
        client.rpush(f"rq:queue:{prefix}-live", "a job")
        client.sadd("rq:queues", f"rq:queue:{prefix}-live")
    before = sorted(client.keys()), client.smembers("rq:queues")

    assert checks(server.url)[0] == "ready"

    # RQ's set of queues may keep the name.
    assert sorted(client.keys()) == before[0]
    assert client.smembers("rq:queues") >= before[1]
    assert {client.llen(f"rq:queue:{prefix}-live") for prefix in ("ota", "ota-probe")} == {1}


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
        (["+@all", "-multi"], ["*"], ("not ready", False, "NOPERM multi")),
        (["+@all", "-exec"], ["*"], ("not ready", False, "NOPERM exec")),
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


def missing_rights(server: Valkey, client: Any, *rules: str, needs: Sequence[str] = tuple(NEEDED)) -> str:
    """Return what a user with these rules lacks."""
    client.execute_command("ACL", "SETUSER", "other", "reset", "on", ">x", *rules)
    with Redis.from_url(f"redis://other:x@127.0.0.1:{server.port}/0") as other:
        return missing(other, *needs)


def test_each_command_that_a_user_may_not_run_is_named_with_who_needs_it(server: Valkey, client: Redis) -> None:
    for who, commands in NEEDED.items():
        for one in map(acl_name, commands):
            assert missing_rights(server, client, "~*", "+@all", f"-{one}") == f"{one} ({who})"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("~* +@all", ""),
        ("~* +@all -info -config -client", ""),
        (re.findall(r"^ACL SETUSER ota on >PASSWORD (.+)$", PAGE.read_text(), re.MULTILINE)[0], ""),
        (
            "~* +@all -blmove -hgetall -lrange -xread",
            "lrange, hgetall (web and workers); blmove (workers); xread (comm",
        ),
        ("~ota:* +@all", "keys rq:* (web and workers)"),
        ("~ota:* ~rq:* -@all", "multi, exec (web and workers); watch (workers)"),
        ("~rq:* +@all", "keys ota:* (web and workers)"),
        ("~ota:* ~rq:queue* ~rq:job:* +@all", "keys rq:workers*, keys rq:worker:*, keys rq:wip:*"),
        ("~ota:* %R~rq:* +@all", "keys rq:* (web and workers)"),
    ],
)
def test_the_rights_that_a_user_lacks_are_one_phrase(server: Valkey, client: Redis, rules: str, expected: str) -> None:
    """Where MULTI itself is refused, the others cannot be tried without doing them."""
    found = missing_rights(server, client, *rules.split())

    assert found.startswith(expected) if expected else not found


def test_readiness_and_the_check_of_the_rights_leave_nothing_behind(server: Valkey, client: Redis) -> None:
    client.flushdb()

    assert (checks(server.url)[0], missing_rights(server, client, "~*", "+@all")) == ("ready", "")
    assert client.keys("*") == []


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A port that speaks TLS only."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(SELF_SIGNED.split(), cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "all.pem", folder / "key.pem")

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError), context.wrap_socket(connection, server_side=True) as shown:
                shown.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


WRONG: Final = {
    "wrong password": ("redis://:canary@127.0.0.1:{port}/0", "wrong password, or the user is missing or off"),
    "an @ in it": ("redis://:12@canary@127.0.0.1:{port}/0", "wrong password, or the user is missing or off"),
    "no such user": ("redis://missing:canary@127.0.0.1:{port}/0", "wrong password, or the user is missing or off"),
    "no password": ("redis://127.0.0.1:{port}/0", "needs a password"),
    "host": ("redis://:canary@no-such-host.invalid:6379/0", "no-such-host.invalid:6379 is unknown"),
    "port": ("redis://:canary@127.0.0.1:1/0", "Redis at 127.0.0.1:1 refuses connections"),
    "TLS on a plain port": ("rediss://:canary@127.0.0.1:{port}/0", "if this port has no TLS, use redis://"),
    "no TLS on its port": ("redis://:canary@127.0.0.1:{tls}/0", "if this port needs TLS, use rediss://"),
    "CA": ("rediss://:canary@127.0.0.1:{tls}/0", "not trusted (self-signed certificate): name its CA"),
    "no CA file": ("rediss://:canary@127.0.0.1:{tls}/0?ssl_ca_certs=/none", "a file that REDIS_URL names is missing"),
    "database": ("redis://:{password}@127.0.0.1:{port}/99", "has no database 99"),
    "socket": ("unix://:canary@/none.sock", "Redis at /none.sock cannot be reached: that socket is missing"),
    "no Redis": ("redis://:canary@127.0.0.1:{http}/0", "is no Redis: another program answers"),
}
"""What is wrong with REDIS_URL -> the address, and what every process says."""


@pytest.fixture
def wrong_url(request: pytest.FixtureRequest, server: Valkey, tls: int, upstream: Upstream) -> str:
    password = server.url.split(":")[2].partition("@")[0]
    url = WRONG[request.param][0]
    return url.format(port=server.port, tls=tls, password=password, http=upstream.port)


@pytest.mark.parametrize(
    ("wrong_url", "sentence"), [(one, text) for one, (_, text) in WRONG.items()], indirect=["wrong_url"]
)
def test_what_is_wrong_with_the_address_is_one_sentence_everywhere(
    wrong_url: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readiness, `check` and the other commands say the same, without the password."""
    # A port without TLS leaves the first words of TLS unanswered.
    monkeypatch.setattr(redis_module, "WORKER_TIMEOUT", 1.0)
    state, found = checks(wrong_url)
    with pytest.raises(StoreUnavailable) as refused, for_command(wrong_url, DEFAULT_PREFIX):
        pass

    assert (state, set(found), found["redis"].detail) == ("not ready", {"redis"}, str(refused.value))
    assert sentence in found["redis"].detail
    assert "canary" not in found["redis"].detail


@pytest.mark.parametrize("wrong_url", ["wrong password", "port", "CA"], indirect=True)
def test_web_and_the_pool_start_and_log_the_cause_once(wrong_url: str, request: Any, tmp_path: Path) -> None:
    sentence = WRONG[request.node.callspec.params["wrong_url"]][1]
    env = settings_of_one_company(wrong_url)

    def lines(text: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, text.splitlines()) if "cause" in line]

    with Process.start(
        [sys.executable, "-m", "app.cli", "worker"], env=os.environ | env, log=tmp_path / "pool.log"
    ) as pool:
        for spool in ({}, {"SPOOL_DIR": str(tmp_path / "spool")}):
            with serving(tmp_path, env | spool) as web:
                (line,) = eventually(lambda: lines(web.process.output), what="web says it")
                assert (sentence in line["cause"], line["role"]) == (True, "web")
        pool.wait_for_line('"cause"', 10)
    (line,) = lines(pool.output)
    assert (sentence in line["cause"], line["role"]) == (True, "worker")
    assert "canary" not in pool.output + (tmp_path / "web.log").read_text()


@pytest.mark.parametrize(
    ("fault", "detail"),
    [(Valkey.pause, "does not answer in time"), (Valkey.kill, "refuses connections")],
    ids=["frozen", "killed"],
)
def test_a_server_that_does_not_answer_is_not_ready_in_time(own_valkey: Valkey, fault: Any, detail: str) -> None:
    fault(own_valkey)
    started = time.monotonic()

    state, found = checks(own_valkey.url)

    assert (state, set(found), detail in found["redis"].detail) == ("not ready", {"redis"}, True)
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
    ("error", "found", "is_everybodys"),
    [
        # As Redis 6.2 has it, which puts the error of a command into that of the script.
        (ResponseError("Error running script (call to f_1): @user_script:9: -OOM command not allowed"), "OOM", True),
        (ResponseError("@user_script: 9: Write when NOREPLICAS Not enough good replicas"), "NOREPLICAS", True),
        (NoPermissionError("this user has no permissions to access one of the keys used"), "NOPERM key", True),
        (ResponseError("EXEC without MULTI"), "NOPERM multi", True),
        (BusyLoadingError("Redis is loading the dataset", status_code="LOADING"), "LOADING", True),
        (RedisConnectionError("Connection refused"), "ConnectionError", True),
        (ResponseError("WRONGTYPE Operation against a key"), "WRONGTYPE", False),
        (ResponseError("Command # 1 (SET OOM READONLY) of pipeline caused error: WRONGTYPE of"), "WRONGTYPE", False),
        (ResponseError("BUSYGROUP name already exists"), "BUSYGROUP", False),
    ],
)
def test_an_error_is_everybodys_by_its_code_and_else_that_of_one_step(
    error: RedisError, found: str, is_everybodys: bool
) -> None:
    assert (code(error), is_unavailable(error)) == (found, is_everybodys)


def test_scripts_and_python_know_the_same_codes() -> None:
    (listed,) = re.findall(r"server_errors = {(.*?)}", source("accept"), re.DOTALL)
    assert set(re.findall("[A-Z]+", listed)) == SERVER_STATES


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
