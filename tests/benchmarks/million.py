"""The cost of one million orders in Redis: the memory of each, and Redis's work for each command.

    uv run python -m tests.benchmarks.million [--orders 1000000]

A Valkey without AOF is filled by Inbox and Ledger under a clock that passes 90 days; then the commands run as people
run them. Redis's work is the sum over all commands in INFO commandstats (an upper bound: those inside scripts count
twice). The longest command is the longest wait of other clients. Exits 1 when a command costs Redis 200 ms or more, or
fails.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Inbox
from app.ledger import policy
from app.ledger.keys import DEFAULT_PREFIX
from app.ledger.ledger import Ledger
from app.ledger.redis import AsyncRedis, Redis, client_of, source
from app.ledger.rq_jobs import LIVE, queue_key
from app.ledger.work import Content
from app.times import from_ms
from app.upstream.decode import digest
from tests.lab import KEYS
from tests.service import Service, ask, service

MOST_MS: Final = 200
_DAYS: Final = 90
_DEDUP_DAYS: Final = 7
_AT_ONCE: Final = 200
_CONTENTS: Final = 50
"""Different contents, with their own ids and numbers."""

_WINDOW: Final = 10_000
_SAMPLES: Final = 500
_TOKEN: Final = "benchmark-token"
_KINDS: Final = {7: "pending", 57: "deferred", 107: "dead"}
_FAILURES: Final[dict[str, Any]] = {
    "deferred": {"outcome": "deferred", "reason": "breaker_open", "wait_ms": 5 * policy.MINUTE},
    "dead": {"outcome": "dead", "reason": "order_missing", "http_status": 404, "duration_ms": 12},
}


@dataclass(frozen=True)
class One:
    """An event and its order. Of 50 events the last is the second one of the order before."""

    order: OrderKey
    event: OrderProcessed
    at: int
    kind: str

    @property
    def own_reference(self) -> str:
        return f"SHOP-{int(self.order.order_id[:8], 16):09}"


@dataclass(frozen=True)
class Plan:
    """`count` events that end at `now` (ms); of 200 orders those in `kinds` are not fetched."""

    count: int
    now: int
    company_id: str
    kinds: Mapping[int, str] = field(default_factory=lambda: _KINDS)

    def one(self, number: int) -> One:
        own = number - (number % 50 == 49)
        step = _DAYS * policy.DAY - policy.MINUTE
        order = OrderKey(self.company_id, f"{own:08x}-0000-4000-8000-{own:012}")
        event = OrderProcessed(
            company_id=order.company_id,
            order_id=order.order_id,
            status="Issued",
            reference=f"CM-{own:08X}",
            timestamp=f"2026-06-01T08:15:02.{number:07}Z",
            secret="current",
            request_id=f"{number:032x}",
        )
        return One(order, event, self.now - step + step * number // self.count, self.kinds.get(own % 200, "fetched"))


def fill(redis: Redis, url: str, plan: Plan, contents: Sequence[Content]) -> None:
    """Record all events and fetch their orders; the jobs of pending orders wait in `live` at the end."""
    now = 0
    client = client_of(AsyncRedis, url, DEFAULT_PREFIX)
    inbox = Inbox(client, dedup_days=_DEDUP_DAYS, event_days=_DAYS, clock=lambda: now)
    # The id of a stream entry is the clock's time instead of the server's.
    script = source("accept")
    assert script.count("events, '*'") == 2
    inbox._accept = client.register_script(script.replace("events, '*'", "events, now .. '-*'"))
    ledger = Ledger(redis, order_days=400, fetch_lease=policy.MINUTE, clock=lambda: now)
    waiting: list[str] = []
    with asyncio.Runner() as runner:
        starts = range(0, plan.count, _AT_ONCE)
        for start in track(starts, description="filling", console=Console(stderr=True), transient=True):
            chunk = [plan.one(number) for number in range(start, min(start + _AT_ONCE, plan.count))]
            now = chunk[-1].at
            runner.run(inbox.accept([one.event for one in chunk]))
            if now < plan.now - _DEDUP_DAYS * policy.DAY:
                redis.delete(*(f"ota:seen:{one.event.digest}" for one in chunk))
            # Workers take the jobs of all orders but the pending ones.
            jobs = {f"ota-f-{one.order.company_id}-{one.order.order_id}-1": one.kind == "pending" for one in chunk}
            waiting += [job for job, is_pending in jobs.items() if is_pending]
            redis.delete(
                queue_key(LIVE, KEYS), *(f"rq:job:{job}" for job, is_pending in jobs.items() if not is_pending)
            )
            now += 1000
            for one in {one.order: one for one in chunk if one.kind != "pending"}.values():
                _fetch(ledger, one, contents)
        runner.run(client.aclose())
    redis.rpush(queue_key(LIVE, KEYS), *waiting)


def _fetch(ledger: Ledger, one: One, contents: Sequence[Content]) -> None:
    _, fetch, _ = ledger.start_fetch(one.order, "host-1-live-1")
    assert fetch is not None
    if one.kind == "fetched":
        content = contents[int(one.order.order_id[:8], 16) % len(contents)]
        references = (one.event.reference, one.own_reference)
        ledger.store_fetch(one.order, "host-1-live-1", fetch, msgspec.structs.replace(content, references=references))
    else:
        ledger.fail_fetch(one.order, "host-1-live-1", fetch, **_FAILURES[one.kind])


def contents_of(one: Service) -> Iterator[Content]:
    """Return answers of getOrder that differ as real orders do: in the ids and numbers of their wallets."""
    made = {"company_id": one.company_id, "count": _CONTENTS, "items": ["31001", "PKG-100"]}
    for row in one.admin("POST", "orders", made)["orders"]:
        answer = ask("GET", one.api(f"channelManager/{row['order_id']}"), headers=one.key)[1]
        raw = msgspec.json.encode(answer)  # as upstream sends it, without blanks
        yield Content(
            raw, digest(raw), "Issued", wallets=2, tickets=2, coupons=1, manifest=True, http_status=200, duration_ms=240
        )


def _memory(redis: Redis, plan: Plan, used: int) -> Iterator[tuple[str, float]]:
    """Return mean sizes in bytes: of each key of a fetched order, and its share of the keys of all orders."""
    step = max(plan.count // _SAMPLES, 1)
    sample = [one for one in map(plan.one, range(plan.count - 1, 0, -step)) if one.kind == "fetched"]
    orders: int = redis.zcard(KEYS.orders)

    def of(*names: str) -> float:
        return mean(redis.memory_usage(name, samples=0) or 0 for name in names)

    names = [KEYS.reference(name) for one in sample for name in (one.event.reference, one.own_reference)]
    per_order = {
        "record": of(*(KEYS.record(one.order) for one in sample)),
        "content": of(*(KEYS.content(one.order) for one in sample)),
        "history": of(*(KEYS.history(one.order) for one in sample)),
        "two references": 2 * of(*names),
        "place in the list of orders": of(KEYS.orders) / orders,
        "place in the feed": of(KEYS.feed) / orders,
    }
    yield from ((f"order: {what}", size) for what, size in per_order.items())
    yield "order", sum(per_order.values())
    yield "event: entry in the stream", of(KEYS.events) / plan.count
    yield "event: duplicate mark", of(*islice(redis.scan_iter("ota:seen:*", count=1000), _SAMPLES))
    yield "all of Redis, for one order", used / orders


@dataclass(frozen=True)
class Work:
    """The cost of one command in ms of Redis's work, and of its longest step."""

    command: str
    succeeded: bool
    redis: float
    longest: float


def _work(redis: Redis, command: str, expected: int, run: Callable[[], tuple[int, Any]]) -> Work:
    """Run a command; `run` returns its exit code, or the status of a request, first."""
    # In microseconds; a longest step below this counts as 0.
    redis.config_set("slowlog-log-slower-than", 100)
    redis.slowlog_reset()
    redis.config_resetstat()
    succeeded = run()[0] == expected
    stats: Any = redis.info("commandstats")
    slow: Any = redis.slowlog_get(128)
    ours = ("config", "info", "slowlog")
    used = sum(one["usec"] for name, one in stats.items() if not name.removeprefix("cmdstat_").startswith(ours))
    durations = [one["duration"] for one in slow if not one["command"].startswith((b"CONFIG", b"INFO", b"SLOWLOG"))]
    return Work(command, succeeded, round(used / 1000, 1), round(max(durations, default=0) / 1000, 2))


def _commands(redis: Redis, plan: Plan, one: Service) -> Iterator[Work]:
    middle = plan.one(plan.count // 2 // 200 * 200)
    pending = plan.one(plan.count // 2 // 200 * 200 + 7)
    first = plan.one(plan.count // 3)
    last = plan.one(plan.count // 3 + min(_WINDOW, plan.count // 10) - 1)
    window = ("--since", from_ms(first.at).isoformat(), "--until", from_ms(last.at).isoformat())
    commands = {
        "orders show ID": ("orders", "show", middle.order.order_id),
        "orders show REFERENCE": ("orders", "show", middle.own_reference),
        "orders show REFERENCE, pending": ("orders", "show", pending.event.reference),
        "orders show REFERENCE, unknown": ("orders", "show", "CM-NOWHERE"),
        "orders explain ID": ("orders", "explain", middle.order.order_id),
        "orders list": ("orders", "list"),
        "orders list --state pending": ("orders", "list", "--state", "pending"),
        "orders list --state deferred": ("orders", "list", "--state", "deferred"),
        "events list --since 1h": ("events", "list", "--since", "1h", "--limit", "10000"),
        f"events replay --dry-run, {_WINDOW:,} events": ("events", "replay", *window, "--dry-run"),
        "status": ("status",),
    }
    # An unknown order is not found, and without a pool the status is not healthy.
    codes = {"orders show REFERENCE, unknown": 1, "status": 1}
    for name, arguments in commands.items():
        yield _work(redis, name, codes.get(name, 0), partial(one.cli, *arguments))
    one.start("web")
    bearer = {"authorization": f"Bearer {_TOKEN}"}
    yield _work(redis, "/metrics", 200, partial(ask, "GET", f"{one.web_url}/metrics", headers=bearer))


def main() -> int:
    """Measure once; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.million", description=__doc__)
    parser.add_argument("--orders", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as one:
        one.start_valkey()
        one.start_sandbox()
        one.variables["OPS_TOKEN"] = _TOKEN
        plan = Plan(options.orders, time.time_ns() // 1_000_000, one.company_id)
        contents = list(contents_of(one))
        with Redis.from_url(one.valkey.url) as redis:
            redis.config_set("appendonly", "no")
            empty = redis.info("memory")["used_memory"]
            fill(redis, one.valkey.url, plan, contents)
            sizes = Table("memory", "bytes")
            for what, size in _memory(redis, plan, redis.info("memory")["used_memory"] - empty):
                sizes.add_row(what, f"{size:,.0f}")
            work = list(_commands(redis, plan, one))
    costs = Table("command", "Redis ms", "longest ms")
    for cost in work:
        costs.add_row(cost.command, f"{cost.redis:,}", f"{cost.longest:,}")
    console = Console(width=120)
    console.print(f"{plan.count:,} events over {_DAYS} days", sizes, costs)
    missed = [cost.command for cost in work if not cost.succeeded or cost.redis >= MOST_MS]
    for command in missed:
        console.print(f"missed: {command}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
