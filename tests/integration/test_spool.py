"""With SPOOL_DIR every event is accepted whatever Redis does, and reaches Redis once it is available again."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
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
from tests.integration.webserver import SECRET, SERVE, Kept, Web, item, serving, settings_of_one_company
from tests.integration.wire import post

LONGEST = 2.5
"""Seconds within which a POST is answered whatever Redis does."""

OPS_TOKEN = "canary-ops-token"

# A full disk: no file may grow beyond 150 kB.
SMALL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
from app.cli.main import main
main()
"""

# Ends with SIGKILL before or after the first call of a step of its spool.
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


class Machine:
    """A Valkey of its own, the SPOOL_DIR of one machine, and the web processes that share both."""

    def __init__(self, valkey: Valkey, redis: Redis, folder: Path) -> None:
        self.valkey = valkey
        self.redis = redis
        self.stored = Kept(redis)
        self.spool = folder / "spool"
        self.folder = folder

    def settings(self, **changes: str) -> dict[str, str]:
        whole = settings_of_one_company(self.valkey.url)
        return whole | {"SPOOL_DIR": str(self.spool), "OPS_TOKEN": OPS_TOKEN} | changes

    def serving(self, program: Sequence[str] = SERVE, **changes: str) -> AbstractContextManager[Web]:
        return serving(self.folder, self.settings(**changes), program)

    def is_due(self, *items: dict[str, Any]) -> bool:
        """Return whether a fetch of each order is pending in Redis."""
        due = self.stored.due()
        return all(key(one) in due for one in items)

    def wait_until_due(self, *items: dict[str, Any], within: float = 20) -> None:
        """Wait until each event is drained, and check that it was counted once."""
        eventually(lambda: self.is_due(*items), within, what="the spool is drained")
        assert {self.stored.record(key(one))["generation"] for one in items} == {"1"}

    def wait_until_empty(self) -> None:
        eventually(lambda: waiting(self.spool) == 0, what="the spool is empty")


@pytest.fixture
def machine(own_valkey: Valkey, tmp_path: Path) -> Iterator[Machine]:
    with Redis.from_url(own_valkey.url, socket_timeout=5) as client:
        yield Machine(own_valkey, client, tmp_path)


def key(one: dict[str, Any]) -> OrderKey:
    return OrderKey(one["companyId"], one["payload"]["orderId"])


def spooled(web: Web, *items: object, within: float = LONGEST) -> None:
    """POST the items; check that they are spooled in time."""
    started = time.monotonic()
    assert web.deliver(*items)["spooled"] == len(items)
    assert time.monotonic() - started < within


def wait_until_ready(web: Web, state: str) -> None:
    eventually(lambda: web.http.get("/readyz").text == f"{state}\n", what=f"/readyz answers {state}")


def fill(web: Web, batch_size: int) -> list[dict[str, Any]]:
    """POST batches until one is refused; return the items that were accepted."""
    accepted: list[dict[str, Any]] = []
    while True:
        batch = [item() for _ in range(batch_size)]
        answer = web.post({"values": batch})
        if answer.status_code != 200:
            break
        accepted += batch
    assert (answer.status_code, answer.json()["reason"]) == (503, "spool_failed")
    assert int(answer.headers["retry-after"]) > 0
    return accepted


def frozen(machine: Machine) -> Callable[[], object]:
    machine.valkey.pause()
    return machine.valkey.resume


def killed(machine: Machine) -> Callable[[], object]:
    machine.valkey.kill()
    return machine.valkey.restart


def read_only(machine: Machine) -> Callable[[], object]:
    machine.redis.replicaof("127.0.0.1", "1")
    return lambda: machine.redis.replicaof("NO", "ONE")


def full(machine: Machine) -> Callable[[], object]:
    machine.redis.config_set("maxmemory", "1mb")
    return lambda: machine.redis.config_set("maxmemory", 0)


def slow(machine: Machine) -> Callable[[], object]:
    machine.redis.client_pause(60_000, all=False)
    return machine.redis.client_unpause


class TestOutages:
    """A POST is answered 200 within LONGEST, and Redis receives its events once."""

    @pytest.mark.parametrize("outage", [frozen, killed, read_only, full, slow])
    def test_events_are_spooled_during_an_outage_and_drained_after_it(
        self, machine: Machine, outage: Callable[[Machine], Callable[[], object]]
    ) -> None:
        with machine.serving() as web:
            before, first, second, after = item(), item(), item(), item()
            assert web.deliver(before)["queued"] == 1
            wait_until_ready(web, "ready")

            recover = outage(machine)
            spooled(web, first)
            # From here on no request waits for Redis.
            spooled(web, second, second, within=0.4)
            wait_until_ready(web, "degraded")
            assert web.http.get("/readyz").status_code == 200

            recover()
            machine.wait_until_due(first, second)
            wait_until_ready(web, "ready")
            assert web.deliver(after)["queued"] == 1
            machine.wait_until_due(before, first, second, after)

    def test_a_failover_is_found_although_the_former_primary_still_answers(
        self, machine: Machine, tmp_path: Path
    ) -> None:
        """The address moves, and connections to the former primary live on, which answers READONLY."""
        with (
            start(tmp_path / "other") as other,
            relay(machine.valkey.port) as network,
            Redis.from_url(other.url) as new,
        ):
            password = machine.redis.config_get("requirepass")["requirepass"]
            new.config_set("requirepass", password)
            with machine.serving(REDIS_URL=network.url(machine.valkey.url)) as web:
                assert web.deliver(item())["queued"] == 1
                network.target = other.port
                machine.redis.replicaof("127.0.0.1", str(other.port))
                one = item()
                spooled(web, one)
                with Redis(port=other.port, password=password) as primary:
                    eventually(lambda: key(one) in Kept(primary).due(), 10, what="the new primary has the event")
                assert eventually(lambda: web.deliver(item())["queued"] == 1, what="events go to Redis again")

    def test_a_slow_redis_delays_no_answer_beyond_2500_ms(self, machine: Machine) -> None:
        with (
            relay(machine.valkey.port) as network,
            machine.serving(REDIS_URL=network.url(machine.valkey.url)) as web,
        ):
            network.delay = 0.45
            items = [item() for _ in range(6)]
            for one in items:
                started = time.monotonic()
                web.deliver(one)
                assert time.monotonic() - started < LONGEST
            network.delay = 0.0
            machine.wait_until_due(*items, within=30)

    def test_a_call_that_timed_out_and_ran_later_makes_no_second_event(self, machine: Machine) -> None:
        """The frozen server has the command in its socket and runs it when it resumes."""
        with machine.serving() as web:
            web.deliver(item())
            machine.valkey.pause()
            one = item()
            spooled(web, one)
            machine.valkey.resume()

            drained = "the event is drained as a duplicate"
            eventually(lambda: machine.stored.record(key(one)).get("duplicates") == "1", 10, what=drained)
            assert machine.stored.record(key(one))["generation"] == "1"
            assert len(machine.stored.events()) == 2

    def test_requests_of_one_moment_are_all_answered_although_one_sender_disconnects(self, machine: Machine) -> None:
        with machine.serving() as web:
            web.deliver(item())
            machine.valkey.pause()
            items, impatient = [item() for _ in range(40)], item()
            with ThreadPoolExecutor(40) as senders:
                posts = [senders.submit(spooled, web, one) for one in items]
                with web.connect() as gone:
                    gone.sendall(post(json.dumps({"values": [impatient]}).encode()))
                for one in posts:
                    one.result()
            machine.valkey.resume()
            machine.wait_until_due(impatient, *items)

    @pytest.mark.parametrize("refused_first", [True, False])
    def test_an_event_that_redis_refuses_delays_no_other(self, machine: Machine, refused_first: bool) -> None:
        """A key of the wrong type is where its record should be; the event stays on the disk and is logged."""
        bad, good = item(), item()
        machine.redis.set(record(key(bad)), "not a hash")
        with machine.serving() as web:
            spooled(web, *((bad, good) if refused_first else (good, bad)))
            assert machine.is_due(good)
            assert machine.stored.jobs() == [f"f-{good['companyId']}-{good['payload']['orderId']}-1"]
            eventually(lambda: any(line["event"] == "spool.event_refused" for line in web.lines()), what="a log line")
            assert web.deliver(item())["queued"] == 1
            wait_until_ready(web, "degraded")
            machine.redis.delete(record(key(bad)))
            assert web.process.stop() == 0

        with machine.serving():
            eventually(lambda: machine.is_due(bad), 10, what="the next process drains it")


class TestProcesses:
    """Any process of the machine drains what another has left."""

    def test_the_next_process_drains_events_of_a_killed_and_of_a_stopped_one(self, machine: Machine) -> None:
        """None of them needs Redis to start."""
        machine.valkey.stop()
        of_killed, of_stopped = [item() for _ in range(3)], item()
        with machine.serving() as web:
            spooled(web, *of_killed)
            os.kill(web.process.pid, signal.SIGKILL)
            web.process.wait(5)
        with machine.serving() as web:
            spooled(web, of_stopped)
            assert web.process.stop() == 0
        assert waiting(machine.spool) == 4
        machine.valkey.restart()

        with machine.serving():
            machine.wait_until_due(*of_killed, of_stopped)
            machine.wait_until_empty()

    def test_processes_share_one_file_and_any_of_them_drains_it(self, machine: Machine, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        with machine.serving() as living, serving(tmp_path / "b", machine.settings()) as dying:
            machine.valkey.pause()
            items = [item() for _ in range(40)]
            with ThreadPoolExecutor(20) as senders:
                list(senders.map(spooled, [living, dying] * 20, items))
            dying.process.kill()
            machine.valkey.resume()

            machine.wait_until_due(*items)
            machine.wait_until_empty()

    @pytest.mark.parametrize("step", ["before:put", "after:put", "before:drop", "after:drop"])
    def test_a_process_killed_at_a_step_of_its_spool_loses_no_acknowledged_event(
        self, machine: Machine, step: str
    ) -> None:
        """Events that it drained without deleting them are drained again, as duplicates."""
        machine.valkey.stop()
        one = item()
        acknowledged = False
        with machine.serving([sys.executable, "-c", DYING, step, "serve"]) as web:
            try:
                acknowledged = web.deliver(one)["spooled"] == 1
            except httpx.TransportError:
                assert step.endswith("put")
            machine.valkey.restart()
            assert web.process.wait(15) == -signal.SIGKILL
        with machine.serving() as web:
            if step == "before:put":
                assert web.deliver(one)["queued"] == 1
            machine.wait_until_due(one)
            machine.wait_until_empty()
            assert len(machine.stored.events()) == 1
        assert acknowledged == step.endswith("drop")

    def test_processes_that_open_a_new_file_at_once_do_not_stop_each_other(self, tmp_path: Path) -> None:
        """A rolling restart: the last one to close removes `-wal` while another reads the folder.

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
        command = [sys.executable, "-c", program, str(tmp_path / "spool")]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
        for one in running:
            _, errors = one.communicate(timeout=30)
            assert (one.returncode, errors) == (0, b"")


class TestDisk:
    """When the disk fails too, the sender gets 503; what was answered 200 is never lost."""

    def test_a_full_spool_is_503_and_its_events_are_drained_later(self, machine: Machine) -> None:
        machine.valkey.stop()
        with machine.serving(SPOOL_MAX_MB="1") as web:
            accepted = fill(web, 100)
            assert len(accepted) >= 500
            assert web.http.get("/readyz").status_code == 503
            assert sum(path.stat().st_size for path in machine.spool.iterdir()) < 1_200_000

            machine.valkey.restart()
            machine.wait_until_due(*accepted)
            wait_until_ready(web, "ready")

    def test_a_full_disk_is_503_and_its_events_are_drained_later(self, machine: Machine) -> None:
        machine.valkey.stop()
        with machine.serving([sys.executable, "-c", SMALL_DISK, "serve"]) as web:
            accepted = fill(web, 20)
            machine.valkey.restart()
            machine.wait_until_due(*accepted)

    def test_a_broken_file_is_reported_and_the_spool_works_once_it_is_moved_away(self, machine: Machine) -> None:
        machine.spool.mkdir(mode=0o700)
        path = machine.spool / NAME
        path.write_bytes(b"this is no database, and longer than the header of one" * 20)
        path.chmod(0o600)
        with machine.serving() as web:

            def failures() -> int:
                return [line["event"] for line in web.lines()].count("spool.failed")

            eventually(failures, what="the failure is logged")
            bearer = {"authorization": f"Bearer {OPS_TOKEN}"}
            assert "spool.sqlite is broken" in web.http.get("/readyz", headers=bearer).text
            assert "ota_spool_waiting_events 0" not in web.http.get("/metrics", headers=bearer).text
            assert waiting(machine.spool) is None
            machine.valkey.stop()
            one = item()
            assert web.post({"values": [one]}).json()["reason"] == "spool_failed"
            path.rename(machine.spool / "broken")
            spooled(web, one)
            assert failures() == 1
            machine.valkey.restart()
            machine.wait_until_due(one)

    def test_a_deleted_file_is_made_anew_with_its_events(self, machine: Machine) -> None:
        """Else events would go into a file that ends with the process."""
        machine.valkey.stop()
        with machine.serving() as web:
            before, after = item(), item()
            spooled(web, before)
            for path in machine.spool.iterdir():
                path.unlink()
            spooled(web, after)
            assert any(line["event"] == "spool.file_gone" and line["events"] == 1 for line in web.lines())
            web.process.kill()
        machine.valkey.restart()
        with machine.serving():
            machine.wait_until_due(before, after)

    def test_a_spooled_event_is_in_a_private_file_without_its_client_state(self, machine: Machine) -> None:
        machine.valkey.stop()
        with machine.serving() as web:
            one = item()
            spooled(web, one)
            assert SECRET.encode() not in b"".join(path.read_bytes() for path in machine.spool.iterdir())
            assert machine.spool.stat().st_mode & 0o777 == 0o700
            assert {path.stat().st_mode & 0o777 for path in machine.spool.iterdir()} == {0o600}
            with sqlite3.connect(machine.spool / NAME) as seen:
                assert seen.execute("PRAGMA journal_mode").fetchone() == ("wal",)
                assert seen.execute("SELECT order_id FROM events").fetchall() == [(one["payload"]["orderId"],)]
            seen.close()

    def test_many_readiness_checks_delay_no_event(self, machine: Machine) -> None:
        machine.valkey.stop()
        with machine.serving() as web, ThreadPoolExecutor(20) as many:
            asked = [many.submit(web.http.get, "/readyz") for _ in range(200)]
            for _ in range(10):
                spooled(web, item())
            assert {one.result().text for one in asked} == {"degraded\n"}

    @pytest.mark.parametrize("which", ["open folder", "open file", "link", "file instead of a folder"])
    def test_a_folder_that_others_can_use_is_refused_at_the_start(self, tmp_path: Path, which: str) -> None:
        spool = tmp_path / "spool"
        if which == "file instead of a folder":
            spool.write_text("")
        else:
            spool.mkdir(mode=0o755 if which == "open folder" else 0o700)
        if which == "open file":
            (spool / NAME).write_bytes(b"")
            (spool / NAME).chmod(0o644)
        if which == "link":
            (spool / NAME).symlink_to("/dev/null")
        settings = settings_of_one_company("redis://127.0.0.1:1") | {"SPOOL_DIR": str(spool)}
        done = subprocess.run(
            SERVE,
            env={**os.environ, **settings},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 2
        assert "SPOOL_DIR" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
