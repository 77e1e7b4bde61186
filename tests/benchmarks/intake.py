"""How fast events are accepted, compared with the obvious receiver and with the limit, in one run.

    uv run python -m tests.benchmarks.intake [--seconds 6] [--rounds 2]

wrk generates the load: one thread, 32 connections, every event of every request a new one. Exits 1 when an acknowledged
event is not in the queue: a receiver that loses events is not fast.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table

from app.ledger.redis import Redis
from tests.service import ask, service

_CONNECTIONS = 32
MARKER = "#" * 12
"""Stands in a body where load.lua writes the request's number."""

_PROOFS = 4 * _CONNECTIONS
_BATCHES = (1, 20)
_UVICORN = (sys.executable, "-m", "uvicorn", "--factory", "--loop", "uvloop", "--http", "httptools")
_QUIET = ("--no-access-log", "--log-level", "warning")
_LIMIT, _OBVIOUS, _RECEIVER = "limit", "obvious", "ota-receiver"
_ARGV = {
    _LIMIT: (*_UVICORN, "tests.benchmarks.receivers:limit", *_QUIET),
    _OBVIOUS: (*_UVICORN, "tests.benchmarks.receivers:obvious", *_QUIET),
    _RECEIVER: (sys.executable, "-m", "app.cli", "serve"),
}


@dataclass(frozen=True)
class Run:
    """One receiver under load once; speeds count only answers below 400.

    `failed` are answers from 400 up and requests without an answer. `fault` makes the run invalid.
    """

    receiver: str
    events_per_post: int
    events_per_second: float
    p50_ms: float
    p99_ms: float
    failed: int
    fault: str


def measure(receiver: str, events_per_post: int, seconds: int) -> Run:
    """Run one receiver against a fresh Valkey; raises ProcessEnded when it does not start."""
    with tempfile.TemporaryDirectory() as temporary, service(Path(temporary)) as one:
        one.start_valkey()
        one.start_sandbox()
        port_option = [] if receiver == _RECEIVER else ["--port", one.variables["PORT"]]
        web = one.run([*_ARGV[receiver], *port_option], "web.log")
        web.wait_until(one.web_listens, 20, "the port is open")
        events = [one.event(f"{index:08x}-0000-4000-8000-{MARKER}") for index in range(events_per_post)]
        template = json.dumps({"values": events}, separators=(",", ":"))
        body_file = one.folder / "body.json"
        body_file.write_text(template)
        with Redis.from_url(one.valkey.url) as redis:

            def queued() -> int:
                length: int = redis.llen("rq:queue:ota-live")
                return length

            # wrk drops up to 32 requests at its end that may or may not be recorded, and a receiver that loses one
            # event in a hundred could hide behind them. Here every answer is read. This also warms the server up.
            bodies = [template.replace(MARKER, f"{number:012d}").encode() for number in range(_PROOFS)]
            with ThreadPoolExecutor(_CONNECTIONS) as threads:
                answers = threads.map(lambda body: ask("POST", one.webhook, body), bodies)
                proved = sum(status == 200 for status, _ in answers)
            at_first = queued()
            found = load(one.webhook, body_file, seconds)
            grown = queued() - at_first
    acknowledged = found["requests"] - found["refused"]
    fault = ""
    if not proved or not acknowledged:
        fault = "it acknowledged nothing"
    elif receiver != _LIMIT and at_first != proved * events_per_post:
        fault = f"it acknowledged {proved * events_per_post} events, its queue holds {at_first}"
    elif receiver != _LIMIT and not 0 <= grown - acknowledged * events_per_post <= _CONNECTIONS * events_per_post:
        fault = f"it acknowledged {acknowledged * events_per_post} events under load, its queue grew by {grown}"
    return Run(
        receiver=receiver,
        events_per_post=events_per_post,
        events_per_second=acknowledged * events_per_post / (found["microseconds"] / 1e6),
        p50_ms=found["p50_us"] / 1e3,
        p99_ms=found["p99_us"] / 1e3,
        failed=found["refused"] + found["broken"],
        fault=fault,
    )


def load(url: str, body_file: Path, seconds: int, first: int = _PROOFS) -> dict[str, int]:
    """Post the body for `seconds`, numbering the requests from `first` + 1 on; return what load.lua prints."""
    script = str(Path(__file__).with_name("load.lua"))
    command = ["wrk", "-t1", f"-c{_CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s", "-s", script, url]
    done = subprocess.run([*command, "--", str(body_file), str(first)], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _table(runs: list[Run], events_per_post: int) -> Table:
    """Return the medians of each receiver for one size of POST."""
    own = {
        name: [one for one in runs if (one.receiver, one.events_per_post) == (name, events_per_post)] for name in _ARGV
    }
    speed = {name: median(run.events_per_second for run in found) for name, found in own.items()}
    table = Table("receiver", "events/s", "p50 ms", "p99 ms", "x obvious", "of limit", "failed")
    for name, found in own.items():
        p50, p99 = median(run.p50_ms for run in found), median(run.p99_ms for run in found)
        ratios = speed[name] / speed[_OBVIOUS], speed[name] / speed[_LIMIT]
        figures = [f"{figure:,.3g}" for figure in (p50, p99, *ratios)]
        table.add_row(name, f"{speed[name]:,.0f}", *figures, str(sum(run.failed for run in found)))
    table.title = f"{events_per_post} per POST"
    return table


def main() -> int:
    """Run all receivers in alternating rounds; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.intake", description=__doc__)
    parser.add_argument("--seconds", type=int, default=6, help="length of one run (default 6)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each receiver and batch size (default 2)")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("there is no wrk on PATH; Debian and Ubuntu: apt-get install wrk, macOS: brew install wrk")
    errors = Console(stderr=True)
    plan = [(name, events) for _ in range(options.rounds) for events in _BATCHES for name in _ARGV]
    steps = track(plan, description="measuring", console=errors, transient=True)
    runs = [measure(name, events, options.seconds) for name, events in steps]
    for events in _BATCHES:
        Console().print(_table(runs, events))
    faults = [f"{run.receiver}, {run.events_per_post} per POST: {run.fault}" for run in runs if run.fault]
    for fault in faults:
        errors.print(f"invalid: {fault}", markup=False)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
