"""The command for the audit: who changed something by hand, when, what and why."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Literal

import msgspec
import typer

from app.audit import newest_first
from app.cli import console, context
from app.cli.command import command, commands
from app.cli.context import open_context

Kind = Literal[
    "replay", "resume", "cancel", "refetch", "requeue", "drop", "reconcile", "order-confirm", "order-cancel", "erase"
]
What = Annotated[Kind | None, typer.Option("--what", help="Only these actions.")]

cli = commands()


@command(cli, "ota-receiver audit --what replay --limit 10")
def audit(what: What = None, limit: context.Limit = 50) -> None:
    """Show who changed something by hand, when, what and why. Newest first, for EVENT_DAYS.

    Each change is noted before it is made, so an interrupted one is listed with all its orders.
    """
    with open_context() as here:
        entries = (one for one in newest_first(here.redis) if what in (None, one[1].what))
        found = list(islice(entries, limit))
    if not found:
        console.remark("The audit is empty.")
    columns = (("@when", "at"), "what", "#orders", "selected", "plan", "who", "why")
    console.listing(found, columns, lambda one: {"at": one[0]} | msgspec.structs.asdict(one[1]))
