"""How fast events are accepted, and at what cost: this service beside other receivers, in one run.

    uv run python -m tests.benchmarks [--rounds 3] [--seconds 5] [--only 1x32,20x32] [--receivers limit,ota-receiver]

Takes 13 minutes. Prints one Markdown table of medians on stdout, progress on stderr. Rounds alternate between the
receivers, each with an empty Valkey of its own, and no event is sent twice. A part of `--only` is EVENTSxCONNECTIONS:
wrk then sends as much as the receiver takes; `steady` is 500 POSTs a second of one event, whose latency counts from the
time at which each was due.

Exits 1 when an acknowledged event is not in the queue: a receiver that loses events is not fast. Also when the obvious
version (starlette-rq) has less than 0.04 of the limit's rate: then something else than the receivers was measured.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from rich.console import Console
from rich.progress import track

from tests.benchmarks.load import Answers, body_of, drive, requests_of, spending, wrk
from tests.benchmarks.start import LIMIT, OBVIOUS, RECEIVERS, Running, python_of, running

LEAST: Final = 0.04
"""Of the limit's rate, for the obvious version."""

_RATE: Final = 500
_STEADY_CONNECTIONS: Final = 64
_PROVED: Final = 128
"""Events of the proof; at least 16 POSTs."""

_HEADS: Final = (
    *("events a POST", "connections", "receiver", "events/s", "of limit", "× obvious"),
    *("web µs", "Valkey µs", "p50 ms", "p99 ms", "failed"),
)


@dataclass(frozen=True)
class Part:
    """One kind of load. At a `rate` it is as many POSTs a second, else as many as the receiver takes."""

    events: int
    connections: int
    rate: int = 0

    @property
    def connections_or_rate(self) -> str:
        """Return how the table names it."""
        return f"{self.rate} POST/s" if self.rate else str(self.connections)


PARTS: Final = {
    **{f"{events}x{clients}": Part(events, clients) for events in (1, 20, 100) for clients in (32, 256)},
    "steady": Part(1, _STEADY_CONNECTIONS, _RATE),
}


@dataclass(frozen=True)
class Run:
    """One receiver under one load once; times are CPU microseconds per event. `fault` makes the run invalid."""

    receiver: str
    part: str
    rate: float
    web: float
    valkey: float
    p50_ms: float
    p99_ms: float
    failed: int
    fault: str


def measure(name: str, part_name: str, seconds: int, python: str) -> Run:
    """Run one receiver against an empty Valkey; raises ProcessEnded or TimeoutError when it does not start."""
    part = PARTS[part_name]
    with tempfile.TemporaryDirectory() as folder, running(RECEIVERS[name], Path(folder), python) as one:
        # wrk drops requests at its end that may or may not be recorded, and a receiver that loses one event in a
        # hundred could hide behind them. Here every answer is read. This also warms the receiver up.
        posts = max(_PROVED // part.events, 16)
        proved = drive(one.port, requests_of(body_of(part.events), 0, posts)).acknowledged
        at_first = one.queued()
        with spending(one.web.pid) as web, spending(one.valkey.pid) as valkey:
            answers = _load(one, part, seconds, posts)
            grown = one.queued() - at_first
    acknowledged = answers.acknowledged * part.events
    fault, most = "", part.connections * part.events
    if not proved:
        fault = "it acknowledged nothing"
    elif name != LIMIT and at_first != proved * part.events:
        fault = f"it acknowledged {proved * part.events} events, its queue holds {at_first}"
    elif name != LIMIT and not 0 <= grown - acknowledged <= most:
        fault = f"it acknowledged {acknowledged} events under load, its queue grew by {grown}"
    # Of a slow receiver many events are recorded whose answer wrk did not wait for.
    events = max(acknowledged if name == LIMIT else grown, 1)
    return Run(
        receiver=name,
        part=part_name,
        rate=events / answers.seconds,
        web=web.seconds / events * 1e6,
        valkey=valkey.seconds / events * 1e6,
        p50_ms=answers.p50_ms,
        p99_ms=answers.p99_ms,
        failed=answers.refused + answers.broken,
        fault=fault,
    )


def _load(one: Running, part: Part, seconds: int, first: int) -> Answers:
    body = body_of(part.events)
    if part.rate:
        count = part.rate * seconds
        return drive(one.port, requests_of(body, first, count), part.connections, part.rate)
    body_file = Path(one.valkey.data_dir.parent, "body.json")
    body_file.write_text(body)
    return wrk(one.url, body_file, seconds, part.connections, first)


def table(runs: Sequence[Run]) -> str:
    """Return the medians as a Markdown table; ratios are those of the medians."""
    names, parts = (
        list(dict.fromkeys(found)) for found in ([run.receiver for run in runs], [run.part for run in runs])
    )
    rows: list[tuple[str, ...]] = [_HEADS, ("--:", "--:", ":--", *["--:"] * (len(_HEADS) - 3))]
    for part in parts:
        found = {name: [run for run in runs if (run.receiver, run.part) == (name, part)] for name in names}
        rates = {name: median(run.rate for run in own) for name, own in found.items()}
        for name, own in found.items():
            web, valkey, p50, p99 = (
                median(getattr(run, what) for run in own) for what in ("web", "valkey", "p50_ms", "p99_ms")
            )
            ratios = (
                f"{rates[name] / rates[other]:.{digits}f}" if other in rates and not PARTS[part].rate else "–"
                for other, digits in ((LIMIT, 2), (OBVIOUS, 1))
            )
            rows.append(
                (
                    *(str(PARTS[part].events), PARTS[part].connections_or_rate, name, f"{rates[name]:,.0f}", *ratios),
                    *(f"{web:,.1f}", "–" if name == LIMIT else f"{valkey:,.1f}"),
                    *(f"{time:,.1f}" if time else "–" for time in (p50, p99)),
                    str(sum(run.failed for run in own)),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def faults(runs: Sequence[Run]) -> list[str]:
    """Return what makes the whole table void."""
    found = [f"{run.receiver}, {run.part}: {run.fault}" for run in runs if run.fault]
    rates = {name: [run.rate for run in runs if (run.receiver, run.part) == (name, "1x32")] for name in RECEIVERS}
    if rates[LIMIT] and rates[OBVIOUS] and (ratio := median(rates[OBVIOUS]) / median(rates[LIMIT])) < LEAST:
        found.append(f"{OBVIOUS} has {ratio:.3f} of the limit's rate, less than {LEAST}")
    return found


def main() -> int:
    """Run all receivers in alternating rounds; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each receiver and part (default 3)")
    parser.add_argument("--seconds", type=int, default=5, help="length of one run (default 5)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts with commas between (default: all)")
    parser.add_argument("--receivers", default=",".join(RECEIVERS), help="names with commas between (default: all)")
    options = parser.parse_args()
    parts, names = options.only.split(","), options.receivers.split(",")
    if unknown := [*(set(parts) - PARTS.keys()), *(set(names) - RECEIVERS.keys())]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(PARTS)}; {', '.join(RECEIVERS)}")
    if shutil.which("wrk") is None:
        parser.error("there is no wrk on PATH; Debian and Ubuntu: apt-get install wrk, macOS: brew install wrk")
    try:
        pythons = {name: python_of(RECEIVERS[name]) for name in names}
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        parser.error(f"{error}; without arq and Celery: --receivers '{LIMIT},...'")
    errors = Console(stderr=True)
    started = time.monotonic()
    plan = [(name, part) for _ in range(options.rounds) for part in parts for name in names]
    steps = track(plan, description="measuring", console=errors, transient=True)
    runs = [measure(name, part, options.seconds, pythons[name]) for name, part in steps]
    sys.stdout.write(table(runs) + "\n")
    sys.stderr.write(f"{(time.monotonic() - started) / 60:.0f} minutes\n")
    found = faults(runs)
    sys.stderr.writelines(f"void: {fault}\n" for fault in found)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
