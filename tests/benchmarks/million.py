"""The cost of one million orders in Redis: the memory of each, and Redis's work for each command.

    uv run python -m tests.benchmarks.million [--orders 1000000] [--json]

A Valkey without AOF is filled through the real scripts (see stock.py); then the commands run as people run them.
Redis's work is the sum over all commands in INFO commandstats (an upper bound: those inside scripts count twice). The
longest command is the longest wait of other clients. Exits 1 when a command costs Redis 200 ms or more, or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, Final, Self

import httpx
from redis import Redis
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from app.dev import valkey
from app.dev.processes import Process, free_port
from app.ledger import keys
from app.times import from_ms
from tests.benchmarks import stock
from tests.benchmarks.stock import COMPANIES, Plan, own_reference, reference
from tests.environment import without_settings

MOST_MS: Final = 200
_CLI: Final = (sys.executable, "-m", "app.cli")
_ROOT: Final = Path(__file__).parents[2]
_TOKEN: Final = "benchmark-token"
_WINDOW: Final = 10_000
_SAMPLES: Final = 500


@dataclass(frozen=True)
class Work:
    """The cost of one command, with the lines that it printed; times in ms."""

    command: str
    code: int
    lines: int
    calls: int
    redis: float
    longest: float
    wall: float


@dataclass(frozen=True)
class Memory:
    """Mean size in bytes."""

    what: str
    bytes: float


def main() -> int:
    """Measure once; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.million", description=__doc__)
    parser.add_argument("--orders", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true", help="one object a line instead of tables")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        valkey.start(Path(folder) / "valkey") as server,
        Redis.from_url(server.url) as redis,
    ):
        redis.config_set("appendonly", "no")
        same = stock.assert_same(server.url)
        plan = Plan(options.orders, time.time_ns() // 1_000_000)
        empty = redis.info("memory")["used_memory"]
        started = time.monotonic()
        _fill(redis, plan)
        filled = time.monotonic() - started
        memory = list(_memory(redis, plan, redis.info("memory")["used_memory"] - empty))
        env = _environment(Path(folder), server.url)
        work = [*_commands(redis, plan, env), _metrics(redis, env)]
    missed = [one.command for one in work if one.code or one.redis >= MOST_MS]
    if options.json:
        rows: list[Memory | Work] = [*memory, *work]
        for row in rows:
            sys.stdout.write(json.dumps(asdict(row)) + "\n")
    else:
        _print(plan, filled, same, memory, work)
    for command in missed:
        Console(stderr=True).print(f"missed: {command}")
    return 1 if missed else 0


def _fill(redis: Redis, plan: Plan) -> None:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("filling", total=plan.count)
        for done in stock.fill(redis, plan):
            bar.update(task, completed=done)


def _memory(redis: Redis, plan: Plan, used: int) -> Iterator[Memory]:
    """Return the mean size of each key of a fetched order, and its share of the keys of all orders."""
    step = max(plan.count // _SAMPLES, 1)
    sample = [one for one in map(plan.one, range(plan.count - 1, 0, -step)) if one.kind == "fetched"]
    orders: int = redis.zcard(keys.ORDERS)

    def of(*names: str) -> float:
        return mean(redis.memory_usage(name, samples=0) or 0 for name in names)

    per_order = {
        "record": of(*(keys.record(one.order) for one in sample)),
        "content": of(*(keys.content(one.order) for one in sample)),
        "history": of(*(keys.history(one.order) for one in sample)),
        "two references": 2 * of(*(keys.reference(name(one)) for one in sample for name in (reference, own_reference))),
        "place in the list of orders": of(keys.ORDERS) / orders,
    }
    yield from (Memory(f"order: {what}", size) for what, size in per_order.items())
    yield Memory("order", sum(per_order.values()))
    seen = list(islice(redis.scan_iter("ota:seen:*", count=1000), _SAMPLES))
    per_event = {"entry in the stream": of(keys.EVENTS) / plan.count, "duplicate mark": of(*seen) if seen else 0.0}
    yield from (Memory(f"event: {what}", size) for what, size in per_event.items())
    yield Memory("all of Redis, for one order", used / orders)


def _environment(folder: Path, url: str) -> dict[str, str]:
    companies = folder / "companies.toml"
    companies.write_text(
        "\n".join(
            f'[companies.venue{number}]\nnp_company_id = "{company_id}"\nnp_company = "Venue {number}"\n'
            f'np_tenant = "tenant"\nnp_environment = "Sandbox"\nnp_api_key = "key"\n'
            f'client_state = "benchmark-0c9f6d1e7b{number}"\n'
            for number, company_id in enumerate(COMPANIES)
        ),
        encoding="utf-8",
    )
    ours = {"REDIS_URL": url, "COMPANIES_FILE": str(companies), "OPS_TOKEN": _TOKEN, "PORT": str(free_port())}
    return without_settings(os.environ) | ours | {"NP_BASE_URL": "http://127.0.0.1:9"}


def _commands(redis: Redis, plan: Plan, env: dict[str, str]) -> Iterator[Work]:
    middle = plan.one(plan.count // 2 // 200 * 200)
    pending = plan.one(plan.count // 2 // 200 * 200 + 7)
    first = plan.one(plan.count // 3)
    last = plan.one(plan.count // 3 + min(_WINDOW, plan.count // 10) - 1)
    window = ("--since", from_ms(first.at).isoformat(), "--until", from_ms(last.at).isoformat())
    commands = {
        "orders show ID": ("orders", "show", middle.order.order_id),
        "orders show REFERENCE": ("orders", "show", own_reference(middle)),
        "orders show REFERENCE, pending": ("orders", "show", reference(pending)),
        "orders show ID, unknown": ("orders", "show", "99999999-0000-4000-8000-000000000000"),
        "orders show REFERENCE, unknown": ("orders", "show", "CM-NOWHERE"),
        "orders explain ID": ("orders", "explain", middle.order.order_id),
        "orders list": ("orders", "list"),
        "orders list --state pending": ("orders", "list", "--state", "pending"),
        "orders list --state deferred": ("orders", "list", "--state", "deferred"),
        "dead list": ("dead", "list"),
        "events list --since 1h": ("events", "list", "--since", "1h", "--limit", "10000"),
        f"events replay --dry-run, {_WINDOW:,} events": ("events", "replay", *window, "--dry-run"),
        "status": ("status",),
    }
    # Unknown orders are not found, and without a pool the status is not healthy.
    codes = {"orders show ID, unknown": 1, "orders show REFERENCE, unknown": 1, "status": 1}
    for name, arguments in commands.items():
        with _Used(redis) as used:
            started = time.perf_counter()
            ended = subprocess.run(
                [*_CLI, *arguments], env=env, cwd=_ROOT, capture_output=True, text=True, timeout=300, check=False
            )
            wall = (time.perf_counter() - started) * 1000
        code = ended.returncode - codes.get(name, 0)
        yield Work(name, code, len(ended.stdout.splitlines()), used.calls, used.redis, used.longest, round(wall))


def _metrics(redis: Redis, env: dict[str, str]) -> Work:
    with Process.start([*_CLI, "serve"], env=env | {"LOG_LEVEL": "ERROR"}, cwd=_ROOT) as web:
        url = f"http://127.0.0.1:{env['PORT']}"
        web.wait_until(lambda: _answers(url), 20, "an answer of /healthz")
        with _Used(redis) as used, httpx.Client() as client:
            started = time.perf_counter()
            answer = client.get(f"{url}/metrics", headers={"authorization": f"Bearer {_TOKEN}"})
            wall = (time.perf_counter() - started) * 1000
        code = 0 if answer.status_code == 200 else 1
        return Work("/metrics", code, len(answer.text.splitlines()), used.calls, used.redis, used.longest, round(wall))


class _Used:
    """Redis's work while the block runs."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def __enter__(self) -> Self:
        # In microseconds; a longest command below this counts as 0.
        self._redis.config_set("slowlog-log-slower-than", 100)
        self._redis.slowlog_reset()
        self._redis.config_resetstat()
        return self

    def __exit__(self, *_: object) -> None:
        stats: Any = self._redis.info("commandstats")
        slow: Any = self._redis.slowlog_get(128)
        ours = {"info", "config|set", "config|resetstat", "slowlog|reset", "slowlog|get"}
        used = [one for name, one in stats.items() if name.removeprefix("cmdstat_") not in ours]
        self.calls = sum(one["calls"] for one in used)
        self.redis = round(sum(one["usec"] for one in used) / 1000, 1)
        durations = [one["duration"] for one in slow if not one["command"].startswith((b"CONFIG", b"INFO", b"SLOWLOG"))]
        self.longest = round(max(durations, default=0) / 1000, 2)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def _print(plan: Plan, filled: float, same: int, memory: list[Memory], work: list[Work]) -> None:
    console = Console(width=120)
    console.print(
        f"{plan.count:,} events of {len(COMPANIES)} companies over {stock.DAYS} days, filled in {filled:.0f} s;"
        f" {same} keys compared with the real writers': equal"
    )
    sizes = Table("memory", "bytes")
    for one in memory:
        sizes.add_row(one.what, f"{one.bytes:,.0f}")
    console.print(sizes)
    costs = Table("command", "lines", "calls", "Redis ms", "longest ms", "wall ms")
    for cost in work:
        figures = (cost.lines, cost.calls, cost.redis, cost.longest, cost.wall)
        costs.add_row(cost.command, *(f"{figure:,}" for figure in figures))
    console.print(costs)


if __name__ == "__main__":
    sys.exit(main())
