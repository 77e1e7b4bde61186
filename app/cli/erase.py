"""The command for whoever asks to be erased: all that is held of an order goes, save what keeps it from coming back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Final

import msgspec
import typer

from app import times
from app.cli import console, context
from app.cli.console import AWAY, DONE, FOUND, INTERRUPTED, Stop
from app.cli.context import CommandContext, open_context
from app.erasure import Copies, Traces
from app.ids import OrderKey
from app.intake.spool import Swept, erase_rows

CODES: Final = {
    DONE: "erased",
    FOUND: "not found, or something is left, which is named",
    AWAY: "Redis unavailable: run it again",
    INTERRUPTED: "interrupted: run it again",
}

_LONGEST_ADDRESS: Final = 320

Named = Annotated[list[str] | None, typer.Argument(metavar="[ORDER]...", help="orderIds or references.")]
Email = Annotated[
    str | None,
    typer.Option("--email", metavar="ADDRESS", help="All orders of this guest; - reads the address from stdin."),
]
Why = Annotated[str, typer.Option("--why", help="For the audit; one line, without a word of the guest.")]
Who = Annotated[str | None, typer.Option("--who", help="For the audit, instead of user@host.")]


class Erased(msgspec.Struct, frozen=True, kw_only=True):
    """One order. `erased`: when it first was, None if it is not yet. `copies`: what sinks have, or may have."""

    company: str
    company_id: str
    order_id: str
    erased: datetime | None
    copies: tuple[Copies, ...]


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """What went of `orders`: stored events, rows of spools, texts of replays; `left`: what did not."""

    orders: int
    events: int
    spooled: int
    texts: int
    left: tuple[str, ...]

    def sentence(self) -> str:
        return (
            f"{console.many(self.orders, 'order')} erased, with {console.many(self.events, 'event')},"
            f" {console.many(self.spooled, 'spooled event')} and"
            f" {console.many(self.texts, 'text')} of replays."
        )


def erase(
    order: Named = None,
    email: Email = None,
    company: context.CompanyOption = None,
    why: Why = "",
    who: Who = None,
    dry_run: context.DryRun = False,
    yes: context.Yes = False,
    as_json: context.Json = False,
) -> None:
    """Erase orders for good: content, references, events and spooled events; their ids stay, for ORDER_DAYS.

    What stays makes sure that no event, replay or reconcile brings them back. What sinks hold is not ours: it is named.
    Run it again to finish an interrupted erase.
    """
    if bool(order) == (email is not None):
        raise Stop("Say which: ORDER..., or --email.")
    asks, reason = context.who_asks(who), context.printable(why, "--why")
    address = _address(email)
    with open_context(company) as here:
        company_id = here.company_id
        rest = here.erasure.unfinished()
        orders, missing = (
            (_of_guest(here, address, company_id), []) if address else _named(here, order or [], company_id)
        )
        if missing and not rest:
            raise missing[0]
        if not orders and not rest:
            raise Stop("No order of this guest is here.", FOUND)
        for one in missing:
            console.remark(f"{one} What an interrupted run has left is finished.")
        found = [one for one in map(here.erasure.traces, dict.fromkeys([*orders, *rest])) if one is not None]
        if here.audit_words.are_in(f"{asks} {reason}", [word for one in found for word in one.words]):
            raise Stop("--who and --why stay in the audit: name neither the guest nor the order there.")
        if not as_json or dry_run:
            _show(here, found, as_json)
        if dry_run:
            return
        console.confirm(f"Erase {console.many(len(found), 'order')} for good?", yes)
        left = _erase(here, found, asks, reason, as_json)
        if not left:
            here.erasure.finish([*orders, *rest])
    if left or missing:
        raise typer.Exit(FOUND)


def _address(email: str | None) -> str:
    """Return the guest's address, "" if none is asked for; no message repeats it."""
    if email is None:
        return ""
    text = (sys.stdin.readline() if email == "-" else email).strip()
    if "@" not in text or len(text) > _LONGEST_ADDRESS or not text.isprintable():
        raise Stop("This is no e-mail address.")
    if email != "-":
        console.remark("Other users of this machine can see what was typed: --email - reads it from stdin.")
    return text


def _named(here: CommandContext, texts: Sequence[str], company_id: str | None) -> tuple[list[OrderKey], list[Stop]]:
    """Return the orders that are named, and what says of others that they are not here.

    One that was erased half way has lost its references: that they name nothing must not keep it from being finished.
    """
    found: list[OrderKey] = []
    missing: list[Stop] = []
    for text in texts:
        try:
            found.append(here.order(text))
        except Stop as stop:
            if stop.code != FOUND:
                raise
            missing.append(stop)
    return found, missing


def _of_guest(here: CommandContext, address: str, company_id: str | None) -> list[OrderKey]:
    with console.progress("looking through orders") as step:
        return here.erasure.orders_of(address, company_id, step)


def _erase(here: CommandContext, found: Sequence[Traces], who: str, why: str, as_json: bool) -> bool:
    """Go through the steps; the first of each order blocks, and what follows can be done again. Return what is left."""
    # While it can still be told what they were called.
    texts = here.audit_words.forget([word for one in found for word in one.words])
    here.erasure.note([one.order for one in found if one.erased is None], who, why)
    erased = [_tombstone(here, one) for one in found]
    orders = [one.order for one in found]
    with console.progress("taking events out") as step:
        events = here.erasure.forget_events(found, step)
    spool = here.settings.spool_dir
    swept = erase_rows(spool, orders) if spool is not None else Swept(0, ())
    totals = Totals(orders=len(erased), events=events, spooled=swept.rows, texts=texts, left=swept.problems)
    if as_json:
        for one in erased:
            console.json_line(one)
    console.tell(totals.sentence(), totals, as_json)
    if not as_json:
        _name_copies(erased)
    for trouble in totals.left:
        console.remark(f"Left: {trouble}. Fix it, and run it again.")
    return bool(totals.left)


def _tombstone(here: CommandContext, traces: Traces) -> Erased:
    while True:
        at = here.erasure.erase(traces)
        # Now nothing more is handed on: what sinks have is what they have had until here.
        after = here.erasure.traces(traces.order)
        if after is None:
            raise Stop(f"Order {traces.order.order_id} is here no more.", FOUND)
        if at is not None:
            return _view(here, after)
        here.audit_words.forget(after.words)
        traces = after


def _show(here: CommandContext, found: Sequence[Traces], as_json: bool) -> None:
    if as_json:
        for one in found:
            console.json_line(_view(here, one))
        return
    columns = ("company", "=order", "erased", "content", "#events", "copies in sinks")
    console.table("What goes: content, references, events, spooled events", columns, (_row(here, one) for one in found))


def _row(here: CommandContext, traces: Traces) -> tuple[object, ...]:
    return (
        here.companies.slug(traces.order.company_id),
        traces.order.order_id,
        times.short(traces.erased),
        f"revision {traces.revision}" if traces.content else "none",
        len(here.events.of_order(traces.order)),
        ", ".join(one.sink for one in traces.copies),
    )


def _name_copies(erased: Sequence[Erased]) -> None:
    copies = [(one.sink, key) for order in erased for one in order.copies for key in one.keys_begin]
    if copies:
        console.table(
            "Not ours to erase: copies that sinks have, or may have", ("sink", "idempotency key begins with"), copies
        )


def _view(here: CommandContext, traces: Traces) -> Erased:
    return Erased(
        company=here.companies.slug(traces.order.company_id),
        company_id=traces.order.company_id,
        order_id=traces.order.order_id,
        erased=traces.erased,
        copies=traces.copies,
    )
