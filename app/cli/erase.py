"""`orders erase`: everything stored about an order goes, except what keeps it from coming back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Final

import typer

from app.cli import console
from app.cli.command import AWAY, DONE, FOUND, INTERRUPTED, Stop, flags
from app.cli.context import CommandContext, open_context
from app.erasure import Traces, are_in
from app.explain.words import many
from app.ids import beginning
from app.intake.spool_file import Swept, erase_rows

EXAMPLE: Final = "ota-receiver orders erase --email - < address.txt"
CODES: Final = {
    DONE: "erased",
    FOUND: "order not found, or something could not be erased",
    AWAY: "Redis unavailable: run it again",
    INTERRUPTED: "interrupted: run it again",
}

_LONGEST_ADDRESS: Final = 320


def erase(
    order: Annotated[list[str] | None, typer.Argument(metavar="[ORDER]...", help="orderIds or references.")] = None,
    email: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="All orders of this guest; - reads the address from stdin.")
    ] = None,
) -> None:
    """Erase orders for good, with their content, references and events.

    Their ids stay for ORDER_DAYS, so that no event, replay or reconcile brings the orders back. Copies in sinks are
    listed: you must handle them. --who and --why stay in the audit and must not name the guest. Run it again to finish
    an interrupted erase.
    """
    if bool(order) == (email is not None):
        raise Stop("Choose either ORDER... or --email.")
    address = _address(email)
    with open_context() as here:
        rest = here.erasure.unfinished()
        named = {text: here.only_whole(text) for text in order or []}
        missing = [here.not_found(text) for text, key in named.items() if key is None]
        orders = [key for key in named.values() if key is not None]
        if address:
            with console.progress("searching orders") as step:
                orders = here.erasure.orders_of(address, here.company_id, step)
        if missing and not rest:
            whole = " To erase an order its whole id is needed." if any(map(beginning, order or [])) else ""
            raise Stop(f"{missing[0]}{whole}", FOUND)
        if not orders and not rest:
            raise Stop("No order of this guest found.", FOUND)
        # An order whose erase was interrupted has lost its references: that it is not found must not stop its erase.
        for one in missing:
            console.remark(f"{one} An interrupted erase is finished.")
        found = [one for one in map(here.erasure.traces, dict.fromkeys([*orders, *rest])) if one is not None]
        given = flags()
        if are_in(f"{given.who} {given.why}", [word for one in found for word in one.words]):
            raise Stop("--who and --why stay in the audit: they must name neither the guest nor the order.")
        if given.dry_run or not given.as_json:
            _show(here, found)
        if given.dry_run:
            return
        console.confirm(f"Erase {many(len(found), 'order')} for good?")
        left = _erase(here, found)
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


def _erase(here: CommandContext, found: Sequence[Traces]) -> bool:
    """Erase step by step; the first blocks each order, and all may be repeated. Return whether something is left."""
    # Before anything is erased: Redis may lose its data at any time.
    here.erasure.remember([one.order for one in found])
    # While the names of the orders are still known.
    texts = here.erasure.forget_texts([word for one in found for word in one.words])
    here.erasure.note([one.order for one in found if one.erased is None], flags().who, flags().why)
    erased = [_tombstone(here, one) for one in found]
    with console.progress("erasing references") as step:
        here.erasure.forget_references([one.order for one in found], step)
    with console.progress("erasing events") as step:
        events = here.erasure.forget_events(found, step)
    spool = here.settings.spool_dir
    swept = erase_rows(spool, [one.order for one in found]) if spool is not None else Swept(0, ())
    if flags().as_json:
        for one in erased:
            console.json_line(_view(here, one))
    totals = {"orders": len(erased), "events": events, "spooled": swept.rows, "texts": texts, "left": swept.problems}
    counts = f"{many(events, 'event')}, {many(swept.rows, 'spooled event')}"
    texts_of = f"{many(texts, 'text')} of the audit and of replays"
    console.result(f"{many(len(erased), 'order')} erased, with {counts} and {texts_of}.", totals)
    copies = [(copy.sink, key) for one in erased for copy in one.copies for key in copy.keys_begin]
    if copies:
        columns = ("sink", ">idempotency key begins with")
        console.table("Not erased, you must handle: copies that sinks have, or may have", columns, copies)
    if here.settings.erased_file is None:
        console.remark("ERASED_FILE is not set: if Redis loses its data, these orders are fetched again.")
    for trouble in swept.problems:
        console.remark(f"Not erased: {trouble}. Fix it, and run the command again.")
    return bool(swept.problems)


def _tombstone(here: CommandContext, traces: Traces) -> Traces:
    """Erase the order, and return what is left of it."""
    while True:
        at = here.erasure.erase(traces)
        # From here on nothing is delivered, so the copies of the sinks are complete.
        after = here.erasure.traces(traces.order)
        if after is None:
            raise Stop(f"Order {traces.order.order_id} no longer exists.", FOUND)
        if at is not None:
            return after
        here.erasure.forget_texts(after.words)
        traces = after


def _show(here: CommandContext, found: Sequence[Traces]) -> None:
    def content(traces: Traces) -> str:
        return f"revision {traces.revision}" if traces.revision and traces.erased is None else "none"

    columns = (
        *here.company_column([traces.order for traces in found]),
        ("=order", "order_id"),
        "erased",
        ("content", content),
        ("#events", lambda traces: len(here.events.of_order(traces.order))),
        (">copies in sinks", lambda traces: tuple(one.sink for one in traces.copies)),
    )
    title = "To be erased: content, references, events, spooled events"
    console.listing(found, columns, partial(_view, here), title=title)


def _view(here: CommandContext, traces: Traces) -> dict[str, object]:
    """Return an order for machines. `erased`: when it was first erased. `copies`: what sinks have, or may have."""
    company = {"company": here.slug(traces.order.company_id)}
    return company | traces.order._asdict() | {"erased": traces.erased, "copies": traces.copies}
