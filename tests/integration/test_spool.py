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

from app.dev.processes import Process, free_port
from app.dev.valkey import Valkey, start
from app.ids import OrderKey
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


def files(spool: Path) -> list[str]:
    return sorted(path.name for path in spool.iterdir() if path.suffix == ".sqlite")


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
            assert Kept(redis).record(key(one))["wanted"] == "1"


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
        assert {Kept(redis).record(key(one))["wanted"] for one in items} == {"1"}


def test_without_redis_the_service_starts_and_takes_events(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    own_valkey.stop()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        one = item()
        assert web.deliver(one)["spooled"] == 1
        own_valkey.restart()
        eventually(lambda: is_home(redis, one), 10, what="drained")


def test_what_a_killed_process_left_is_drained_by_the_next(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    own_valkey.stop()
    items = [item() for _ in range(3)]
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        assert web.deliver(*items)["spooled"] == 3
        os.kill(web.process.pid, signal.SIGKILL)
        web.process.wait(5)
    left = files(spool)
    assert len(left) == 1
    own_valkey.restart()

    with serving(tmp_path, settings(own_valkey.url, spool)):
        eventually(lambda: is_home(redis, *items), 10, what="drained")
        eventually(lambda: left[0] not in files(spool), what="the drained file is gone")


def test_a_living_process_drains_what_another_that_died_left(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        serving(tmp_path / "a", settings(own_valkey.url, spool)) as living,
        serving(tmp_path / "b", settings(own_valkey.url, spool)) as dying,
    ):
        own_valkey.pause()
        one, other = item(), item()
        assert dying.deliver(one)["spooled"] == 1
        assert living.deliver(other)["spooled"] == 1
        dying.process.kill()
        own_valkey.resume()

        eventually(lambda: is_home(redis, one, other), 15, what="drained")
        eventually(lambda: len(files(spool)) == 1, what="one file is left: the living one's")


def test_a_file_that_cannot_be_read_keeps_no_other_from_being_drained(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path
) -> None:
    own_valkey.stop()
    one = item()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        assert web.deliver(one)["spooled"] == 1
        web.process.kill()
    for name in ("0-00000000.sqlite", "0-00000000.sqlite.lock"):
        (spool / name).write_bytes(b"this is no database, and longer than the header of one" * 20)
        (spool / name).chmod(0o600)
    own_valkey.restart()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        eventually(lambda: is_home(redis, one), 10, what="the good file is drained")
        told = [line for line in web.lines() if line["event"] == "spool.refused"]
        assert [line["problem"] for line in told] == ["0-00000000.sqlite cannot be read (DatabaseError)"]
    assert "0-00000000.sqlite" in files(spool)


def test_a_stop_in_good_order_leaves_what_is_not_drained_and_nothing_else(
    own_valkey: Valkey, tmp_path: Path, spool: Path
) -> None:
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        assert web.http.get("/readyz").text == "ready\n"
        assert len(files(spool)) == 1
        assert web.process.stop() == 0
    assert files(spool) == []

    own_valkey.stop()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        assert web.deliver(item())["spooled"] == 1
        assert web.process.stop() == 0
    assert len(files(spool)) == 1


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
        assert Kept(redis).record(key(one))["wanted"] == "1"
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
        (name,) = files(spool)
        with sqlite3.connect(spool / name) as seen:
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


def test_processes_that_come_and_go_in_one_folder_do_not_stop_each_others_start(spool: Path) -> None:
    """A rolling restart: one deletes its empty files while another looks at the folder."""
    program = (
        "import sys, time; from pathlib import Path; from app.intake.spool import SpoolFolder\n"
        "until = time.monotonic() + 1.5\n"
        "while time.monotonic() < until:\n"
        "    SpoolFolder(Path(sys.argv[1]), 10**8).create().discard()\n"
    )
    spool.mkdir(mode=0o700)
    command = [sys.executable, "-c", program, str(spool)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    for one in running:
        _, told = one.communicate(timeout=30)
        assert (one.returncode, told) == (0, b"")
    assert files(spool) == []


# Ends with SIGKILL before or after a step of its spool, the first time it comes there.
DYING = """
import os, signal, sys
from app.cli.main import main
from app.intake.spool import SpoolFile
from app.intake.spool import Claim

when, name = sys.argv.pop(1).split(":")
of = Claim if name == "discard" else SpoolFile
step = getattr(of, name)

def last_step(*arguments):
    if when == "after":
        step(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(of, name, last_step)
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
        eventually(lambda: len(files(spool)) <= 1, what="what the dead one left is cleared away")
        assert Kept(redis).record(key(one))["wanted"] == "1"
        assert len(Kept(redis).events()) == 1
    assert acknowledged == step.endswith("drop")


@pytest.mark.parametrize("step", ["before:discard", "after:discard"])
def test_a_process_killed_while_it_clears_away_leaves_nothing_that_hinders_the_next(
    own_valkey: Valkey, redis: Redis, tmp_path: Path, spool: Path, step: str
) -> None:
    own_valkey.stop()
    one = item()
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        assert web.deliver(one)["spooled"] == 1
        web.process.kill()
    own_valkey.restart()
    # Not `serving`: it may be dead before it has answered anybody.
    env = {**os.environ, **settings(own_valkey.url, spool), "PORT": str(free_port())}
    with Process.start(
        [sys.executable, "-c", DYING, step, "serve"], env=env, cwd=tmp_path, log=tmp_path / "dying.log"
    ) as dying:
        assert dying.wait(15) == -signal.SIGKILL
    with serving(tmp_path, settings(own_valkey.url, spool)) as web:
        eventually(lambda: web.http.get("/readyz").text == "ready\n", what="ready")
        eventually(lambda: len(files(spool)) == 1, what="only its own file is left")
        assert is_home(redis, one)
        assert Kept(redis).record(key(one))["wanted"] == "1"
