"""How fast events are accepted, compared with the obvious receiver and with the limit, in one run.

    uv run python -m tests.benchmarks.intake [--seconds 6] [--rounds 2] [--json]

Exits 1 when an acknowledged event is not in the queue: a receiver that loses events is not fast.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from redis import Redis
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from app.dev import valkey
from app.dev.processes import ProcessEnded, free_port
from tests.benchmarks import wrk
from tests.benchmarks.contenders import (
    ACKNOWLEDGE_ONLY,
    ALL,
    CLIENT_STATE,
    COMPANY_ID,
    OBVIOUS,
    WEBHOOK_PATH,
    Contender,
    body,
    serve,
    settings,
)

BATCHES = (1, 20)
_PROOFS = 4 * wrk.CONNECTIONS


@dataclass(frozen=True)
class Run:
    """One contender under load once; speeds count only answers below 400.

    `refused` are answers from 400 up, `broken` requests without an answer. `proved` events were acknowledged before
    the load, each answer read; `acknowledged` under load. `recorded_*` is the length of the queue after each, None
    for a contender that records nothing.
    """

    contender: str
    events_per_post: int
    events_per_second: float
    p50_ms: float
    p99_ms: float
    refused: int
    broken: int
    proved: int
    recorded_at_first: int | None
    acknowledged: int
    recorded_in_all: int | None

    def is_of(self, contender: Contender, events_per_post: int) -> bool:
        """Return whether this run is of that contender with that batch size."""
        return (self.contender, self.events_per_post) == (contender.name, events_per_post)

    @property
    def fault(self) -> str | None:
        """Return why this run is invalid, None when it is valid."""
        if not self.proved or not self.acknowledged:
            return "it acknowledged nothing"
        if self.recorded_at_first is None or self.recorded_in_all is None:
            return None
        if self.recorded_at_first != self.proved:
            return f"it acknowledged {self.proved} events, its queue holds {self.recorded_at_first}"
        recorded = self.recorded_in_all - self.recorded_at_first
        # wrk ended before it read the answers of these.
        in_flight = wrk.CONNECTIONS * self.events_per_post
        if not self.acknowledged <= recorded <= self.acknowledged + in_flight:
            return f"it acknowledged {self.acknowledged} events under load, its queue grew by {recorded}"
        return None


def measure(contender: Contender, events_per_post: int, seconds: int) -> Run:
    """Run one contender against a fresh Valkey; raises ProcessEnded when it does not start."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        template = body(wrk.order_ids(events_per_post), client_state=CLIENT_STATE, company_id=COMPANY_ID)
        body_file = folder / "body.json"
        body_file.write_text(template)
        port = free_port()
        url = f"http://127.0.0.1:{port}{WEBHOOK_PATH}"
        with (
            valkey.start(folder / "valkey") as server,
            serve(contender, port, settings(server.url, port), folder),
            Redis.from_url(server.url) as redis,
        ):
            # These also warm the server up.
            proved = _post_all(url, [template.replace(wrk.MARKER, f"{number:012d}") for number in range(_PROOFS)])
            recorded_at_first = _queued(redis, contender)
            load = wrk.run(url, body_file, seconds=seconds, first=_PROOFS)
            recorded_in_all = _queued(redis, contender)
    return Run(
        contender=contender.name,
        events_per_post=events_per_post,
        events_per_second=load.answered_well * events_per_post / load.seconds,
        p50_ms=load.p50_ms,
        p99_ms=load.p99_ms,
        refused=load.refused,
        broken=load.broken,
        proved=proved * events_per_post,
        recorded_at_first=recorded_at_first,
        acknowledged=load.answered_well * events_per_post,
        recorded_in_all=recorded_in_all,
    )


def _post_all(url: str, bodies: list[str]) -> int:
    """Post every body, each on its own connection, and return the number of 2xx answers.

    wrk drops up to 32 requests at its end that may or may not be recorded, and a receiver that loses one event in a
    hundred could hide behind them. Here every answer is read.
    """
    parts = urlsplit(url)

    def post(content: str) -> int:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        try:
            connection.request("POST", parts.path, content, {"Content-Type": "application/json"})
            return connection.getresponse().status
        finally:
            connection.close()

    with ThreadPoolExecutor(wrk.CONNECTIONS) as threads:
        return sum(200 <= status < 300 for status in threads.map(post, bodies))


def _queued(redis: Redis, contender: Contender) -> int | None:
    return int(redis.llen(f"rq:queue:{contender.queue}")) if contender.queue else None


@dataclass(frozen=True)
class Row:
    """The result of one contender and batch size: medians, sums, and ratios to the other two."""

    events_per_post: int
    contender: str
    events_per_second: float
    p50_ms: float
    p99_ms: float
    times_obvious: float | None
    of_acknowledge_only: float | None
    not_2xx: int


def summary(runs: list[Run]) -> list[Row]:
    """Return one row per contender and batch size."""
    rows: list[Row] = []
    for events in BATCHES:
        by_name = {one.name: [run for run in runs if run.is_of(one, events)] for one in ALL}
        speed = {name: median(run.events_per_second for run in own) for name, own in by_name.items() if own}
        rows += [
            Row(
                events_per_post=events,
                contender=name,
                events_per_second=round(speed[name]),
                p50_ms=_short(median(run.p50_ms for run in by_name[name])),
                p99_ms=_short(median(run.p99_ms for run in by_name[name])),
                times_obvious=_ratio(speed[name], speed.get(OBVIOUS.name)),
                of_acknowledge_only=_ratio(speed[name], speed.get(ACKNOWLEDGE_ONLY.name)),
                not_2xx=sum(run.refused + run.broken for run in by_name[name]),
            )
            for name in speed
        ]
    return rows


def _ratio(speed: float, other: float | None) -> float | None:
    return _short(speed / other) if other else None


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _table(rows: list[Row], events: int) -> Table:
    table = Table(title=f"{events} event{'s' * (events > 1)} per POST", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("contender", "events/s", "p50 ms", "p99 ms", "x obvious", "of limit", "non-2xx"):
        table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    for row in rows:
        if row.events_per_post == events:
            name, *numbers = astuple(row)[1:]
            table.add_row(name, *("-" if number is None else f"{number:,g}" for number in numbers))
    return table


def main() -> int:
    """Run all contenders in alternating rounds; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.intake", description=__doc__)
    parser.add_argument("--seconds", type=int, default=6, help="length of one run (default 6)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender and batch size (default 2)")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    parser.add_argument("--only", action="append", choices=[one.name for one in ALL], help="may be repeated")
    options = parser.parse_args()
    contenders = [one for one in ALL if not options.only or one.name in options.only]
    plan = [(one, events) for _ in range(options.rounds) for events in BATCHES for one in contenders]
    errors = Console(stderr=True)
    runs: list[Run] = []
    try:
        wrk.program()
        for contender, events in track(plan, description="measuring", console=errors, transient=True):
            runs.append(measure(contender, events, options.seconds))
    except (wrk.WrkMissing, valkey.ValkeyUnavailable, ProcessEnded, TimeoutError) as error:
        errors.print(f"no result: {error}", markup=False)
        return 1
    rows = summary(runs)
    if options.json:
        lines = [asdict(run) for run in runs] + [asdict(row) for row in rows]
        sys.stdout.write("".join(json.dumps(line) + "\n" for line in lines))
    else:
        for events in BATCHES:
            Console().print(_table(rows, events))
    faults = [f"{run.contender}, {run.events_per_post} per POST: {run.fault}" for run in runs if run.fault]
    for fault in faults:
        errors.print(f"invalid: {fault}", markup=False)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
