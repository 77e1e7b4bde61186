"""The receivers of a comparison as running processes, each with a Valkey of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from app.dev.processes import Process, free_port
from app.dev.valkey import Valkey
from app.dev.valkey import start as start_valkey
from app.ledger.redis import Redis
from tests.service import HOOK, OPS_TOKEN, ROOT, SERVE, accepts, settings_of_one_company

_FOLDER: Final = "tests.benchmarks.receivers"
_UVICORN: Final = (
    "-m",
    "uvicorn",
    "--loop",
    "uvloop",
    "--http",
    "httptools",
    "--no-access-log",
    "--log-level",
    "warning",
)


@dataclass(frozen=True)
class Receiver:
    """What to run, and how its queue is counted.

    `module` is a file of the folder receivers, or empty for this service. `depth` is the command that returns the
    length of the queue; `limit` has none. `is_alone`: it has an environment of its own, which uv makes.
    """

    module: str = ""
    depth: tuple[str, ...] = ()
    fsync: str = "everysec"
    is_alone: bool = False


_OURS: Final = ("LLEN", "rq:queue:ota-live")
LIMIT: Final = "limit"
OBVIOUS: Final = "starlette-rq"
OURS: Final = "ota-receiver"
ALWAYS: Final = "ota-receiver-always"
RECEIVERS: Final = {
    LIMIT: Receiver("limit"),
    OURS: Receiver(depth=_OURS),
    ALWAYS: Receiver(depth=_OURS, fsync="always"),
    OBVIOUS: Receiver("obvious", ("LLEN", "rq:queue:orders")),
    "fastapi-arq": Receiver("fastapi_arq", ("ZCARD", "arq:queue"), is_alone=True),
    "fastapi-celery": Receiver("fastapi_celery", ("LLEN", "celery"), is_alone=True),
}


@dataclass(frozen=True)
class Running:
    """A receiver that listens, and its Valkey."""

    receiver: Receiver
    web: Process
    valkey: Valkey
    redis: Redis
    port: int

    @property
    def url(self) -> str:
        """Return the address of its webhook."""
        return f"http://127.0.0.1:{self.port}{HOOK}"

    def queued(self) -> int:
        """Return how many jobs its queue holds."""
        redis: Any = self.redis
        return int(redis.execute_command(*self.receiver.depth)) if self.receiver.depth else 0


def python_of(receiver: Receiver) -> str:
    """Return the Python that runs a receiver; uv makes its environment if needed.

    Raises FileNotFoundError without uv, and CalledProcessError when uv cannot install the dependencies.
    """
    if not receiver.is_alone:
        return sys.executable
    if not (uv := shutil.which("uv")):
        raise FileNotFoundError("there is no uv on PATH, which installs what arq and Celery need: pip install uv")
    script = str(Path(__file__).parent / "receivers" / f"{receiver.module}.py")
    subprocess.run([uv, "sync", "--quiet", "--script", script, "--python", sys.executable], check=True)
    found = subprocess.run([uv, "python", "find", "--script", script], check=True, capture_output=True, text=True)
    return found.stdout.strip()


@contextmanager
def running(receiver: Receiver, folder: Path, python: str = sys.executable) -> Iterator[Running]:
    """Run a receiver in an empty folder until the block ends. Main thread only.

    Its Valkey rewrites no append-only file meanwhile: a rewrite would fall into one burst and not into the next.
    Raises ProcessEnded or TimeoutError when it does not start.
    """
    with start_valkey(folder / "valkey") as valkey, Redis.from_url(valkey.url) as redis:
        redis.config_set("appendfsync", receiver.fsync)
        redis.config_set("auto-aof-rewrite-percentage", 0)
        port = free_port()
        env = {
            **settings_of_one_company(valkey.url),
            "PATH": str(Path(python).parent),
            "PYTHONPATH": str(ROOT),
            "PORT": str(port),
            "OPS_TOKEN": OPS_TOKEN,
            "LOG_FORMAT": "json",
        }
        other = (python, *_UVICORN, "--port", str(port), f"{_FOLDER}.{receiver.module}:app")
        with Process.start(other if receiver.module else SERVE, env=env, cwd=folder, log=folder / "web.log") as web:
            web.wait_until(lambda: accepts(port), 20, "the port is open")
            yield Running(receiver, web, valkey, redis, port)
            web.kill()
            valkey.kill()
