"""Kill everything in turn under load, then check every event: `uv run python -m tests.chaos`.

A sender publishes events and repeats each POST until it gets 200; meanwhile web, single workers, the whole pool and
Valkey are killed with SIGKILL, Valkey is frozen, and the Channel Manager fails now and then. The exit code is 0 only if
nothing was lost and every other target was met. The seed repeats the plan: events, kills, faults.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tests.chaos import plan as plans
from tests.chaos import table
from tests.chaos.run import LONG, SHORT, TRUE_BUDGET, run
from tests.service import service


def main() -> int:
    """Run once; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", action="store_const", dest="size", const=SHORT, help="the form that CI runs, a minute")
    size.add_argument(
        "--true-budget",
        action="store_const",
        dest="size",
        const=TRUE_BUDGET,
        help="5 requests at once and 6,000 in 5 minutes, as the Channel Manager allows",
    )
    parser.set_defaults(size=LONG)
    parser.add_argument("--events", type=int, help="different events (default 10,000)")
    parser.add_argument("--kills", type=int, help="SIGKILLs (default 60); a freeze for every six comes on top")
    parser.add_argument("--seconds", type=float, help="how long they are spread over (default 240)")
    parser.add_argument("--seed", type=int, help="repeats a plan (default: drawn, and printed)")
    options = parser.parse_args()
    given = {name: value for name in ("events", "kills", "seconds") if (value := getattr(options, name)) is not None}
    chosen = replace(options.size, **given)
    seed = random.randrange(2**32) if options.seed is None else options.seed
    out = Console(width=120, highlight=False)
    out.print(f"seed {seed}: {chosen}", markup=False)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with service(folder) as one:
        result = run(one, plans.draw(seed, chosen.events, chosen.kills, chosen.seconds), chosen)
    out.print(table.table(result))
    for line in [*table.targets(result), *table.faults(result)]:
        out.print(line, markup=False, soft_wrap=True)
    out.print(f"logs: {folder}", markup=False)
    return 0 if all(met for _, met in result.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
