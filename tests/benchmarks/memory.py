"""The memory of a pool whose workers have fetched orders: the PSS of the pool and of all its descendants.

    uv run python -m tests.benchmarks.memory [--orders 200]

PSS counts a page that several processes share once. Linux only.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx

from app.dev import valkey
from app.dev.processes import ProcessEnded
from app.ledger import keys
from tests.benchmarks.system import system

_PATIENCE = 60.0


@dataclass(frozen=True)
class Memory:
    """PSS in MB (1,000,000 bytes) of all processes together, and how many there are."""

    processes: int
    megabytes: float
    megabytes_before: float


def measure(orders: int) -> Memory:
    """Return the memory before the first order is fetched and after the last; raises TimeoutError."""
    with system(latency_ms=20) as running:
        running.post(running.issue(orders), per_post=20)
        with running.start("worker") as worker:
            worker.wait_until(lambda: running.fetched() > 0, _PATIENCE, "the first order is fetched")
            before = _pss(_family(worker.pid))
            worker.wait_until(lambda: running.fetched() >= orders, _PATIENCE, "all orders are fetched")
            worker.wait_until(lambda: running.redis.zcard(keys.DUE) == 0, _PATIENCE, "no fetch is pending")
            family = _family(worker.pid)
            return Memory(len(family), _pss(family), before)


def _family(root: int) -> list[int]:
    """Return `root` and the ids of all its descendants."""
    found = [root]
    for pid in found:
        found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


def _pss(pids: list[int]) -> float:
    """Return the sum of their PSS in MB."""
    lines = (line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return round(sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6, 1)


def main() -> int:
    """Measure once; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("--orders", type=int, default=200)
    try:
        memory = measure(parser.parse_args().orders)
    except (valkey.ValkeyUnavailable, ProcessEnded, TimeoutError, httpx.HTTPError) as error:
        sys.stderr.write(f"no result: {error}\n")
        return 1
    sys.stdout.write(
        f"{memory.processes} processes: {memory.megabytes} MB PSS, {memory.megabytes_before} MB at the first order\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
