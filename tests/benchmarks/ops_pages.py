"""The time and the size of every page of the ops page, with a million events and 200,000 dead letters.

    uv run python -m tests.benchmarks.ops_pages [--events 1000000]

A Valkey is filled as for `million`, with one dead letter for every five events. Then each page is asked for over a
socket, one request at a time. Its server time is that of its line in the log; its size is what the socket carries, head
and body. On a busy machine the CPU time of the process is the figure to read. Exits 1 when a tenth of the requests for
a page takes over 100 ms, or one answer has over 60 KB, or is no page.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import httpx
from rich.console import Console
from rich.table import Table

from app.ledger.redis import Redis
from tests.benchmarks.million import Plan, contents_of, fill
from tests.eventually import eventually
from tests.service import Service, as_another, service

MOST_MS: Final = 100
MOST_KB: Final = 60
_TIMES: Final = 20
_FAR: Final = 10
"""A page so many pages behind the first is asked for, too."""

_READ, _ACT = "benchmark-ops-token", "benchmark-ops-act-token"
_KINDS: Final = {**dict.fromkeys(range(0, 200, 5), "dead"), 7: "pending", 57: "deferred"}


@dataclass(frozen=True)
class Measured:
    """A page: its server times in ms, the CPU time of the process for each request, and its size in bytes."""

    page: str
    ms: list[float]
    cpu_ms: float
    size: int
    succeeded: bool

    @property
    def slow_ms(self) -> float:
        """Return the time that nine of ten requests keep."""
        return quantiles(self.ms, n=10)[-1] if len(self.ms) > 1 else self.ms[0]

    @property
    def is_good(self) -> bool:
        return self.succeeded and self.slow_ms <= MOST_MS and self.size <= MOST_KB * 1000


class Reader:
    """Asks the ops process of a service for pages."""

    def __init__(self, one: Service, http: httpx.Client, pid: int) -> None:
        self._one = one
        self._http = http
        self._stat = Path(f"/proc/{pid}/stat")

    def measure(self, page: str, path: str) -> Measured:
        """Ask for a page _TIMES times; a search leads to the order, or finds none."""
        used = self._cpu_ms()
        answers = [self._http.get(path) for _ in range(_TIMES)]
        return self._measured(
            page, answers, self._cpu_ms() - used, *((303, 404) if path.startswith("/search") else (200,))
        )

    def post(self, page: str, path: str, form: Mapping[str, str]) -> tuple[Measured, str]:
        """Send a form once; return the address that it leads to."""
        origin = {"origin": str(self._http.base_url).rstrip("/"), "sec-fetch-site": "same-origin"}
        used = self._cpu_ms()
        answer = self._http.post(path, data=form, headers=origin)
        return self._measured(page, [answer], self._cpu_ms() - used, 303), answer.headers.get("location", "")

    def text(self, path: str) -> str:
        return self._http.get(path).text

    def far(self, path: str) -> str:
        """Return the address of a page far behind the first one, or of the last one."""
        for _ in range(_FAR):
            following = re.search(r'<a href="([^"]+)" rel="next">', self.text(path))
            if following is None:
                break
            path = unescape(following[1])
        return path

    def _cpu_ms(self) -> float:
        """Return the CPU time that the ops process has used."""
        ticks = self._stat.read_text().rpartition(") ")[2].split()[11:13]
        return sum(map(int, ticks)) * 1000 / os.sysconf("SC_CLK_TCK")

    def _measured(self, page: str, answers: list[httpx.Response], used_ms: float, *statuses: int) -> Measured:
        ids = {answer.headers["x-request-id"] for answer in answers}

        def lines() -> list[dict[str, Any]] | None:
            found = [line for line in self._one.log("ops", "ops.request") if line["request_id"] in ids]
            return found if len(found) == len(answers) else None

        found = eventually(lines, 10, what="the lines of the requests are in the log")
        assert found is not None
        sizes = [len(name) + len(value) + 4 for answer in answers[:1] for name, value in answer.headers.raw]
        size = sum(sizes) + max(answer.num_bytes_downloaded for answer in answers)
        succeeded = {answer.status_code for answer in answers} <= {*statuses}
        return Measured(page, [line["duration_ms"] for line in found], used_ms / len(answers), size, succeeded)


def _pages(reader: Reader, plan: Plan) -> Iterator[Measured]:
    middle = plan.one(plan.count // 2 // 200 * 200 + 1)
    dead = plan.one(plan.count // 2 // 200 * 200 + 5)
    slug = unescape(re.findall(r'href="/events\?company=([^"]+)"', reader.text("/"))[0])
    paths = {
        "first screen": "/",
        "order": f"/orders/{middle.order.order_id}",
        "order, dead": f"/orders/{dead.order.order_id}",
        "search, a reference": f"/search?q={middle.own_reference}",
        "search, unknown": "/search?q=CM-NOWHERE",
        "events": "/events",
        "events, far behind": reader.far("/events"),
        "events, a status that none has": "/events?status=Cancelled",
        "events, a poll": f"/events?seen={plan.now}",
        "orders": "/orders",
        "orders, far behind": reader.far("/orders"),
        "orders, outstanding": "/orders?state=outstanding",
        "orders, deferred": "/orders?state=deferred",
        "orders, dead": "/orders?state=dead",
        "orders, a status that none has": "/orders?status=Cancelled",
        "dead letters": "/dead",
        "dead letters, far behind": reader.far("/dead"),
        "dead letters of a company": f"/dead?company={slug}",
        "dead letters of a reason": "/dead?reason=order_missing&sink=-",
        "requeue: the cost": "/dead/plan",
        "requeue: the cost, of a company": f"/dead/plan?company={slug}",
        "audit": "/audit",
    }
    for page, path in paths.items():
        yield reader.measure(page, path)
    form = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', reader.text("/dead/plan")))
    made, address = reader.post("requeue: make the plan", "/dead/plan", form | {"why": "benchmark", "rate": "5000"})
    yield made
    yield reader.measure("replay, while it is made and fed", address)
    yield reader.measure("replays, while one is fed", "/replays")
    yield reader.measure("dead letters, while a replay is fed", "/dead")
    reader.post("cancel", f"{address}/cancel", {"why": "benchmark"})


def main() -> int:
    """Measure once; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ops_pages", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as one:
        measured = list(measure(one, options.events))
    table = Table(
        "page", "ms (median)", "ms (9 of 10)", "ms (longest)", "CPU ms", "KB", title=f"{options.events:,} events"
    )
    for found in measured:
        times = (f"{ms:.0f}" for ms in (median(found.ms), found.slow_ms, max(found.ms)))
        table.add_row(found.page, *times, f"{found.cpu_ms:.0f}", f"{found.size / 1000:.1f}")
    console = Console(width=120)
    console.print(table)
    missed = [found.page for found in measured if not found.is_good]
    for page in missed:
        console.print(f"missed: {page}")
    return 1 if missed else 0


def measure(one: Service, events: int) -> Iterator[Measured]:
    """Fill an empty service with so many events, and measure every page of its ops process."""
    one.start_valkey()
    one.start_sandbox()
    one.variables |= {"OPS_TOKEN": _READ, "OPS_ACT_TOKEN": _ACT}
    plan = Plan(events, time.time_ns() // 1_000_000, one.company_id, _KINDS)
    contents = list(contents_of(one))
    with Redis.from_url(one.valkey.url) as redis:
        redis.config_set("appendonly", "no")
        fill(redis, one.valkey.url, plan, contents)
    ops = one.start("ops")
    url = f"http://127.0.0.1:{one.variables['OPS_PORT']}"
    hooks = {"request": [as_another]}
    with httpx.Client(base_url=url, auth=("benchmark", _ACT), trust_env=False, timeout=30, event_hooks=hooks) as http:
        yield from _pages(Reader(one, http, ops.pid), plan)


if __name__ == "__main__":
    sys.exit(main())
