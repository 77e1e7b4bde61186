"""The command that tells who changed something by hand: replays, requeues, drops, refetches, erasures."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Literal

import msgspec
import typer

from app.cli import moment, options, output
from app.cli.exits import epilog
from app.cli.session import session
from app.store.audit import Noted

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


def audit(what: What = None, limit: options.Limit = 50, as_json: options.Json = False) -> None:
    """Tell who changed something by hand, when, what and why; newest first, for EVENT_DAYS.

    It is noted before it is done: what was interrupted stands here too, with the number of orders that it was about.
    """
    with session() as here:
        noted = (one for one in here.books.audit.newest_first() if what in (None, one.deed.what))
        found = list(islice(noted, limit))
    if not found:
        output.remark("Nothing is noted.")
        return
    if as_json:
        for one in found:
            output.json_line({"at": one.at} | msgspec.structs.asdict(one.deed))
        return
    columns = (f"when ({output.zone()})", "what", "#orders", "of", "plan", "who", "why")
    output.table("", columns, map(_row, found))


def _row(noted: Noted) -> tuple[object, ...]:
    deed = noted.deed
    return (moment.short(noted.at), deed.what, f"{deed.orders:,}", deed.selected, deed.plan, deed.who, deed.why)
