"""Started programs end with the process that started them."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.dev.processes import Process, ProcessEnded
from tests.eventually import eventually
from tests.pids import is_running

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

        assert program.stop() == 7
        assert program.stop() == 7


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


def test_a_program_gets_only_the_given_environment(tmp_path: Path) -> None:
    code = "import os; print(os.environ.get('HOME'), os.environ['COLOUR'])"
    with Process.start(python(code), env={"COLOUR": "green"}, log=tmp_path / "log") as program:
        assert program.wait(10) == 0
        assert program.output == "None green\n"


def test_a_missing_program_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        Process.start(["no-such-program"])


def test_a_start_outside_the_main_thread_is_refused() -> None:
    """The kernel would kill the program when that thread ends."""
    with ThreadPoolExecutor(1) as threads, pytest.raises(RuntimeError, match="main thread"):
        threads.submit(Process.start, ["sleep", "600"]).result()
