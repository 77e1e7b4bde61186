"""`orders erase`: everything stored about an order goes, except what keeps it from coming back."""

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
from app.erasure import Copies, Traces, are_in
from app.ids import OrderKey
from app.intake.spool import Swept, erase_rows

CODES: Final = {
    DONE: "erased",
    FOUND: "not found, or something is left, which is named",
    AWAY: "Redis unavailable: run it again",
    INTERRUPTED: "interrupted: run it again",
}

_LONGEST_ADDRESS: Final = 320

Email = Annotated[
    str | None,
    typer.Option("--email", metavar="ADDRESS", help="All orders of this guest; - reads the address from stdin."),
]


class Erased(msgspec.Struct, frozen=True, kw_only=True):
    """One order. `erased`: when it was first erased, None if not yet. `copies`: what sinks have, or may have."""

    company: str
    company_id: str
    order_id: str
    erased: datetime | None
    copies: tuple[Copies, ...]


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """What was erased of `orders`: stored events, rows of the spool, texts of replays; `left`: what was not."""

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
    order: context.Orders = None,
    email: Email = None,
    company: context.CompanyOption = None,
    why: context.Why = "",
    who: context.Who = "",
    dry_run: context.DryRun = False,
    yes: context.Yes = False,
    as_json: context.Json = False,
) -> None:
    """Erase orders for good: content, references, events and spooled events. Their ids stay, for ORDER_DAYS.

    What stays makes sure that no event, replay or reconcile brings them back. Copies in sinks are listed: you must
    handle them. --who and --why stay in the audit and must not name the guest. Run it again to finish an interrupted
    erase.
    """
    if bool(order) == (email is not None):
        raise Stop("Choose either ORDER... or --email.")
    address = _address(email)
    with open_context(company) as here:
        rest = here.erasure.unfinished()
        missing: list[Stop] = []
        if address:
            with console.progress("searching orders") as step:
                orders = here.erasure.orders_of(address, here.company_id, step)
        else:
            orders, missing = _named(here, order or [])
        if missing and not rest:
            raise missing[0]
        if not orders and not rest:
            raise Stop("No order of this guest found.", FOUND)
        for one in missing:
            console.remark(f"{one} An interrupted erase is finished.")
        found = [one for one in map(here.erasure.traces, dict.fromkeys([*orders, *rest])) if one is not None]
        if are_in(f"{who} {why}", [word for one in found for word in one.words]):
            raise Stop("--who and --why stay in the audit: they must name neither the guest nor the order.")
        if not as_json or dry_run:
            _show(here, found, as_json)
        if dry_run:
            return
        console.confirm(f"Erase {console.many(len(found), 'order')} for good?", yes)
        left = _erase(here, found, who, why, as_json)
        if not left:
            here.erasure.finish([*orders, *rest])
    if left or missing:
        raise typer.Exit(FOUND)


def _address(email: str | None) -> str:
    """Return the guest's address, "" if there is no --email; no message repeats it."""
    if email is None:
        return ""
    text = (sys.stdin.readline() if email == "-" else email).strip()
    if "@" not in text or len(text) > _LONGEST_ADDRESS or not text.isprintable():
        raise Stop("This is not an e-mail address.")
    if email != "-":
        console.remark("Other users of this machine can see the address: --email - reads it from stdin.")
    return text


def _named(here: CommandContext, texts: Sequence[str]) -> tuple[list[OrderKey], list[Stop]]:
    """Return the orders that were named, and an error for each that was not found.

    An order whose erase was interrupted has lost its references. That they are not found must not stop its erase.
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


def _erase(here: CommandContext, found: Sequence[Traces], who: str, why: str, as_json: bool) -> bool:
    """Erase step by step; the first blocks each order, and all may be repeated. Return whether something is left."""
    # First, while the names of the orders are still known.
    texts = here.erasure.forget_texts([word for one in found for word in one.words])
    here.erasure.note([one.order for one in found if one.erased is None], who, why)
    erased = [_tombstone(here, one) for one in found]
    with console.progress("erasing events") as step:
        events = here.erasure.forget_events(found, step)
    spool = here.settings.spool_dir
    swept = erase_rows(spool, [one.order for one in found]) if spool is not None else Swept(0, ())
    totals = Totals(orders=len(erased), events=events, spooled=swept.rows, texts=texts, left=swept.problems)
    if as_json:
        for one in erased:
            console.json_line(one)
    console.result(totals.sentence(), totals, as_json)
    copies = [(copy.sink, key) for one in erased for copy in one.copies for key in copy.keys_begin]
    if copies and not as_json:
        columns = ("sink", "idempotency key begins with")
        console.table("Not erased, you must handle: copies that sinks have, or may have", columns, copies)
    for trouble in totals.left:
        console.remark(f"Left: {trouble}. Fix it, and run it again.")
    return bool(totals.left)


def _tombstone(here: CommandContext, traces: Traces) -> Erased:
    while True:
        at = here.erasure.erase(traces)
        # From here on nothing is delivered, so the copies of the sinks are complete.
        after = here.erasure.traces(traces.order)
        if after is None:
            raise Stop(f"Order {traces.order.order_id} no longer exists.", FOUND)
        if at is not None:
            return _view(here, after)
        here.erasure.forget_texts(after.words)
        traces = after


def _show(here: CommandContext, found: Sequence[Traces], as_json: bool) -> None:
    def row(traces: Traces) -> tuple[object, ...]:
        return (
            here.companies.slug(traces.order.company_id),
            traces.order.order_id,
            times.short(traces.erased),
            f"revision {traces.revision}" if traces.content else "none",
            len(here.events.of_order(traces.order)),
            ", ".join(one.sink for one in traces.copies),
        )

    console.listing(
        found,
        as_json,
        columns=("company", "=order", "erased", "content", "#events", "copies in sinks"),
        row=row,
        view=lambda traces: _view(here, traces),
        title="To be erased: content, references, events, spooled events",
    )


def _view(here: CommandContext, traces: Traces) -> Erased:
    key = traces.order
    slug = here.companies.slug(key.company_id)
    return Erased(
        company=slug, company_id=key.company_id, order_id=key.order_id, erased=traces.erased, copies=traces.copies
    )
