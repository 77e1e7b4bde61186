"""Kill everything in turn under load, then check every event: `uv run python -m tests.chaos`.

A sender publishes events and repeats each POST until it gets 200; meanwhile web, single workers, the whole pool and
Valkey are killed with SIGKILL, Valkey is frozen, and the Channel Manager and the destinations of two sinks fail. The
exit code is 0 only if nothing was lost and every other target was met. The seed repeats the plan of events and kills.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tests.chaos.run import LONG, SHORT, TRUE_BUDGET, run
from tests.service import service


def main() -> int:
    """Run once; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    budget = "5 requests at once and 6,000 in 5 minutes, as the Channel Manager allows"
    forms = {"--short": (SHORT, "the form that CI runs, a minute"), "--true-budget": (TRUE_BUDGET, budget)}
    for name, (form, text) in forms.items():
        size.add_argument(name, action="store_const", dest="size", const=form, help=text)
    parser.set_defaults(size=LONG)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="repeats a plan (default: drawn)")
    options = parser.parse_args()
    out = Console(highlight=False, markup=False, soft_wrap=True)
    out.print(f"seed {options.seed}: {options.size}")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with service(folder) as one:
        result = run(one, options.size.plan(options.seed), options.size)
    out.print(f"{result}\nlogs: {folder}")
    return 0 if all(result.targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
