"""The sandbox as a child process, for the demo, tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from app.dev.processes import Process

_DEADLINE = 15.0


@dataclass(frozen=True)
class Sandbox:
    """A sandbox that listens."""

    url: str
    process: Process
    client: httpx.Client

    def base_url(self, tenant: str = "sandbox", environment: str = "Sandbox", company: str = "Sandbox") -> str:
        """Return the address of a company, as `NP_BASE_URL` and the three names make it."""
        return "/".join([self.url, *(quote(part, safe="") for part in (tenant, environment, company))])

    def admin(self, method: str, path: str, body: object = None) -> Any:
        """Return the admin API's answer: `admin("GET", "stats")`; raises httpx.HTTPStatusError on 4xx and 5xx."""
        response = self.client.request(method, f"{self.url}/_sandbox/{path}", json=body)
        response.raise_for_status()
        return response.json()

    def company_id(self, tenant: str = "sandbox", environment: str = "Sandbox", company: str = "Sandbox") -> str:
        """Return the id of a company, declared or not."""
        address = f"tenant={quote(tenant)}&environment={quote(environment)}&company={quote(company)}"
        return str(self.admin("GET", f"companies?{address}")["id"])


@contextlib.contextmanager
def start(*, seed: int = 0, port: int = 0, options: Sequence[str] = ()) -> Iterator[Sandbox]:
    """Start a sandbox and stop it at the end of the block.

    `options` are further command line options, such as `("--settle-after", "0.1")`. Main thread only, see `Process`.
    Raises ProcessEnded or TimeoutError when it does not listen within 15 s.
    """
    argv = [sys.executable, "-m", "app.dev.sandbox", "--port", str(port), "--seed", str(seed), *options]
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        log = Path(directory, "log")
        with Process.start(argv, log=log) as process, httpx.Client(trust_env=False, timeout=30) as client:
            line = process.wait_for_line('{"url"', _DEADLINE)
            yield Sandbox(json.loads(line)["url"], process, client)
            process.kill()  # all its data is in memory
