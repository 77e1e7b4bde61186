"""The memory of a pool and its workers after they have fetched orders: the PSS of all processes together.

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
from app.dev.processes import Process, ProcessEnded
from app.ledger import keys
from tests.benchmarks.contenders import OURS
from tests.benchmarks.drain import fetched, filled_receiver

_PATIENCE = 60.0


@dataclass(frozen=True)
class Memory:
    """PSS in MB (1,000,000 bytes) of all processes after the last order and at the first, and their number."""

    processes: int
    megabytes: float
    megabytes_before: float


def measure(orders: int) -> Memory:
    """Return the memory before the first order is fetched and after the last; raises TimeoutError."""
    with filled_receiver(orders, latency_ms=20) as (channel_manager, environment, redis, folder):
        worker = Process.start([*OURS, "worker"], env=environment, cwd=folder, log=folder / "worker.log")
        with worker:
            worker.wait_until(lambda: fetched(channel_manager) > 0, _PATIENCE, "the first order fetched")
            before = _pss(_family(worker.pid))
            worker.wait_until(lambda: fetched(channel_manager) >= orders, _PATIENCE, "all orders fetched")
            worker.wait_until(lambda: redis.zcard(keys.DUE) == 0, _PATIENCE, "nothing pending any more")
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
