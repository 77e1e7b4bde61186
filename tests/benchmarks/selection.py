"""The cost of selecting the orders of a replay in Redis: 10,000 events out of 200,000, selected in three ways.

    uv run python -m tests.benchmarks.selection [--events 200000] [--selected 10000] [--json]

By time only the selected stretch is read; by status everything is, since a stream has no other index. Redis's time is
from INFO commandstats; the mean time of the slowest command is how long other clients wait for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from redis import Redis
from rich.console import Console
from rich.table import Table

from app.dev import valkey
from app.ids import OrderKey
from app.ledger import keys
from app.replay import Selection, needless, select
from app.times import from_ms

_COMPANY = "11111111-1111-4111-8111-111111111111"
_FIRST = 1_780_000_000_000
_AT_ONCE = 5000


def fill(redis: Redis, events: int, selected: int) -> None:
    """Write the events, one each second; the last `selected` are Drafts of orders with records."""
    for start in range(0, events, _AT_ONCE):
        with redis.pipeline(transaction=False) as pipe:
            for number in range(start, min(start + _AT_ONCE, events)):
                order = OrderKey(_COMPANY, f"00000000-0000-4000-8000-{number:012}")
                ms = _FIRST + number * 1000
                late = number >= events - selected
                pipe.xadd(
                    keys.EVENTS,
                    {
                        "company": _COMPANY,
                        "order": order.order_id,
                        "status": "Draft" if late else "Issued",
                        "reference": f"CM-{number}",
                        "sent": "2026-06-01T08:15:02.417Z",
                        "outcome": "queued",
                        "secret": "current",
                        "request": f"{number:032x}",
                    },
                    id=f"{ms}-0",
                )
                if late:
                    # Half of them are not fetched since the event.
                    counters = ["generation", 1, "fetched_generation", number % 2, "fetched_at", ms + 500]
                    pipe.hset(keys.record(order), items=[*counters, "revision", 1, "status", "Draft"])  # type: ignore[list-item]
            pipe.execute()


def measure(redis: Redis, selection: Selection) -> dict[str, Any]:
    """Select, compare with the records, and return the cost."""
    redis.config_resetstat()
    began = time.perf_counter()
    found = select(redis, selection, lambda _: None)
    passed = needless(redis, found.orders, deliver=False)
    seconds = time.perf_counter() - began
    stats: Any = redis.info("commandstats")
    used = {
        name.removeprefix("cmdstat_"): one for name, one in stats.items() if "info" not in name and "conf" not in name
    }
    return {
        "events": found.events,
        "orders": len(found.orders),
        "passed": len(passed),
        "calls": sum(one["calls"] for one in used.values()),
        "redis_ms": round(sum(one["usec"] for one in used.values()) / 1000, 1),
        "slowest_command_ms": round(max(one["usec_per_call"] for one in used.values()) / 1000, 3),
        "seconds": round(seconds, 2),
    }


def main() -> int:
    """Measure once; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.selection", description=__doc__)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--selected", type=int, default=10_000)
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    options = parser.parse_args()
    since = from_ms(_FIRST + (options.events - options.selected) * 1000)
    with (
        tempfile.TemporaryDirectory() as folder,
        valkey.start(Path(folder)) as server,
        Redis.from_url(server.url) as redis,
    ):
        fill(redis, options.events, options.selected)
        results = {
            "by time": measure(redis, Selection(since=since)),
            "by time and status": measure(redis, Selection(since=since, status="draft")),
            "by status": measure(redis, Selection(status="draft")),
        }
    if options.json:
        for name, result in results.items():
            sys.stdout.write(json.dumps({"selection": name} | result) + "\n")
        return 0
    table = Table("selection", *next(iter(results.values())))
    for name, result in results.items():
        table.add_row(name, *(f"{value:,}" for value in result.values()))
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
