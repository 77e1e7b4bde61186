"""With SPOOL_DIR every event is accepted, whatever Redis does, and is recorded in Redis when it works again."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from app.dev.valkey import Valkey, start
from app.errors import SettingsError
from app.intake.envelope import OrderProcessed
from app.intake.spool import Spool, SpoolState
from app.intake.spool_file import NAME, SpoolFile, waiting
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.integration.relay import relay
from tests.lab import KEYS, VENUE, Lab, order
from tests.service import (
    OPS_TOKEN,
    SECRET,
    SERVE,
    Web,
    item,
    key_of,
    post,
    samples,
    serve_changed,
    serving,
    settings_of_one_company,
)

LONGEST = 2.5
"""Seconds within which a POST is answered whatever Redis does."""

NO_REDIS = "redis://127.0.0.1:1"

# Looks into the spool more often: a test waits for it.
HASTY = serve_changed("from app.intake import failover; failover.CHECK_EVERY = 0.2")

EVENT = OrderProcessed("c" * 36, "o" * 36, "Issued", "r" * 100, "", "current")

# A disk that is full: no file may grow beyond 150 kB.
SMALL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
from app.cli.main import main
main()
"""

# Ends with SIGKILL before or after a step of its spool, the first time it comes there.
KILLED_AT = """
import os, signal, sys
from app.cli.main import main
from app.intake.spool_file import SpoolFile

when, name = sys.argv.pop(1).split(":")
step = getattr(SpoolFile, name)

def last_step(*arguments):
    if when == "after":
        step(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(SpoolFile, name, last_step)
main()
"""


# Deletes no event from its spool until there is a file `room`.
NOTHING_IS_DELETED = """
import sqlite3
from pathlib import Path
from app.cli.main import main
from app.intake import failover
from app.intake.spool_file import SpoolFile

delete = SpoolFile.delete_recorded

def delete_with_room(*arguments):
    if Path("room").exists():
        return delete(*arguments)
    with open("tries", "a") as tries:
        tries.write(".")
    raise sqlite3.OperationalError("database or disk is full")

SpoolFile.delete_recorded, failover.CHECK_EVERY, failover.RETRY_REFUSED_EVERY = delete_with_room, 0.05, 0.3
main()
"""


@dataclass
class Machine:
    """A machine with a Redis and a spool of its own; its programs have their logs in `folder`."""

    valkey: Valkey
    redis: Redis
    folder: Path

    @property
    def spool(self) -> Path:
        return self.folder / "spool"

    def serve(
        self, program: Sequence[str] = HASTY, url: str = "", folder: str = ".", **more: str
    ) -> AbstractContextManager[Web]:
        """Run a web process with a spool; the Redis is at `url` instead, if that is given."""
        settings = {"SPOOL_DIR": str(self.spool), "OPS_TOKEN": OPS_TOKEN} | more
        (self.folder / folder).mkdir(exist_ok=True)
        return serving(self.folder / folder, settings_of_one_company(url or self.valkey.url) | settings, program)

    def wait_until_drained(self, *items: dict[str, Any]) -> None:
        """Return when all orders are in `due` and have a record; each must have been settled once."""
        lab = Lab(self.redis)

        def generations() -> list[str]:
            assert {key_of(one) for one in items} <= lab.due().keys()
            return [lab.record(key_of(one)).get("generation", "") for one in items]

        eventually(lambda: all(generations()), 30, what="the spool is drained")
        assert set(generations()) == {"1"}

    def wait_until_empty(self) -> None:
        eventually(lambda: waiting(self.spool) == 0, what="the spool is empty")


@pytest.fixture
def machine(own_valkey: Valkey, tmp_path: Path) -> Iterator[Machine]:
    with Redis.from_url(own_valkey.url, socket_timeout=5) as client:
        yield Machine(own_valkey, client, tmp_path)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def timed(web: Web, *items: object) -> tuple[int, float]:
    """POST the items, which must be answered 200; return how many were spooled, and the seconds it took."""
    started = time.monotonic()
    spooled: int = web.deliver(*items)["spooled"]
    return spooled, time.monotonic() - started


def put_in_place(path: Path, how: str) -> None:
    """Put a file where the spool is expected that is not one, or not a whole one."""
    if how == "no database":
        path.write_bytes(b"this is no database, and longer than the header of one" * 20)
    elif how == "another program's":
        with closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, what TEXT)")
    else:
        file = SpoolFile(path)
        file.put([EVENT] * 500)
        file.close()
    if how == "damaged":
        with path.open("r+b") as whole:
            whole.seek(5 * 4096)
            whole.write(b"\xff" * 20 * 4096)
    if how == "beside a foreign log":
        path.with_name(f"{NAME}-wal").touch()
    for one in path.parent.iterdir():
        one.chmod(0o600)


def take_away(path: Path, how: str) -> None:
    """Delete, replace or empty the file of a spool that is in use."""
    if how == "emptied":
        # Under a lock: a file that loses its pages during a write is a damaged one.
        with closing(sqlite3.connect(path, isolation_level=None)) as another:
            another.execute("BEGIN EXCLUSIVE")
            os.truncate(path, 0)
    elif how == "replaced":
        (path.parent.parent / "other").touch(0o600)
        (path.parent.parent / "other").rename(path)
    elif how == "deleted":
        path.unlink()
    else:
        shutil.rmtree(path.parent)


def gone_of(web: Web) -> list[tuple[int, int]]:
    """Return how many events each `spool.file_gone` names as readable and as lost."""
    return [(line["events"], line["lost"]) for line in web.lines() if line["event"] == "spool.file_gone"]


def limit_files(web: Web, size: int) -> None:
    """Let no file of the process grow beyond `size` bytes: a full disk without a mount."""
    resource.prlimit(web.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def wait_until_ready(web: Web, answer: str) -> None:
    eventually(lambda: web.http.get("/readyz").text == f"{answer}\n", 10, what=f"/readyz answers {answer}")


FAULTS: Final[dict[str, tuple[Callable[[Machine], object], Callable[[Machine], object]]]] = {
    "frozen": (lambda one: one.valkey.pause(), lambda one: one.valkey.resume()),
    "killed": (lambda one: one.valkey.kill(), lambda one: one.valkey.restart()),
    "read-only": (lambda one: one.redis.replicaof("127.0.0.1", "1"), lambda one: one.redis.replicaof("NO", "ONE")),
    "full": (lambda one: one.redis.config_set("maxmemory", "1mb"), lambda one: one.redis.config_set("maxmemory", 0)),
    "paused": (lambda one: one.redis.client_pause(60_000, all=False), lambda one: one.redis.client_unpause()),
}
"""What happens to Redis, and how it ends."""


class TestRedisUnavailable:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_events_are_accepted_and_redis_gets_them_all_when_it_is_back(self, machine: Machine, fault: str) -> None:
        occur, end = FAULTS[fault]
        with machine.serve() as web:
            before, first, second, after = item(), item(), item(), item()
            assert web.deliver(before)["queued"] == 1
            wait_until_ready(web, "ready")

            occur(machine)
            spooled, seconds = timed(web, first)
            assert (spooled, seconds < LONGEST) == (1, True)
            # From here on no sender waits for Redis.
            spooled, seconds = timed(web, second, second)
            assert (spooled, seconds < 1) == (2, True)
            wait_until_ready(web, "degraded")
            assert web.http.get("/readyz").status_code == 200

            end(machine)
            machine.wait_until_drained(before, first, second)
            wait_until_ready(web, "ready")
            assert web.deliver(after)["queued"] == 1

    def test_a_start_without_redis_writes_private_files_and_drains_them(self, machine: Machine) -> None:
        """What is answered 200 is in the file itself, which was synced."""
        machine.valkey.stop()
        with machine.serve() as web:
            one, traceparent = item(), f"00-{'a' * 32}-{'b' * 16}-01"
            answer = web.post({"values": [one]}, headers={"traceparent": traceparent})
            assert answer.json()["spooled"] == 1

            assert machine.spool.stat().st_mode & 0o777 == 0o700
            assert {path.stat().st_mode & 0o777 for path in machine.spool.iterdir()} == {0o600}
            assert SECRET.encode() not in b"".join(path.read_bytes() for path in machine.spool.iterdir())
            shutil.copy(machine.spool / NAME, machine.folder / "alone")
            with closing(sqlite3.connect(machine.folder / "alone")) as file:
                assert file.execute("SELECT order_id FROM events").fetchall() == [(one["payload"]["orderId"],)]

            machine.valkey.restart()
            machine.wait_until_drained(one)
            assert Lab(machine.redis).field("traceparent", key_of(one)) == traceparent

    def test_a_failover_is_found_though_the_former_primary_still_answers(self, machine: Machine) -> None:
        """The address moves; connections to the former primary stay open, and it answers READONLY for ever."""
        with (
            start(machine.folder / "other") as other,
            relay(machine.valkey.port) as network,
            Redis.from_url(machine.valkey.url) as old,
            Redis.from_url(other.url) as new,
        ):
            password = old.config_get("requirepass")["requirepass"]
            new.config_set("requirepass", password)
            with machine.serve(url=network.url(machine.valkey.url)) as web:
                assert web.deliver(item())["queued"] == 1
                network.target = other.port
                old.replicaof("127.0.0.1", str(other.port))
                one = item()
                assert web.deliver(one)["queued"] == 1, "recorded by the new primary"
                with Redis(port=other.port, password=password) as primary:
                    assert primary.exists(KEYS.record(key_of(one)))

    def test_a_slow_redis_delays_a_sender_by_2500_ms_at_most(self, machine: Machine) -> None:
        with relay(machine.valkey.port) as network, machine.serve(url=network.url(machine.valkey.url)) as web:
            network.delay = 0.45
            items = [item() for _ in range(6)]
            assert max(timed(web, one)[1] for one in items) < LONGEST
            network.delay = 0.0
            machine.wait_until_drained(*items)

    def test_a_call_that_timed_out_but_ran_makes_no_second_event(self, machine: Machine) -> None:
        """The frozen server has the command in its socket and runs it later; the spool sends the event again."""
        with machine.serve() as web:
            web.deliver(item())
            machine.valkey.pause()
            one = item()
            assert web.deliver(one)["spooled"] == 1
            machine.valkey.resume()

            lab = Lab(machine.redis)
            eventually(lambda: lab.record(key_of(one)).get("duplicates") == "1", 10, what="drained as a duplicate")
            assert (lab.record(key_of(one))["generation"], len(lab.events())) == ("1", 2)


class TestSeveralProcesses:
    def test_processes_share_one_file_and_any_of_them_drains_it(self, machine: Machine) -> None:
        with machine.serve(folder="a") as living, machine.serve(folder="b") as dying:
            machine.valkey.pause()
            items, disconnected = [item() for _ in range(40)], item()
            with ThreadPoolExecutor(40) as senders:
                answers = senders.map(timed, [living, dying] * 20, items)
                with living.connect() as connection:
                    connection.sendall(post(json.dumps({"values": [disconnected]}).encode()))
            assert all(spooled == 1 and seconds < LONGEST for spooled, seconds in answers)
            dying.process.kill()
            machine.valkey.resume()

            machine.wait_until_drained(disconnected, *items)
            machine.wait_until_empty()

    def test_processes_that_open_one_new_file_do_not_stop_each_other(self, spool: Path) -> None:
        """A lock that is held for longer than BUSY_SECONDS is a 503 for one sender, and nothing else may fail."""
        program = (
            "import sqlite3, sys, time; from pathlib import Path; from app.intake.spool import Spool\n"
            "from app.intake.spool_file import NAME, SpoolFile\n"
            "until, opened = time.monotonic() + 1.5, 0\n"
            "while opened < 6 or time.monotonic() < until:\n"
            "    Spool(Path(sys.argv[1]), 10**8)\n"
            "    try:\n"
            "        file = SpoolFile(Path(sys.argv[1]) / NAME)\n"
            "        file.close()\n"
            "        opened += 1\n"
            "    except sqlite3.OperationalError as error:\n"
            "        assert error.sqlite_errorname == 'SQLITE_BUSY', error.sqlite_errorname\n"
        )
        command = [sys.executable, "-c", program, str(spool)]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
        for one in running:
            _, errors = one.communicate(timeout=30)
            assert (one.returncode, errors) == (0, b"")

    @pytest.mark.parametrize("step", ["before:put", "after:put", "before:drop", "after:drop"])
    def test_a_process_killed_at_a_step_of_its_spool_loses_nothing(self, machine: Machine, step: str) -> None:
        """Events that it drained but did not delete are drained again, and are duplicates also without a timestamp."""
        machine.valkey.stop()
        one = item(timestamp=None)
        acknowledged = False
        command = [sys.executable, "-c", KILLED_AT, step, "serve"]
        with machine.serve(command) as web:
            try:
                acknowledged = web.deliver(one)["spooled"] == 1
            except httpx.TransportError:
                assert step.endswith("put")
            machine.valkey.restart()
            assert web.process.wait(15) == -signal.SIGKILL
        with machine.serve() as web:
            if step == "before:put":
                assert web.deliver(one)["queued"] == 1
            machine.wait_until_drained(one)
            machine.wait_until_empty()
            assert len(Lab(machine.redis).events()) == 1
        assert acknowledged == step.endswith("drop")


class TestDisk:
    @pytest.mark.parametrize("limit", ["SPOOL_MAX_MB", "disk"])
    def test_when_spool_or_disk_is_full_the_answer_is_503(self, machine: Machine, limit: str) -> None:
        program = {"SPOOL_MAX_MB": ["-m", "app.cli"], "disk": ["-c", SMALL_DISK]}[limit]
        machine.valkey.stop()
        with machine.serve([sys.executable, *program, "serve"], SPOOL_MAX_MB="1") as web:
            accepted: list[dict[str, Any]] = []
            while True:
                batch = [item() for _ in range(50)]
                answer = web.post({"values": batch})
                if answer.status_code != 200:
                    break
                accepted += batch
            assert (answer.status_code, answer.json()["reason"]) == (503, "spool_failed")
            assert int(answer.headers["retry-after"]) > 0
            assert sum(path.stat().st_size for path in machine.spool.iterdir()) < 1_200_000
            if limit == "SPOOL_MAX_MB":
                assert len(accepted) >= 500
                assert web.http.get("/readyz").status_code == 503

            machine.valkey.restart()
            machine.wait_until_drained(*accepted)
            if limit == "SPOOL_MAX_MB":
                wait_until_ready(web, "ready")

    @pytest.mark.parametrize("how", ["no database", "another program's", "damaged", "beside a foreign log"])
    def test_a_file_that_is_not_ours_is_reported_until_it_is_moved_away(self, machine: Machine, how: str) -> None:
        machine.spool.mkdir(mode=0o700)
        put_in_place(machine.spool / NAME, how)
        with machine.serve() as web:
            eventually(lambda: any(line["event"] == "spool.failed" for line in web.lines()), what="it is logged")
            bearer = {"authorization": f"Bearer {OPS_TOKEN}"}
            assert "spool.sqlite is broken or not ours" in web.http.get("/readyz", headers=bearer).text
            shown = samples(web.http.get("/metrics", headers=bearer).text)
            assert (shown["ota_spool_up"], shown.get("ota_spool_waiting_events")) == (0, None)
            machine.valkey.stop()
            one = item()
            assert web.post({"values": [one]}).json()["reason"] == "spool_failed"
            for path in machine.spool.iterdir():
                path.rename(machine.folder / path.name)
            assert web.deliver(one)["spooled"] == 1
            assert len([line for line in web.lines() if line["event"] == "spool.failed"]) == 1
            machine.valkey.restart()
            machine.wait_until_drained(one)

    @pytest.mark.parametrize("how", ["deleted", "overwritten", "deleted after the kill"])
    def test_companions_of_the_file_may_go_at_any_time(self, machine: Machine, how: str) -> None:
        """A clean-up job finds files that are not written for days."""
        machine.valkey.stop()
        with machine.serve() as web:
            items = [item() for _ in range(5)]
            assert web.deliver(*items)["spooled"] == 5
            if how == "deleted after the kill":
                web.process.kill()
            for path in machine.spool.glob(f"{NAME}-*"):
                path.write_bytes(b"x" * 5000) if how == "overwritten" else path.unlink()
            web.process.kill()
        assert waiting(machine.spool) == 5
        machine.valkey.restart()
        with machine.serve():
            machine.wait_until_drained(*items)
            machine.wait_until_empty()

    @pytest.mark.parametrize("how", ["deleted", "deleted with the folder", "replaced", "emptied"])
    def test_a_file_that_is_gone_is_written_anew_before_the_next_event(self, machine: Machine, how: str) -> None:
        """Otherwise events would go to a file that ends with the process; of an emptied one nothing can be read."""
        machine.valkey.stop()
        kept = 0 if how == "emptied" else 1
        with machine.serve() as web:
            before, after = item(), item()
            assert web.deliver(before)["spooled"] == 1
            take_away(machine.spool / NAME, how)
            eventually(lambda: waiting(machine.spool) == kept, 10, what="it is written anew")
            eventually(lambda: gone_of(web) == [(kept, 1 - kept)], what="it is logged")
            assert web.deliver(after)["spooled"] == 1
            web.process.kill()
        machine.valkey.restart()
        with machine.serve():
            machine.wait_until_drained(*[before, after][1 - kept :])
            machine.wait_until_empty()

    @pytest.mark.parametrize("how", ["deleted", "replaced", "emptied"])
    def test_the_first_event_after_the_file_is_gone_is_taken_at_once(self, spool: Path, how: str) -> None:
        """Nobody has noticed yet that it is gone. An emptied file is also the new one: no lock on it may stay."""

        async def put_twice() -> None:
            one = Spool(spool, 10**8)
            await one.put([EVENT])
            take_away(spool / NAME, how)
            await one.put([EVENT])

        asyncio.run(put_twice())

        assert waiting(spool) == (1 if how == "emptied" else 2)

    def test_a_file_that_was_deleted_while_nothing_ran_is_not_taken_for_an_empty_one(self, machine: Machine) -> None:
        machine.valkey.stop()
        with machine.serve() as web:
            web.deliver(item())
            web.process.kill()
        (machine.spool / NAME).unlink()
        assert waiting(machine.spool) is None
        with machine.serve() as web:
            eventually(lambda: any(line["event"] == "spool.file_gone" for line in web.lines()), what="it is logged")

    @pytest.mark.parametrize("end", ["redis is back", "stopped", "room is back"])
    def test_events_of_a_deleted_file_are_kept_though_no_other_can_be_written(self, machine: Machine, end: str) -> None:
        # Only its end asks Redis again.
        change = "from app.intake import failover; failover.FIRST_PAUSE = 60.0" if end == "stopped" else ""
        with machine.serve(serve_changed(change)) as web:
            machine.valkey.pause()
            items = [item() for _ in range(1000)]
            for start in range(0, 1000, 200):
                assert web.deliver(*items[start : start + 200])["spooled"] == 200
            limit_files(web, 150_000)
            (machine.spool / NAME).unlink()
            (machine.spool / f"{NAME}-journal").unlink()
            refused = item()
            answer = web.post({"values": [refused]})
            assert answer.json()["reason"] == "spool_failed"
            (line,) = [line for line in web.lines_of(answer) if line["event"] == "intake.unavailable"]
            assert "spool.sqlite was deleted, and a new one cannot be written" in line["cause"]
            eventually(lambda: gone_of(web) == [(1000, 0)], what="it is logged")
            assert waiting(machine.spool) is None

            if end == "room is back":
                limit_files(web, resource.RLIM_INFINITY)
                assert web.deliver(refused)["spooled"] == 1
                assert waiting(machine.spool) == 1001
            machine.valkey.resume()
            if end == "stopped":
                assert web.process.stop() == 0
                # Recorded are so many that the rest fits in a new file.
                with machine.serve(folder="next"):
                    machine.wait_until_empty()
            machine.wait_until_drained(*items)
            assert len(Lab(machine.redis).events()) == 1000 + (end == "room is back")
            machine.wait_until_empty()

    def test_a_reserve_of_the_disk_is_left_for_deleting(self, machine: Machine) -> None:
        """Otherwise a full spool could not be drained: deleting its rows needs a journal."""
        change = "from app.intake import spool_file; spool_file.RESERVE = 10**18"
        with machine.serve(serve_changed(change), url=NO_REDIS) as web:
            answer = web.post({"values": [item()]})
            assert (answer.status_code, answer.json()["reason"]) == (503, "spool_failed")
            (line,) = [line for line in web.lines_of(answer) if line["event"] == "intake.unavailable"]
            assert line["cause"] == "the disk is full"
            shown = web.http.get("/readyz", headers={"authorization": f"Bearer {OPS_TOKEN}"}).json()
            assert [one["detail"] for one in shown["checks"] if one["check"] == "spool"] == ["the disk is full"]
        program = f"from app.cli.main import main; {change}; main()"
        env = {**os.environ, **settings_of_one_company(NO_REDIS), "SPOOL_DIR": str(machine.spool)}
        command = [sys.executable, "-c", program, "check"]
        done = subprocess.run(command, env=env, cwd=machine.folder, capture_output=True, timeout=30, check=False)
        assert b"the disk is full" in done.stdout

    def test_the_log_says_how_many_events_were_lost_with_an_overwritten_file(self, machine: Machine) -> None:
        machine.valkey.stop()
        with machine.serve() as web:
            assert web.deliver(item(), item())["spooled"] == 2
            (machine.spool / NAME).write_bytes(b"no database" * 1000)
            answer = web.post({"values": [item()]})
            (line,) = [line for line in web.lines_of(answer) if line["event"] == "intake.unavailable"]
            assert "broken or not ours" in line["cause"]
            (machine.spool / NAME).unlink()
            assert web.deliver(item())["spooled"] == 1
            eventually(lambda: gone_of(web) == [(0, 2)], what="it is logged")

    def test_a_disk_without_room_to_delete_makes_no_second_fetch(self, machine: Machine) -> None:
        """Not of an event without a timestamp either; those behind them are drained, and deleted later."""
        machine.valkey.stop()
        with machine.serve([sys.executable, "-c", NOTHING_IS_DELETED, "serve"]) as web:
            items = [item(), item(timestamp=None), *(item() for _ in range(300))]
            assert web.deliver(*items[:250], items[1])["spooled"] == 251
            assert web.deliver(*items[250:])["spooled"] == 52
            machine.valkey.restart()
            machine.wait_until_drained(*items)
            tries = machine.folder / "tries"
            eventually(lambda: tries.stat().st_size > 8, what="it is tried again")
            assert any(line["event"] == "spool.failed" for line in web.lines())
            assert waiting(machine.spool) == 303
            assert not any(Lab(machine.redis).record(key_of(one)).get("duplicates") for one in items[2:])
            (machine.folder / "room").touch()
            machine.wait_until_empty()
            machine.wait_until_drained(*items)

    def test_many_readiness_requests_do_not_keep_events_from_the_disk(self, machine: Machine) -> None:
        with machine.serve(url=NO_REDIS) as web, ThreadPoolExecutor(20) as many:
            asked = [many.submit(web.http.get, "/readyz") for _ in range(200)]
            for _ in range(10):
                assert timed(web, item())[0] == 1
            assert {one.result().text for one in asked} == {"degraded\n"}


@pytest.mark.parametrize("first", ["bad", "good"])
def test_an_event_that_redis_refuses_delays_no_other(machine: Machine, first: str) -> None:
    """Its record has a key of the wrong type; it stays on the disk and is logged."""
    bad, good, lab = item(), item(), Lab(machine.redis)
    machine.redis.set(KEYS.record(key_of(bad)), "not a hash")
    with machine.serve() as web:
        assert web.deliver(*((bad, good) if first == "bad" else (good, bad)))["spooled"] == 2
        assert lab.record(key_of(good))["generation"] == "1"
        assert lab.jobs() == [f"ota-f-{good['companyId']}-{good['payload']['orderId']}-1"]
        eventually(lambda: any(line["event"] == "spool.event_refused" for line in web.lines()), what="it is logged")
        assert web.deliver(item())["queued"] == 1
        wait_until_ready(web, "degraded")
        machine.redis.delete(KEYS.record(key_of(bad)))
        assert web.process.stop() == 0

    with machine.serve():
        machine.wait_until_drained(bad)


class TestFolder:
    @pytest.mark.parametrize("which", ["the folder", "a file in it", "a link", "a file instead"])
    def test_a_folder_that_others_can_use_is_refused(self, spool: Path, which: str) -> None:
        if which == "a file instead":
            spool.write_text("")
        else:
            spool.mkdir(mode=0o755 if which == "the folder" else 0o700)
        if which == "a file in it":
            (spool / NAME).write_bytes(b"")
            (spool / NAME).chmod(0o644)
        if which == "a link":
            (spool / NAME).symlink_to("/dev/null")

        with pytest.raises(SettingsError, match="SPOOL_DIR"):
            Spool(spool, 10**6)

    @pytest.mark.parametrize("mode", [0o700, 0o2700, 0o2770, 0o2775])
    def test_the_root_of_a_volume_is_a_spool(self, spool: Path, mode: int) -> None:
        """It has files of others, and may be shared with a group by the setgid bit. None of them is taken for ours."""
        spool.mkdir()
        (spool / "lost+found").mkdir(mode=0o700)
        (spool / "backup.tar").write_bytes(b"0" * 10**6)
        if os.geteuid() == 0:
            for path in spool.iterdir():
                os.chown(path, 1000, 1000)
        spool.chmod(mode)
        with closing(SpoolFile(spool / NAME)) as file:
            file.put([OrderProcessed(VENUE, order(1).order_id, "Issued", "", "", "current")])
        if mode & 0o070:
            (spool / NAME).chmod(0o660)  # as Kubernetes does at each start of a pod

        async def opened() -> SpoolState:
            one = Spool(spool, 900_000)
            state = await one.state()
            await one.close()
            return state

        state = asyncio.run(opened())
        assert (state.problem, state.waiting) == ("", 1)
        assert (spool / NAME).stat().st_mode & 0o777 == 0o600
        (spool / NAME).unlink()
        for path in spool.glob(f"{NAME}-*"):
            path.unlink()
        assert waiting(spool) == 0

    @pytest.mark.parametrize("mode", [0o2777, 0o2772, 0o1777])
    def test_a_volume_that_everybody_can_write_to_is_refused(self, spool: Path, mode: int) -> None:
        spool.mkdir()
        spool.chmod(mode)

        with pytest.raises(SettingsError, match="open to others"):
            Spool(spool, 10**6)

    def test_a_refused_folder_ends_the_start_with_code_2(self, tmp_path: Path, spool: Path) -> None:
        spool.mkdir(mode=0o755)
        env = {**os.environ, **settings_of_one_company(NO_REDIS), "SPOOL_DIR": str(spool)}
        done = subprocess.run(SERVE, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False)
        assert (done.returncode, "SPOOL_DIR" in done.stdout + done.stderr) == (2, True)
        assert "Traceback" not in done.stderr
