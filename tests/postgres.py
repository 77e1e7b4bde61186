"""A PostgreSQL server of the tests, from the programs of Debian's package: its own folder, port and password."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final, Self

import psycopg
import pytest

from app.dev.processes import Process, free_port

PASSWORD: Final = "canary-password"
USER: Final = "ota"
_START_WITHIN: Final = 30.0
_databases = count()


def programs() -> Path:
    """Return the folder of `initdb` and `postgres`; skips the test where there is none, and fails it in CI."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    missing = "PostgreSQL is not installed: apt-get install postgresql"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


class Postgres(Process):
    """A server; leaving its `with` block kills it. It does not run as root, which it refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.programs = programs()

    def launch(self, **env: str) -> Self:
        """Start the server on its port and data, and return once it takes connections."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "shared_buffers": "16MB",
            "fsync": "off",  # a killed server loses nothing, only a machine without power does
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(self.programs / "postgres"), "-D", str(self.folder / "data"), *options]
        # Else the kernel forgets that it is to end with this process, as it becomes another user.
        self._run([*_as_user("--pdeathsig=KILL"), *command], os.environ | env, None, self.folder / "log", ())
        self.wait_until(self._answers, _START_WITHIN, "it takes connections")
        return self

    def stop(self, within: float = 10.0) -> int:
        """End all connections and the server; return its exit code."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGINT)
            with suppress(TimeoutError):
                self.wait(within)
        return self.kill()

    def url(self, database: str = "postgres", user: str = USER, driver: str = "postgresql+psycopg") -> str:
        return f"{driver}://{user}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Return the name of a new empty database."""
        name = f"test{next(_databases)}"
        self.run_sql("postgres", f"CREATE DATABASE {name}")
        return name

    def run_sql(self, database: str, *statements: str) -> list[Any]:
        """Run the statements, each in a transaction of its own; return the rows of the last one."""
        with psycopg.connect(self.url(database, driver="postgresql"), autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError):
            psycopg.connect(self.url(driver="postgresql"), connect_timeout=2).close()
            return True
        return False


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Yield a running server with no database of ours."""
    # Not below pytest's folder, which belongs to root alone.
    folder = Path(tempfile.mkdtemp(prefix="ota-postgres-"))
    try:
        server = Postgres(folder)
        if os.getuid() == 0:
            shutil.chown(folder, *_user())
        password = folder / "password"
        password.write_text(PASSWORD)
        initdb = [str(server.programs / "initdb"), "-D", str(folder / "data"), "-U", USER, "-E", "UTF8", "--no-locale"]
        command = [*_as_user(), *initdb, "--no-sync", "-A", "scram-sha-256", "--pwfile", str(password)]
        password.chmod(0o644)
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        with server.launch():
            yield server
    finally:
        shutil.rmtree(folder)


def _user() -> tuple[str, str]:
    return "nobody", "nogroup"


def _as_user(*options: str) -> list[str]:
    if os.getuid():
        return []
    user, group = _user()
    return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *options, "--"]
