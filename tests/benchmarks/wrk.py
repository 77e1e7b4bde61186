"""wrk, the load generator: one thread, 32 connections, every event of every request a new one."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CONNECTIONS = 32
MARKER = "#" * 12

_SCRIPT = Path(__file__).with_name("load.lua")


class WrkMissing(Exception):
    """There is no wrk on PATH."""


@dataclass(frozen=True)
class Load:
    """What wrk saw in one run; `refused` are answers from 400 up, `broken` connections that failed or hung."""

    requests: int
    seconds: float
    refused: int
    broken: int
    p50_ms: float
    p99_ms: float

    @property
    def answered_well(self) -> int:
        """Return how many requests were answered below 400."""
        return self.requests - self.refused


def program() -> str:
    """Return where wrk is; raises WrkMissing."""
    path = shutil.which("wrk")
    if path is None:
        raise WrkMissing("there is no wrk on PATH; Debian and Ubuntu: apt-get install wrk, macOS: brew install wrk")
    return path


def order_ids(count: int) -> list[str]:
    """Return order ids for one body; MARKER stands where the request's number belongs."""
    return [f"{index:08x}-0000-4000-8000-{MARKER}" for index in range(count)]


def run(url: str, body_file: Path, *, seconds: int, first: int) -> Load:
    """Post the body for `seconds`, numbering the requests from `first` + 1 on."""
    command = [program(), "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s", "-s", str(_SCRIPT), url]
    done = subprocess.run([*command, "--", str(body_file), str(first)], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    return Load(
        requests=seen["requests"],
        seconds=seen["microseconds"] / 1e6,
        refused=seen["refused"],
        broken=seen["broken"],
        p50_ms=seen["p50_us"] / 1e3,
        p99_ms=seen["p99_us"] / 1e3,
    )
