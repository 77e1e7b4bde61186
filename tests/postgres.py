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

from app.dev.processes import Process, free_port
from tests.programs import installed

PASSWORD: Final = "canary-password"
USER: Final = "ota"
_USER_OF_PACKAGE: Final = "postgres"
_START_WITHIN: Final = 30.0
_schemas = count()


class Postgres(Process):
    """A server. It does not run as root, which it refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.programs = installed("postgresql/*/bin/initdb", "postgresql").parent

    def launch(self, *, clock: str = "") -> Self:
        """Start the server on its port and data, and return once it takes connections.

        `clock`: by how much its clock is wrong, such as `-7h`.
        """
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "shared_buffers": "16MB",
            "fsync": "off",  # a killed server loses nothing, only a machine without power does
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        faketime = installed("*/faketime/libfaketime.so.1", "libfaketime") if clock else None
        variables = [f"LD_PRELOAD={faketime}", f"FAKETIME={clock}"] if clock else []
        command = ["env", *variables, str(self.programs / "postgres"), "-D", str(self.folder / "data"), *options]
        # As it becomes another user, the kernel forgets that it is to end with this process.
        self._run([*_as_user("--pdeathsig=KILL"), *command], None, None, self.folder / "log", ())
        self.wait_until(self._answers, _START_WITHIN, "it takes connections")
        return self

    def stop(self, within: float = 10.0) -> int:
        """End all connections and the server; return its exit code."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGINT)
            with suppress(TimeoutError):
                self.wait(within)
        return self.kill()

    def url(self, schema: str = "public", user: str = USER) -> str:
        """Return the address as SQLAlchemy writes it; names without a schema are those of `schema`."""
        return f"postgresql+psycopg://{user}:{PASSWORD}@127.0.0.1:{self.port}/postgres?options=-csearch_path%3D{schema}"

    def new_schema(self) -> str:
        """Return the name of a new empty schema; a database of its own would be copied file by file."""
        name = f"test{next(_schemas)}"
        self.run_sql("public", f"CREATE SCHEMA {name}", f"GRANT USAGE ON SCHEMA {name} TO public")
        return name

    def run_sql(self, schema: str, *statements: str) -> list[Any]:
        """Run the statements, each in a transaction of its own; return the rows of the last one."""
        with psycopg.connect(self.url(schema).replace("+psycopg", ""), autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError):
            psycopg.connect(self.url().replace("+psycopg", ""), connect_timeout=2).close()
            return True
        return False


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Yield a running server without tables; it is killed at the end of the block."""
    # Not below pytest's folder, which belongs to root alone.
    folder = Path(tempfile.mkdtemp(prefix="ota-postgres-"))
    try:
        server = Postgres(folder)
        if os.getuid() == 0:
            shutil.chown(folder, _USER_OF_PACKAGE, _USER_OF_PACKAGE)
        password = folder / "password"
        password.write_text(PASSWORD)
        initdb = [str(server.programs / "initdb"), "-D", str(folder / "data"), "-U", USER, "-E", "UTF8", "--no-locale"]
        command = [*_as_user(), *initdb, "--no-sync", "-A", "scram-sha-256", "--pwfile", str(password)]
        password.chmod(0o644)
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        try:
            yield server.launch()
        finally:
            server.kill()  # a stop would write everything to the disk
    finally:
        shutil.rmtree(folder)


def _as_user(*options: str) -> list[str]:
    user = f"--reuid={_USER_OF_PACKAGE}", f"--regid={_USER_OF_PACKAGE}", "--clear-groups"
    return [] if os.getuid() else ["setpriv", *user, *options, "--"]
