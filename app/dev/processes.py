"""Programs started for a laptop or a test, held so that none of them outlives who started it.

Each runs in a session of its own, so Ctrl-C reaches only us and we stop them in order. On Linux the kernel
kills it the moment we die, however we die; elsewhere only a stop in good order is covered.
"""

from __future__ import annotations

import contextlib
import os
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
from types import TracebackType
from typing import Self

from app.errors import ReceiverError

_POLL = 0.02
_TAIL = 20
_FIRST_PORT = 20000

# Runs between fork and the program, in the same pid: prctl(2) PR_SET_PDEATHSIG (1) outlives exec. A wrapper
# and no preexec_fn, which can deadlock when the parent has threads. SIGKILL, since a stopped program would
# not act on SIGTERM, and everything here must stand a SIGKILL anyway. The parent may have died before prctl,
# hence the look at getppid. Python ignores SIGPIPE and SIGXFSZ, and a script's `&`, nohup and cron may have made us
# ignore SIGINT: the program shall not inherit that.
_LEASH = """
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
    """A program ended before it did what was waited for; the text holds the end of its log."""


class Process:
    """One running program; leaving its `with` block stops it."""

    def __init__(self, popen: subprocess.Popen[bytes], name: str, log: Path | None, log_starts_at: int) -> None:
        self._popen = popen
        self._name = name
        self._log = log
        self._log_starts_at = log_starts_at
        self._group_is_gone = False

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
        where ours go. `pass_fds` stay open in the program. Raises FileNotFoundError when there is no such
        program, and RuntimeError outside the main thread: the kernel ties the program to the *thread* that
        started it (prctl(2)).
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("start programs from the main thread: each dies with the thread it came from")
        program = shutil.which(argv[0])
        if program is None:
            raise FileNotFoundError(f"no program {argv[0]!r}")
        command = [os.path.abspath(program), *argv[1:]]
        environment = dict(os.environ if env is None else env)
        # A Python program buffers what it writes to a file, and who waits for a line would wait for ever.
        environment.setdefault("PYTHONUNBUFFERED", "1")
        with contextlib.ExitStack() as files:
            output = None if log is None else files.enter_context(log.open("ab"))
            # Read before the start: the program shares this file position and moves it.
            log_starts_at = 0 if output is None else output.tell()
            begun, unbegun = os.pipe()
            files.callback(os.close, begun)
            try:
                popen = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), str(unbegun), *command],
                    env=environment,
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                    pass_fds=(*pass_fds, unbegun),
                    start_new_session=True,
                )
            finally:
                os.close(unbegun)
            # The pipe ends at exec. Before that a signal to the program would hit the leash, half put on.
            os.read(begun, 1)
        return cls(popen, Path(program).name, log, log_starts_at)

    @property
    def pid(self) -> int:
        """Return the process id, which is also that of its process group."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """Return the exit code, minus the signal's number if a signal ended it; None while it runs."""
        return self._popen.poll()

    @property
    def output(self) -> str:
        """Return what it has written since this start; raises ValueError when it has no `log`."""
        if self._log is None:
            raise ValueError(f"{self._name} was started without a log")
        with self._log.open("rb") as log:
            log.seek(self._log_starts_at)
            return log.read().decode(errors="replace")

    def wait_for_line(self, text: str, within: float) -> str:
        """Return the first whole line written since the start that contains `text`; `within` is in seconds.

        Raises ProcessEnded when the program ended without it, TimeoutError when the time is over.
        """
        line = ""

        def written() -> bool:
            nonlocal line
            whole = (one for one in self.output.splitlines(keepends=True) if one.endswith("\n"))
            line = next((one for one in whole if text in one), "")
            return bool(line)

        self.wait_until(written, within, f"a line with {text!r}")
        return line.rstrip("\n")

    def wait_until(self, condition: Callable[[], bool], within: float, what: str) -> None:
        """Return once `condition()` holds; `within` is in seconds, `what` names it in the error.

        Raises ProcessEnded when the program ended before, TimeoutError when the time is over.
        """
        deadline = time.monotonic() + within
        while True:
            # Read before the condition: a program that does what it should and then ends has done it.
            ended = self.exit_code
            if condition():
                return
            if ended is not None:
                raise ProcessEnded(f"{self._name} ended with {ended} before {what}{self._tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._name}: not within {within:g} s: {what}{self._tail()}")
            time.sleep(_POLL)

    def wait(self, within: float) -> int:
        """Return the exit code once it ends by itself; raises TimeoutError after `within` seconds."""
        try:
            return self._popen.wait(within)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self._name}: did not end within {within:g} s{self._tail()}") from None

    def stop(self, within: float = 10.0) -> int:
        """Ask it to end (SIGTERM), kill it after `within` seconds; return the exit code.

        Only the program itself is asked, since it knows in which order its children end; what is left of its
        group afterwards is killed.
        """
        if self.exit_code is None:
            self._popen.send_signal(signal.SIGTERM)
            self.resume()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(within)
        return self.kill()

    def kill(self) -> int:
        """Kill the program and its whole group (SIGKILL); return the exit code.

        To see what becomes of the children of a killed program, kill its `pid` alone.
        """
        self._signal_group(signal.SIGKILL)
        # From here on the number may belong to a stranger.
        self._group_is_gone = True
        return self._popen.wait()

    def pause(self) -> None:
        """Freeze the program and its group (SIGSTOP): sockets stay open, nothing answers."""
        self._signal_group(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen program and its group go on (SIGCONT)."""
        self._signal_group(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Process({self._name}, pid={self.pid}, exit_code={self.exit_code})"

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
    """Return a TCP port of the loopback address that was free a moment ago; another may take it since.

    Below 32768, where Linux begins to hand out ports for outgoing connections (ip_local_port_range): from
    there a client that knocks at a server that is down would now and then be given that very port, connect to
    itself, and keep the server from coming back.
    """
    while True:
        port = _FIRST_PORT + secrets.randbelow(32768 - _FIRST_PORT)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
