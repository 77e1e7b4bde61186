"""The command that tells who changed something by hand: replays, requeues, drops, refetches, erasures."""

from __future__ import annotations

from datetime import datetime
from itertools import islice
from typing import Annotated, Literal

import msgspec
import typer

from app import times
from app.audit import AuditEntry, newest_first
from app.cli import console, context
from app.cli.console import epilog
from app.cli.context import open_context

Kind = Literal[
    "replay",
    "resume",
    "cancel",
    "refetch",
    "requeue",
    "drop",
    "reconcile",
    "order-confirm",
    "order-cancel",
    "erase",
]
What = Annotated[Kind | None, typer.Option("--what", help="Only these actions.")]


cli = console.commands()


@cli.command(epilog=epilog("ota-receiver audit --what replay --limit 10"))
def audit(what: What = None, limit: context.Limit = 50, as_json: context.Json = False) -> None:
    """Show who changed something by hand, when, what and why. Newest first, for EVENT_DAYS.

    Each change is written before it is made: an interrupted one is here too, with its number of orders.
    """
    with open_context() as here:
        entries = (one for one in newest_first(here.redis) if what in (None, one[1].what))
        found = list(islice(entries, limit))
    if not found:
        console.remark("The audit is empty.")
        return
    if as_json:
        for at, entry in found:
            console.json_line({"at": at} | msgspec.structs.asdict(entry))
        return
    columns = (f"when ({console.zone()})", "what", "#orders", "of", "plan", "who", "why")
    console.table("", columns, (_row(at, entry) for at, entry in found))


def _row(at: datetime, entry: AuditEntry) -> tuple[object, ...]:
    return (times.short(at), entry.what, f"{entry.orders:,}", entry.selected, entry.plan, entry.who, entry.why)
