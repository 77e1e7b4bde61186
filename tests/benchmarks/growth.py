"""What an event costs as kept events grow from 10,000 to a million, and POSTs from one event to a thousand.

    uv run python -m tests.benchmarks.growth [--events 1000000] [--rounds 15] [--svg docs/growth.svg]

Takes 3 to 5 minutes, 2 GB of memory and 3 GB of disk. Kept events are recorded by the real script, in large groups, and
their jobs taken away as workers do. Then this service and another one that keeps 10,000 events get the same short loads
in turns, so that each figure has one of the same minute to compare with. Prints Markdown tables on stdout and progress
on stderr, and draws the picture. Exits 1 when a POST is refused.

Servers in production are built with jemalloc. The embedded one is not: `--allocator ""` shows what that costs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ctypes.util import find_library
from dataclasses import astuple, dataclass
from math import log10
from pathlib import Path
from statistics import median
from typing import Any, Final
from unittest.mock import patch

from rich.console import Console
from rich.progress import track

from app.intake.envelope import OrderProcessed
from app.intake.recorder import Inbox
from app.ledger.keys import DEFAULT_PREFIX
from app.ledger.redis import AsyncRedis, client_of
from app.ledger.rq_jobs import LIVE, queue_key
from tests.benchmarks.load import Answers, body_of, drive, requests_of, spending
from tests.benchmarks.start import OURS, RECEIVERS, Running, running
from tests.lab import KEYS
from tests.service import COMPANY, ROOT

KEPT: Final = (10_000, 30_000, 100_000, 300_000, 1_000_000)
BATCHES: Final = (1, 10, 100, 1000)
_POSTS: Final = 500
"""POSTs of one event in a burst."""

_EVENTS: Final = 4000
"""Events in a burst of larger POSTs."""

_BATCH_CONNECTIONS: Final = 4
"""So few that POSTs of a thousand events are not refused for the time that they wait for each other."""

_AT_ONCE: Final = 1000


@dataclass(frozen=True)
class Cost:
    """Medians of bursts: events per second, the 99th percentile of answers, CPU microseconds per event."""

    rate: float
    p99_ms: float
    web: float
    valkey: float


@dataclass(frozen=True)
class Level:
    """What events cost while so many are kept, and in times of a service with 10,000; memory is in bytes for each."""

    kept: int
    cost: Cost
    times: Cost
    memory: float


class Growing:
    """A service, and how many events it keeps."""

    def __init__(self, one: Running) -> None:
        self._one = one
        self._empty = self._memory()
        self._posted = 0
        self.kept = 0
        self.refused = 0

    def grow(self, kept: int) -> None:
        """Record events until so many are kept."""
        if self.kept < kept:
            asyncio.run(self._record(range(self.kept, kept)))
            self.kept = kept

    def burst(self, events: int, posts: int, connections: int) -> Cost:
        """Post so many events at a time, all of new orders."""
        with spending(self._one.web.pid) as web, spending(self._one.valkey.pid) as valkey:
            requests = requests_of(body_of(events), self._posted, posts)
            answers: Answers = drive(self._one.port, requests, connections)
        self._posted += posts
        self.kept += posts * events
        self.refused += answers.refused
        self._take_jobs()
        per_event = 1e6 / (posts * events)
        rate = answers.acknowledged * events / answers.seconds
        return Cost(rate, answers.p99_ms, web.seconds * per_event, valkey.seconds * per_event)

    def memory(self) -> float:
        """Return the bytes of Redis for each kept event."""
        return (self._memory() - self._empty) / self.kept

    def _memory(self) -> int:
        info: Any = self._one.redis.info("memory")
        return int(info["used_memory"])

    def _take_jobs(self) -> None:
        redis = self._one.redis
        jobs: Any = redis.lrange(queue_key(LIVE, KEYS), 0, -1)
        for start in range(0, len(jobs), _AT_ONCE):
            redis.unlink(*(b"rq:job:" + job for job in jobs[start : start + _AT_ONCE]))
        redis.unlink(queue_key(LIVE, KEYS), KEYS.due)

    async def _record(self, numbers: range) -> None:
        client = client_of(AsyncRedis, self._one.valkey.url, DEFAULT_PREFIX)
        inbox = Inbox(client, dedup_days=7, event_days=90)
        starts = range(numbers.start, numbers.stop, _AT_ONCE)
        label = f"to {numbers.stop:,} events"
        for start in track(starts, description=label, console=Console(stderr=True), transient=True):
            chunk = range(start, min(start + _AT_ONCE, numbers.stop))
            await inbox.accept([_event(number) for number in chunk])
            self._take_jobs()
        await client.aclose()


def _event(number: int) -> OrderProcessed:
    return OrderProcessed(
        company_id=COMPANY,
        order_id=f"ffffffff-0000-4000-8000-{number:012}",
        status="Issued",
        reference=f"CM-20260515093000-{number:08X}",
        timestamp=f"2026-05-15T09:30:05.{number:07}Z",
        secret="current",
        request_id=f"{number:032x}",
    )


@contextmanager
def growing(allocator: str) -> Iterator[Growing]:
    """Yield a service that has been warmed up and keeps as many events as the least level.

    `allocator` is a library that Valkey uses instead of its own, or empty.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        with patch.dict(os.environ, LD_PRELOAD=allocator):
            one = opened.enter_context(running(RECEIVERS[OURS], Path(folder)))
        service = Growing(one)
        service.burst(1, _POSTS, 32)
        service.grow(KEPT[0])
        yield service


def levels(kept: Sequence[int], rounds: int, allocator: str) -> Iterator[Level]:
    """Measure each level in turns with a service of the least."""
    with growing(allocator) as grown:
        for one in kept:
            grown.grow(one)
            memory = grown.memory()
            with growing(allocator) as least:
                found = [(grown.burst(1, _POSTS, 32), least.burst(1, _POSTS, 32)) for _ in range(rounds)]
                _exit_if_refused(grown, least)
            costs, times = [cost for cost, _ in found], [_ratios(*both) for both in found]
            yield Level(one, _medians(costs), _medians(times), memory)


def batches(rounds: int, allocator: str) -> dict[int, Cost]:
    """Measure the sizes of POSTs in turns, on one service."""
    found: dict[int, list[Cost]] = {size: [] for size in BATCHES}
    with growing(allocator) as service:
        for _ in range(rounds):
            for size, costs in found.items():
                costs.append(service.burst(size, max(_EVENTS // size, 2 * _BATCH_CONNECTIONS), _BATCH_CONNECTIONS))
        _exit_if_refused(service)
    return {size: _medians(costs) for size, costs in found.items()}


def _exit_if_refused(*services: Growing) -> None:
    if refused := sum(service.refused for service in services):
        sys.exit(f"invalid: {refused} POSTs were refused")


def _medians(costs: Sequence[Cost]) -> Cost:
    return Cost(*map(median, zip(*map(astuple, costs), strict=True)))


def _ratios(one: Cost, other: Cost) -> Cost:
    return Cost(*(own / its for own, its in zip(astuple(one), astuple(other), strict=True)))


def tables(found: Sequence[Level], by_size: dict[int, Cost]) -> str:
    """Return both tables as Markdown."""
    lines = [
        "| kept events | events/s | p99 ms | web µs | Valkey µs | bytes of each |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for level in found:
        figures = zip(astuple(level.cost), astuple(level.times), strict=True)
        cells = (f"{value:,.0f} = {times:.2f} ×" for value, times in figures)
        lines.append(f"| {level.kept:,} | {' | '.join(cells)} | {level.memory:,.0f} |")
    lines += ["", "| events a POST | events/s | p99 ms | web µs | Valkey µs |", "|--:|--:|--:|--:|--:|"]
    for size, cost in by_size.items():
        lines.append(f"| {size:,} | {cost.rate:,.0f} | {cost.p99_ms:.1f} | {cost.web:.1f} | {cost.valkey:.1f} |")
    return "\n".join(lines)


_STYLE: Final = """
text { font: 12px sans-serif; fill: #333 } .title { font-weight: bold } .axis { stroke: #999 } .band { fill: #8884 }
polyline { fill: none; stroke-width: 2 } .a { stroke: #1f6feb } .b { stroke: #d9730d } .c { stroke: #2da44e }
circle { stroke: none } circle.a { fill: #1f6feb } circle.b { fill: #d9730d } circle.c { fill: #2da44e }
@media (prefers-color-scheme: dark) { text { fill: #ddd } }
"""
_WIDTH, _HEIGHT = 300, 180


class Panel:
    """A diagram of 300 x 180 with a logarithmic x axis; y is linear, or logarithmic too."""

    def __init__(self, title: str, x: Sequence[int], y: Sequence[float], *, logarithmic: bool) -> None:
        self._x, self._y, self._scale = x, y, log10 if logarithmic else float
        self._parts = [f'<text class="title" y="-14">{title}</text>']
        for mark in x:
            label = f"{mark // 1000}k" if 1000 <= mark < 10**6 else f"{mark // 10**6}M" if mark >= 10**6 else mark
            self._parts.append(
                f'<text x="{self._left(mark):.0f}" y="{_HEIGHT + 18}" text-anchor="middle">{label}</text>'
            )
        for value in y:
            top = self._top(value)
            self._parts.append(f'<line class="axis" x2="{_WIDTH}" y1="{top:.0f}" y2="{top:.0f}" stroke-opacity=".4"/>')
            self._parts.append(f'<text x="-6" y="{top + 4:.0f}" text-anchor="end">{value:g}</text>')

    def band(self, low: float, high: float) -> None:
        """Shade what is between two values of y."""
        top, bottom = self._top(high), self._top(low)
        self._parts.append(f'<rect class="band" width="{_WIDTH}" y="{top:.0f}" height="{bottom - top:.0f}"/>')

    def line(self, kind: str, label: str, values: Sequence[float], row: int) -> None:
        """Draw one value for each mark of x; `row` is the place of the label in the legend."""
        points = [(self._left(mark), self._top(value)) for mark, value in zip(self._x, values, strict=True)]
        self._parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        self._parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        self._parts.append(f'<circle class="{kind}" cx="{row * 110 + 4}" cy="{_HEIGHT + 38}" r="4"/>')
        self._parts.append(f'<text x="{row * 110 + 13}" y="{_HEIGHT + 42}">{label}</text>')

    def __str__(self) -> str:
        return "\n".join(self._parts)

    def _left(self, mark: float) -> float:
        first, last = log10(self._x[0]), log10(self._x[-1])
        return _WIDTH * (log10(mark) - first) / (last - first)

    def _top(self, value: float) -> float:
        low, high = self._scale(self._y[0]), self._scale(self._y[-1])
        return _HEIGHT * (high - self._scale(value)) / (high - low)


def picture(found: Sequence[Level], by_size: dict[int, Cost]) -> str:
    """Return both curves as an SVG."""
    kept = Panel(
        "by kept events, in times of 10,000", [one.kept for one in found], [0.5, 0.75, 1, 1.25, 1.5], logarithmic=False
    )
    kept.band(0.9, 1.1)
    kept.line("a", "CPU of web", [one.times.web for one in found], 0)
    kept.line("c", "CPU of Valkey", [one.times.valkey for one in found], 1)
    kept.line("b", "memory", [one.memory / found[0].memory for one in found], 2)
    sizes = Panel("CPU µs of an event, by events a POST", list(by_size), [1, 10, 100, 1000], logarithmic=True)
    sizes.line("a", "web", [cost.web for cost in by_size.values()], 0)
    sizes.line("c", "Valkey", [cost.valkey for cost in by_size.values()], 1)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 260" width="760" height="260">\n'
        f"<style>{_STYLE}</style>\n"
        f'<g transform="translate(44 34)">\n{kept}\n</g>\n<g transform="translate(434 34)">\n{sizes}\n</g>\n</svg>\n'
    )


def main() -> int:
    """Measure once, print the tables, and write the picture; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--events", type=int, default=KEPT[-1], help="kept at most (default 1000000)")
    parser.add_argument("--rounds", type=int, default=15, help="bursts of each kind (default 15)")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "growth.svg", help="the picture to write")
    parser.add_argument("--allocator", default="jemalloc", help="library for Valkey (default jemalloc)")
    options = parser.parse_args()
    allocator = options.allocator and find_library(options.allocator)
    if allocator is None:
        parser.error(f"there is no {options.allocator}; Debian and Ubuntu: apt-get install libjemalloc2")
    started = time.monotonic()
    found = list(levels([kept for kept in KEPT if kept <= options.events], options.rounds, allocator))
    by_size = batches(options.rounds, allocator)
    sys.stdout.write(tables(found, by_size) + "\n")
    options.svg.write_text(picture(found, by_size))
    sys.stderr.write(f"{(time.monotonic() - started) / 60:.0f} minutes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
