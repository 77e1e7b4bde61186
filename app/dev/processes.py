"""Programs started for a laptop or a test; none of them outlives the process that started it.

Each runs in a session of its own, so Ctrl-C reaches only this process, which stops them in order. On Linux the kernel
kills a program the moment this process dies; elsewhere only a clean stop ends it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar

from app.errors import ReceiverError

T = TypeVar("T")

_POLL = 0.02
_TAIL = 20
_FIRST_PORT = 20000

# Runs between fork and the program, in the same pid, since PR_SET_PDEATHSIG of prctl(2) survives exec. It is not a
# preexec_fn, which can deadlock when the parent has threads. SIGKILL, since a stopped program does not act on SIGTERM.
# The parent may have died before prctl, so getppid is checked. Python ignores SIGPIPE and SIGXFSZ, and `&` in a script,
# nohup and cron make SIGINT ignored: the program must not inherit that.
_WRAPPER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.set_inheritable(int(sys.argv[2]), False)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[3], sys.argv[3:])
"""


class ProcessEnded(ReceiverError):
    """A program ended before a condition held; the text has the end of its log."""


class PortTaken(ReceiverError):
    """Another process listens on a port."""


class Process:
    """One running program; leaving its `with` block stops it."""

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Self:
        """Start `argv` and return once it runs.

        `env` is the whole environment (None: ours). stdout and stderr are appended to the file `log`, or go
        where ours go. `pass_fds` stay open in the program. Raises FileNotFoundError for an unknown program, and
        RuntimeError outside the main thread: the kernel kills the program when the *thread* that started it ends.
        """
        process = cls()
        process._run(argv, env, cwd, log, pass_fds)
        return process

    @property
    def pid(self) -> int:
        """Return the process id, which is also the id of its process group."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """Return the exit code, minus the signal's number if a signal ended it; None while it runs."""
        return self._popen.poll()

    @property
    def output(self) -> str:
        """Return its output since this start; raises ValueError without a `log`."""
        if self._log is None:
            raise ValueError(f"{self._name} was started without a log")
        with self._log.open("rb") as log:
            log.seek(self._log_starts_at)
            return log.read().decode(errors="replace")

    def wait_for_line(self, text: str, within: float) -> str:
        """Return the first whole line since the start that contains `text`; raises as `wait_until` does."""
        line = re.compile(rf"^.*{re.escape(text)}.*(?=\n)", re.MULTILINE)
        return self.wait_until(lambda: line.search(self.output), within, f"a line with {text!r}")[0]

    def wait_until(self, condition: Callable[[], T | None], within: float, what: str) -> T:
        """Return the first true value of `condition()`; `what` names it in the errors.

        Raises ProcessEnded when the program ends before, TimeoutError after `within` seconds.
        """
        deadline = time.monotonic() + within
        while True:
            # Read before the condition, which a program may meet just before it ends.
            ended = self.exit_code
            if found := condition():
                return found
            if ended is not None:
                raise ProcessEnded(f"{self._name} ended with {ended} before {what}{self._tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._name}: not within {within:g} s: {what}{self._tail()}")
            time.sleep(_POLL)

    def wait(self, within: float) -> int:
        """Return the exit code when it ends by itself; raises TimeoutError after `within` seconds."""
        try:
            return self._popen.wait(within)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self._name}: did not end within {within:g} s{self._tail()}") from None

    def stop(self, within: float = 10.0) -> int:
        """Send SIGTERM, SIGKILL after `within` seconds; return the exit code.

        SIGTERM goes to the program only, which stops its children in its own order. The rest of its group is killed
        afterwards.
        """
        if self.exit_code is None:
            self._popen.send_signal(signal.SIGTERM)
            self.resume()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(within)
        return self.kill()

    def kill(self) -> int:
        """Kill the program and its whole group (SIGKILL); return the exit code.

        To leave its children alive, kill its `pid` alone.
        """
        self._signal_group(signal.SIGKILL)
        # From here on another process group may get this number.
        self._group_is_gone = True
        return self._popen.wait()

    def pause(self) -> None:
        """Freeze the program and its group (SIGSTOP): sockets stay open, nothing answers."""
        self._signal_group(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue a frozen program and its group (SIGCONT)."""
        self._signal_group(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None,
        cwd: Path | None,
        log: Path | None,
        pass_fds: Sequence[int],
    ) -> None:
        """Start `argv` as this process, for the first time or after it has ended; see `start`."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("start programs from the main thread: each dies with the thread that started it")
        program = shutil.which(argv[0])
        if program is None:
            raise FileNotFoundError(f"no program {argv[0]!r}")
        command = [os.path.abspath(program), *argv[1:]]
        environment = dict(os.environ if env is None else env)
        # Python buffers output to a file, and `wait_for_line` would wait for ever.
        environment.setdefault("PYTHONUNBUFFERED", "1")
        with contextlib.ExitStack() as files:
            output = None if log is None else files.enter_context(log.open("ab"))
            # Read before the start, since the program shares this file position and moves it.
            self._log_starts_at = 0 if output is None else output.tell()
            reader, writer = os.pipe()
            files.callback(os.close, reader)
            try:
                self._popen = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _WRAPPER, str(os.getpid()), str(writer), *command],
                    env=environment,
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                    pass_fds=(*pass_fds, writer),
                    start_new_session=True,
                )
            finally:
                os.close(writer)
            # The pipe ends at exec. A signal before that would reach the wrapper.
            os.read(reader, 1)
        self._name = Path(program).name
        self._log = log
        self._group_is_gone = False

    def _signal_group(self, number: signal.Signals) -> None:
        if not self._group_is_gone:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _tail(self) -> str:
        if self._log is None:
            return ""
        lines = self.output.splitlines()[-_TAIL:]
        return "\n" + "\n".join(lines) if lines else " (it wrote nothing)"


def free_port() -> int:
    """Return a TCP port of the loopback address that was free a moment ago; another process may take it.

    It is below 32768, where Linux starts to use ports for outgoing connections (ip_local_port_range). A client of a
    server that is down would sometimes get the server's own port, connect to itself, and keep the server from starting.
    """
    while True:
        port = _FIRST_PORT + secrets.randbelow(32768 - _FIRST_PORT)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def check_free(port: int, remedy: str) -> None:
    """Raise PortTaken, with the remedy, if another process listens on a TCP port of the loopback address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise PortTaken(f"port {port} is taken: {remedy}") from None
