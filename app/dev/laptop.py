"""`ota-receiver dev`: everything keeps running, a few orders are there, and the terminal says where to look."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from app.dev import stack as stacks
from app.dev.demo import drive, print_curl

_LOOK = 0.2
_GUIDE = """
  webhook     {webhook}
  ready?      {web}/readyz
  sandbox     {sandbox}/_sandbox/settings   (faults, stats, orders: see app/dev/sandbox/__init__.py)
  logs        tail -F {folder}/web.log {folder}/worker.log
  settings    set -a; . {folder}/env; set +a
              then: uv run ota-receiver orders list · events list · check

Ctrl-C stops everything; what was received is kept in {folder}.
"""


def run(console: Console, folder: Path, port: int, sinks: str) -> None:
    """Keep all parts running until KeyboardInterrupt, or until one of them ends."""
    with stacks.start(folder, port=port, valkey_dir=folder / "valkey", sinks=sinks) as stack:
        environment = folder / "env"
        environment.touch(mode=0o600)
        environment.write_text("".join(f"{name}='{value}'\n" for name, value in stack.variables.items()))
        with Progress(console=console, transient=True) as progress:
            orders = drive(stack, progress)
        guide = _GUIDE.format(webhook=stack.webhook_url, web=stack.web_url, sandbox=stack.sandbox.url, folder=folder)
        console.print(guide, markup=False, highlight=False, soft_wrap=True)
        last = orders[-1]
        console.print("An event by hand; sent a second time, it is a duplicate:\n")
        reference = last.order.buy_from_order_reference if last.order else None
        print_curl(console, stack, last.order_id, reference or "", last.expected)
        while True:
            time.sleep(_LOOK)
            for name, process in (("web", stack.web), ("worker", stack.worker)):
                if process.exit_code is not None:
                    console.print(f"{name} ended with {process.exit_code}: see {folder}/{name}.log")
                    return
