"""The command that tells who changed something by hand: replays, requeues, drops, refetches, erasures."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Literal

import msgspec
import typer

from app import times
from app.audit import Noted
from app.cli import console, context
from app.cli.console import epilog
from app.cli.context import session

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
What = Annotated[Kind | None, typer.Option("--what", help="Only these deeds.")]


def register(cli: typer.Typer) -> None:
    cli.command(epilog=epilog("ota-receiver audit --what replay --limit 10"))(audit)


def audit(what: What = None, limit: context.Limit = 50, as_json: context.Json = False) -> None:
    """Tell who changed something by hand, when, what and why; newest first, for EVENT_DAYS.

    It is noted before it is done: what was interrupted stands here too, with the number of orders that it was about.
    """
    with session() as here:
        noted = (one for one in here.books.audit.newest_first() if what in (None, one.deed.what))
        found = list(islice(noted, limit))
    if not found:
        console.remark("Nothing is noted.")
        return
    if as_json:
        for one in found:
            console.json_line({"at": one.at} | msgspec.structs.asdict(one.deed))
        return
    columns = (f"when ({console.zone()})", "what", "#orders", "of", "plan", "who", "why")
    console.table("", columns, map(_row, found))


def _row(noted: Noted) -> tuple[object, ...]:
    deed = noted.deed
    return (times.short(noted.at), deed.what, f"{deed.orders:,}", deed.selected, deed.plan, deed.who, deed.why)
