"""What a command notes in the audit before it changes something: who, when, what, of how many orders."""

from __future__ import annotations

from collections.abc import Sequence

from app import bootstrap
from app.cli import output, replay_feed
from app.cli.session import Session
from app.store.audit import LONGEST_TEXT, Deed
from app.store.keys import OrderKey


def note(here: Session, what: str, selected: str, orders: int) -> None:
    """Note a deed, before it is done: one that dies half way is in the audit all the same."""
    who = replay_feed.who_asks(None)
    deed = Deed(what=what, plan="", who=who, why="", selected=selected[:LONGEST_TEXT], orders=orders)
    here.books.audit.add(deed, bootstrap.clock())


def about(orders: Sequence[OrderKey]) -> str:
    """Return what orders were named, by ids alone: the one, or how many."""
    return orders[0].member if len(orders) == 1 else output.many(len(orders), "order")
