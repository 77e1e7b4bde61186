"""What a command notes in the audit before it changes something: who, when, what, of how many orders, and why."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Annotated

import typer

from app import bootstrap
from app.cli import output
from app.cli.exits import Stop
from app.cli.session import Session
from app.store.audit import LONGEST_TEXT, Deed
from app.store.keys import OrderKey

Why = Annotated[str, typer.Option("--why", help="For the audit; one line.")]
Who = Annotated[str | None, typer.Option("--who", help="For the audit, instead of user@host.")]


def note(here: Session, what: str, selected: str, orders: int, who: str | None, why: str) -> None:
    """Note a deed, before it is done: one that dies half way is in the audit all the same.

    Raises Stop for a `who` or `why` that is not one short line.
    """
    deed = Deed(
        what=what,
        plan="",
        who=who_asks(who),
        why=printable(why, "--why"),
        selected=selected[:LONGEST_TEXT],
        orders=orders,
    )
    here.books.audit.add(deed, bootstrap.clock())


def about(orders: Sequence[OrderKey]) -> str:
    """Return what orders were named, by ids alone: the one, or how many."""
    return orders[0].member if len(orders) == 1 else output.many(len(orders), "order")


def who_asks(given: str | None) -> str:
    """Return who is noted in the audit: as given, or the user and the machine."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or f"uid{os.getuid()}"
    return printable(given or f"{user}@{socket.gethostname()}", "--who")


def printable(text: str, option: str) -> str:
    """Return the text; raises Stop when it is too long, or would not print on one line."""
    if len(text) > LONGEST_TEXT or not text.isprintable():
        raise Stop(f"{option} is one line of at most {LONGEST_TEXT} printable characters.")
    return text
