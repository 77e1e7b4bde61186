"""What traces cost the web process: CPU time for a POST of one event without traces, at 1 % and at 100 %.

    uv run python -m tests.benchmarks.traces [--rounds 20]

Three web processes on one Redis take turns of a second, so that each round compares them under the same load of the
machine. Exits 1 when a POST is refused, or when the collector got no span of a process with traces.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Final

from app.dev.processes import Process, free_port
from tests.benchmarks.load import MARKER, cpu_seconds, wrk
from tests.lab_upstream import fake_upstream, says
from tests.service import service

KINDS: Final[dict[str, dict[str, str]]] = {
    "off": {},
    "1 %": {"OTEL_SERVICE_NAME": "1 %"},
    "100 %": {"OTEL_SERVICE_NAME": "100 %", "OTEL_TRACES_SAMPLER": "parentbased_always_on"},
}
_AHEAD: Final = 1_000_000  # numbers of events for one turn


def main() -> int:
    """Run the turns and print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.traces", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each process (default 20)")
    rounds = parser.parse_args().rounds
    refused = 0
    with tempfile.TemporaryDirectory() as name, service(Path(name)) as one, fake_upstream() as collector:
        collector.will(says(200))
        one.start_valkey()
        one.start_sandbox()
        body = one.folder / "body.json"
        body.write_text(json.dumps({"values": [one.event(f"00000000-0000-4000-8000-{MARKER}")]}))
        webs: dict[str, tuple[Process, str]] = {}
        for kind, variables in KINDS.items():
            one.variables["PORT"] = str(free_port())
            endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url} if variables else {}
            webs[kind] = one.start("web", **variables, **endpoint), one.webhook
        costs: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(rounds + 1):
            for turn, (kind, (web, url)) in enumerate(webs.items()):
                before = cpu_seconds(web.pid)
                done = wrk(url, body, 1, first=(number * len(webs) + turn) * _AHEAD)
                refused += done.refused
                if number:  # the first turns warm up
                    costs[kind].append((cpu_seconds(web.pid) - before) / done.requests * 1e6)
        received = b"".join(asked.body for asked in collector.asked)
    for kind, found in costs.items():
        ratio = median(cost / off for cost, off in zip(found, costs["off"], strict=True))
        sys.stdout.write(f"{kind}: {median(found):.0f} µs of CPU time for a POST, {ratio:.3f} times that without\n")
    silent = [kind for kind in KINDS if kind != "off" and kind.encode() not in received]
    if refused or silent:
        sys.stderr.write(f"invalid: {refused} POSTs refused, no spans from: {', '.join(silent) or '-'}\n")
    return int(bool(refused or silent))


if __name__ == "__main__":
    sys.exit(main())
