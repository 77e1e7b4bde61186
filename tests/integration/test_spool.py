"""With SPOOL_DIR every event is taken, whatever Redis does, and comes to Redis by itself when it is back."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from app.dev.valkey import Valkey, start
from app.ids import OrderKey
from app.intake.spool import NAME, waiting
from app.ledger.keys import record
from tests.eventually import eventually
from tests.integration.relay import relay
from tests.integration.webserver import HOOK, SECRET, Kept, Web, item, serving, settings_of_one_company

LONGEST = 2.5
"""Seconds within which a POST is answered whatever Redis does."""

# A disk that is full: no file may grow beyond 150 kB.
SMALL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
from app.cli.main import main
main()
"""


@pytest.fixture
def redis(own_valkey: Valkey) -> Iterator[Redis]:
    with Redis.from_url(own_valkey.url, socket_timeout=5) as client:
        yield client


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def settings(url: str, spool: Path, **more: str) -> dict[str, str]:
    return settings_of_one_company(url) | {"SPOOL_DIR": str(spool), "OPS_TOKEN": "canary-ops-token"} | more


def key(one: dict[str, Any]) -> OrderKey:
    return OrderKey(one["companyId"], one["payload"]["orderId"])


def timed(web: Web, *items: object) -> tuple[dict[str, Any], float]:
    """POST the items; return the receipt, which must come with 200, and the seconds it took."""
    started = time.monotonic()
    receipt = web.deliver(*items)
    return receipt, time.monotonic() - started


def is_home(redis: Redis, *items: dict[str, Any]) -> bool:
    """Tell whether each order is owed exactly one fetch."""
    due = Kept(redis).due()
    return all(key(one) in due for one in items)


def frozen(valkey: Valkey, redis: Redis) -> Callable[[], None]:
    valkey.pause()
    return valkey.resume


def killed(valkey: Valkey, redis: Redis) -> Callable[[], None]:
    valkey.kill()
    return valkey.restart


def read_only(valkey: Valkey, redis: Redis) -> Callable[[], object]:
    redis.replicaof("127.0.0.1", "1")
    return lambda: redis.replicaof("NO", "ONE")


def full(valkey: Valkey, redis: Redis) -> Callable[[], object]:
    redis.config_set("maxmemory", "1mb")
    return lambda: redis.config_set("maxmemory", 0)


def slow(valkey: Valkey, redis: Redis) -> Callable[[], object]:
    redis.client_pause(60_000, all=False)
    return redis.client_unpause


@pytest.mark.parametrize("trouble", [frozen, killed, read_only, full, slow])
def test_the_intake_goes_on_and_redis_gets_everything_when_it_is_back(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path, trouble: Callable[..., Callable[[], object]]
) -> None:
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        before, first, second, after = item(), item(), item(), item()
        assert web.deliver(before)["queued"] == 1
        assert eventually(lambda: web.http.get("/readyz").text == "ready\n", what="ready")

        recover = trouble(own_valkey, redis)
        receipt, seconds = timed(web, first)
        assert receipt["spooled"] == 1
        assert seconds < LONGEST
        # From here on nobody waits for Redis.
        receipt, seconds = timed(web, second, second)
        assert receipt["spooled"] == 2
        assert seconds < 0.4
        eventually(lambda: web.http.get("/readyz").text == "degraded\n", what="degraded")
        assert web.http.get("/readyz").status_code == 200

        recover()
        eventually(lambda: is_home(redis, first, second), 20, what="the spool is drained")
        eventually(lambda: web.http.get("/readyz").text == "ready\n", 5, what="ready again")
        assert web.deliver(after)["queued"] == 1
        for one in (before, first, second, after):
            assert Kept(redis).record(key(one))["generation"] == "1"


def test_a_failover_is_found_though_the_old_primary_still_answers(
    own_valkey: Valkey, tmp_path: Path, spool: Path
) -> None:
    """The address moves; connections to the former primary live on, and it says READONLY for ever."""
    with (
        start(tmp_path / "other") as other,
        relay(own_valkey.port) as network,
        Redis.from_url(own_valkey.url) as old,
        Redis.from_url(other.url) as new,
    ):
        password = old.config_get("requirepass")["requirepass"]
        new.config_set("requirepass", password)
        with serving(tmp_path, settings(network.url(own_valkey.url), spool)) as web:
            assert web.deliver(item())["queued"] == 1
            network.target = other.port
            old.replicaof("127.0.0.1", str(other.port))
            one = item()
            assert web.deliver(one)["spooled"] == 1
            with Redis.from_url(other.url.replace(new_password(other.url), password)) as primary:
                eventually(lambda: is_home(primary, one), 10, what="the new primary has it")
                assert eventually(lambda: web.deliver(item())["queued"] == 1, what="live again")


def new_password(url: str) -> str:
    return url.partition("//:")[2].partition("@")[0]


def test_a_redis_that_answers_slowly_costs_a_sender_no_more_than_2500_ms(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    with (
        relay(own_valkey.port) as network,
        serving(tmp_path, settings(network.url(own_valkey.url), spool)) as web,
    ):
        network.delay = 0.45
        items = [item() for _ in range(6)]
        for one in items:
            _, seconds = timed(web, one)
            assert seconds < LONGEST
        network.delay = 0.0
        eventually(lambda: is_home(redis, *items), 30, what="all are home")
        assert {Kept(redis).record(key(one))["generation"] for one in items} == {"1"}


def test_without_redis_the_service_starts_and_takes_events(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    own_valkey.stop()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        one = item()
        assert web.deliver(one)["spooled"] == 1
        own_valkey.restart()
        eventually(lambda: is_home(redis, one), 10, what="drained")


def test_what_a_process_left_is_drained_by_the_next(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    """Killed, or stopped in good order."""
    own_valkey.stop()
    killed_with, stopped_with = [item() for _ in range(3)], item()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        assert web.deliver(*killed_with)["spooled"] == 3
        os.kill(web.process.pid, signal.SIGKILL)
        web.process.wait(5)
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        assert web.deliver(stopped_with)["spooled"] == 1
        assert web.process.stop() == 0
    assert waiting(spool) == 4
    own_valkey.restart()

    with serving(tmp_path, settings(own_valkey.url, spool)):
        eventually(lambda: is_home(redis, *killed_with, stopped_with), 10, what="drained")
        eventually(lambda: waiting(spool) == 0, what="nothing is left")


def test_processes_share_one_file_and_any_of_them_drains_it(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        serving(tmp_path / "a", settings(own_valkey.url, spool)) as living,
        serving(tmp_path / "b", settings(own_valkey.url, spool)) as dying,
    ):
        own_valkey.pause()
        items = [item() for _ in range(40)]
        with ThreadPoolExecutor(20) as senders:
            answers = [senders.submit(timed, web, one) for web, one in zip([living, dying] * 20, items, strict=True)]
        assert all(one.result()[0]["spooled"] == 1 and one.result()[1] < LONGEST for one in answers)
        dying.process.kill()
        own_valkey.resume()

        eventually(lambda: is_home(redis, *items), 15, what="drained")
        eventually(lambda: waiting(spool) == 0, what="nothing is left")
        assert {Kept(redis).record(key(one))["generation"] for one in items} == {"1"}


def test_a_broken_file_is_reported_and_the_intake_heals_when_it_is_moved_away(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    spool.mkdir(mode=0o700)
    (spool / NAME).write_bytes(b"this is no database, and longer than the header of one" * 20)
    (spool / NAME).chmod(0o600)
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        eventually(lambda: any(line["event"] == "spool.failed" for line in web.lines()), what="it is logged")
        bearer = {"authorization": "Bearer canary-ops-token"}
        assert "spool.sqlite is broken" in web.http.get("/readyz", headers=bearer).text
        assert "ota_spool_waiting_events 0" not in web.http.get("/metrics", headers=bearer).text
        assert waiting(spool) is None
        own_valkey.stop()
        one = item()
        assert web.post({"values": [one]}).json()["reason"] == "spool_failed"
        (spool / NAME).rename(spool / "broken")
        assert web.deliver(one)["spooled"] == 1
        assert len([line for line in web.lines() if line["event"] == "spool.failed"]) == 1
        own_valkey.restart()
        eventually(lambda: is_home(redis, one), 10, what="drained")


def test_when_the_spool_is_full_the_sender_keeps_its_events(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    """503 with Retry-After, and every event that was answered 200 before comes home."""
    own_valkey.stop()
    with serving(tmp_path, settings(own_valkey.url, spool, SPOOL_MAX_MB="1")) as web:
        kept: list[dict[str, Any]] = []
        while True:
            batch = [item() for _ in range(100)]
            answer = web.post({"values": batch})
            if answer.status_code != 200:
                break
            kept += batch
        assert (answer.status_code, answer.json()["reason"]) == (503, "spool_failed")
        assert int(answer.headers["retry-after"]) > 0
        assert len(kept) >= 500
        assert web.http.get("/readyz").status_code == 503
        assert sum(path.stat().st_size for path in spool.iterdir()) < 1_200_000

        own_valkey.restart()
        eventually(lambda: is_home(redis, *kept), 20, what="drained")
        eventually(lambda: web.http.get("/readyz").text == "ready\n", what="ready again")


def test_when_the_disk_is_full_the_sender_keeps_its_events(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    own_valkey.stop()
    with serving(tmp_path, settings(own_valkey.url, spool), [sys.executable, "-c", SMALL_DISK, "serve"]) as web:
        kept: list[dict[str, Any]] = []
        while True:
            batch = [item() for _ in range(20)]
            answer = web.post({"values": batch})
            if answer.status_code != 200:
                break
            kept += batch
        assert (answer.status_code, answer.json()["reason"]) == (503, "spool_failed")
        own_valkey.restart()
        eventually(lambda: is_home(redis, *kept), 20, what="drained")


def test_a_call_that_timed_out_and_ran_all_the_same_makes_no_second_event(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    """The frozen server has the command in its socket and runs it when it thaws; the spool says it once more."""
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        web.deliver(item())
        own_valkey.pause()
        one = item()
        assert web.deliver(one)["spooled"] == 1
        own_valkey.resume()

        eventually(lambda: Kept(redis).record(key(one)).get("duplicates") == "1", 10, what="drained as a duplicate")
        assert Kept(redis).record(key(one))["generation"] == "1"
        assert len(Kept(redis).events()) == 2


def test_senders_of_the_same_moment_are_all_answered_though_one_hangs_up(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        web.deliver(item())
        own_valkey.pause()
        items = [item() for _ in range(40)]
        impatient = item()
        body = json.dumps({"values": [impatient]}).encode()
        with ThreadPoolExecutor(40) as senders:
            posts = [senders.submit(timed, web, one) for one in items]
            with web.connect() as gone:
                head = f"POST {HOOK} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
                gone.sendall(head.encode() + body)
            answers = [one.result() for one in posts]
        assert all(receipt["spooled"] == 1 for receipt, _ in answers)
        assert max(seconds for _, seconds in answers) < LONGEST
        own_valkey.resume()
        eventually(lambda: is_home(redis, impatient, *items), 15, what="drained")


@pytest.mark.parametrize("turn", ["the bad one first", "the good one first"])
def test_an_event_that_redis_refuses_holds_up_no_other(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path, turn: str
) -> None:
    """A key of the wrong type stands where its record should be; it stays on the disk, and ops are told."""
    bad, good = item(), item()
    redis.set(record(key(bad)), "not a hash")
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        assert web.deliver(*((bad, good) if turn == "the bad one first" else (good, bad)))["spooled"] == 2
        assert is_home(redis, good)
        assert Kept(redis).jobs() == [f"f-{good['companyId']}-{good['payload']['orderId']}-1"]
        eventually(lambda: any(line["event"] == "spool.event_refused" for line in web.lines()), what="ops are told")
        assert web.deliver(item())["queued"] == 1
        eventually(lambda: web.http.get("/readyz").text == "degraded\n", what="degraded")
        redis.delete(record(key(bad)))
        assert web.process.stop() == 0

    with serving(tmp_path, settings(own_valkey.url, spool)):
        eventually(lambda: is_home(redis, bad), 10, what="the next process tries it again")


def test_no_client_state_is_on_the_disk_and_the_files_are_closed_to_others(
    own_valkey: Valkey, tmp_path: Path, spool: Path
) -> None:
    own_valkey.stop()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        assert web.deliver(item())["spooled"] == 1
        held = b"".join(path.read_bytes() for path in spool.iterdir())
        assert held
        assert SECRET.encode() not in held
        assert spool.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in spool.iterdir()} == {0o600}


def test_what_is_answered_200_stands_in_a_file_that_was_synced(own_valkey: Valkey, tmp_path: Path, spool: Path) -> None:
    own_valkey.stop()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        one = item()
        web.deliver(one)
        with sqlite3.connect(spool / NAME) as seen:
            assert seen.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert seen.execute("SELECT order_id FROM events").fetchall() == [(one["payload"]["orderId"],)]
        seen.close()


@contextmanager
def opened(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode & 0o777
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize("which", ["the folder", "a file in it", "a link", "a file instead"])
def test_a_folder_that_is_not_ours_alone_is_refused_at_the_start(tmp_path: Path, spool: Path, which: str) -> None:
    if which == "a file instead":
        spool.write_text("")
    else:
        spool.mkdir(mode=0o755 if which == "the folder" else 0o700)
    if which == "a file in it":
        (spool / "1-00000000.sqlite").write_bytes(b"")
        (spool / "1-00000000.sqlite").chmod(0o644)
    if which == "a link":
        (spool / "1-00000000.sqlite").symlink_to("/dev/null")
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve"],
        env={**os.environ, **settings("redis://127.0.0.1:1", spool)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert "SPOOL_DIR" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_a_cleaner_deleted_is_made_anew_with_all_that_was_in_it(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    """Else it would go on taking events into a file that ends with the process."""
    own_valkey.stop()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        before, after = item(), item()
        assert web.deliver(before)["spooled"] == 1
        for path in spool.iterdir():
            path.unlink()
        assert web.deliver(after)["spooled"] == 1
        assert any(line["event"] == "spool.file_gone" and line["events"] == 1 for line in web.lines())
        web.process.kill()
    own_valkey.restart()
    with serving(tmp_path, settings(own_valkey.url, spool)):
        eventually(lambda: is_home(redis, before, after), 10, what="both are drained by the next process")


def test_many_who_ask_for_readiness_do_not_keep_the_disk_from_events(
    own_valkey: Valkey, tmp_path: Path, spool: Path
) -> None:
    own_valkey.stop()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web, ThreadPoolExecutor(20) as many:
        asked = [many.submit(web.http.get, "/readyz") for _ in range(200)]
        for _ in range(10):
            assert timed(web, item())[0]["spooled"] == 1
        assert {one.result().text for one in asked} == {"degraded\n"}


def test_processes_that_open_one_new_file_do_not_stop_each_other(spool: Path) -> None:
    """A rolling restart: the last one to close removes `-wal` while another looks at the folder.

    A lock that is held for longer than BUSY_SECONDS is a 503 for one sender, and nothing else may go wrong.
    """
    program = (
        "import sqlite3, sys, time; from pathlib import Path; from app.intake.spool import NAME, Spool, SpoolFile\n"
        "until, opened = time.monotonic() + 1.5, 0\n"
        "while time.monotonic() < until:\n"
        "    Spool(Path(sys.argv[1]), 10**8)\n"
        "    try:\n"
        "        file = SpoolFile(Path(sys.argv[1]) / NAME)\n"
        "        file.close()\n"
        "        opened += 1\n"
        "    except sqlite3.OperationalError as error:\n"
        "        assert error.sqlite_errorname == 'SQLITE_BUSY', error.sqlite_errorname\n"
        "assert opened > 5, opened\n"
    )
    command = [sys.executable, "-c", program, str(spool)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    for one in running:
        _, errors = one.communicate(timeout=30)
        assert (one.returncode, errors) == (0, b"")


# Ends with SIGKILL before or after a step of its spool, the first time it comes there.
DYING = """
import os, signal, sys
from app.cli.main import main
from app.intake.spool import SpoolFile

when, name = sys.argv.pop(1).split(":")
step = getattr(SpoolFile, name)

def last_step(*arguments):
    if when == "after":
        step(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(SpoolFile, name, last_step)
main()
"""


@pytest.mark.parametrize("step", ["before:put", "after:put", "before:drop", "after:drop"])
def test_a_process_killed_at_a_step_of_its_spool_loses_nothing_it_acknowledged(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path, step: str
) -> None:
    """What it drained without forgetting it is drained again, and dropped as a duplicate."""
    own_valkey.stop()
    one = item()
    acknowledged = False
    with serving(tmp_path, settings(own_valkey.url, spool), [sys.executable, "-c", DYING, step, "serve"]) as web:
        try:
            acknowledged = web.deliver(one)["spooled"] == 1
        except httpx.TransportError:
            assert step.endswith("put")
        own_valkey.restart()
        assert web.process.wait(15) == -signal.SIGKILL
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        if step == "before:put":
            assert web.deliver(one)["queued"] == 1
        eventually(lambda: is_home(redis, one), 10, what="it is owed")
        eventually(lambda: waiting(spool) == 0, what="nothing is left")
        assert Kept(redis).record(key(one))["generation"] == "1"
        assert len(Kept(redis).events()) == 1
    assert acknowledged == step.endswith("drop")
