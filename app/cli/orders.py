"""The commands for orders: list, show, refetch; explain, confirm, cancel and erase have files of their own.

The commands that change an order upstream: confirm, cancel. No event tells of either, so its fetch is owed here.

Killed between the call and that, nothing is lost: the same command again does no harm, and reconcile finds the change.

Asking for fetches of many orders: in chunks, with a bar, and with a count of what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import islice
from typing import Annotated, Final, Literal

import msgspec
import typer

from app import bootstrap, times
from app.cli import console, context, erase
from app.cli.console import AWAY, DONE, FOUND, Stop, epilog
from app.cli.context import CommandContext, advice, open_context, reason
from app.cli.order_view import asset_rows, view_of
from app.errors import (
    BrokenRecord,
    ConnectionFault,
    OrderNotFound,
    RequestRejected,
    StoreUnavailable,
    Throttled,
    UpstreamError,
)
from app.ids import OrderKey
from app.ledger.history import as_object
from app.ledger.orders import OrderQuery
from app.ledger.record import OrderRecord, State
from app.ledger.redis import translated_errors
from app.settings import Company
from app.upstream.client import ChannelManager, Fetched

_CHANGE_CODES: Final = {
    DONE: "done, and its fetch is queued",
    FOUND: "refused by the Channel Manager, or order not found",
    AWAY: "no answer from the Channel Manager or Redis: it may have been done",
}
_LONGEST_REFERENCE: Final = 50

Order = context.Order


class Changed(msgspec.Struct, frozen=True):
    """What came of it; `status` is what the Channel Manager answered, `queued` whether a job is new."""

    company: str
    order_id: str
    status: str
    queued: bool


def _reference(text: str) -> str:
    found = text.strip()
    if not 0 < len(found) <= _LONGEST_REFERENCE or not found.isprintable():
        raise typer.BadParameter(f"is not 1 to {_LONGEST_REFERENCE} printable characters")
    return found


def confirm(
    order: Order,
    payment_reference: Annotated[
        str, typer.Option("--payment-reference", parser=_reference, metavar="REF", help="How it was paid.")
    ],
    company: context.CompanyOption = None,
    yes: context.Yes = False,
    who: context.Who = None,
    why: context.Why = "",
    as_json: context.Json = False,
) -> None:
    """Confirm a Draft order as paid (confirmOrder), and fetch it: then its tickets and its manifest come home.

    Confirming an Issued order again changes nothing.
    """
    _change(
        order,
        company,
        "confirm",
        "Confirm the order as paid",
        lambda upstream, order_id: upstream.confirm_order(order_id, payment_reference),
        yes=yes,
        who=who,
        why=why,
        as_json=as_json,
    )


def cancel(
    order: Order,
    company: context.CompanyOption = None,
    yes: context.Yes = False,
    who: context.Who = None,
    why: context.Why = "",
    as_json: context.Json = False,
) -> None:
    """Cancel an order (deleteOrder), and fetch it. A Draft or Error order vanishes upstream; an Issued one stays.

    This cannot be undone.
    """
    _change(
        order,
        company,
        "cancel",
        "Cancel the order, for good",
        lambda upstream, order_id: upstream.delete_order(order_id),
        yes=yes,
        who=who,
        why=why,
        as_json=as_json,
    )


def _change(
    text: str,
    company: str | None,
    what: str,
    question: str,
    call: Callable[[ChannelManager, str], Fetched],
    *,
    yes: bool,
    who: str | None,
    why: str,
    as_json: bool,
) -> None:
    with open_context(company) as here:
        key = here.order(text)
        record = here.orders.record(key)
        venue = next((one for one in here.settings.companies if one.np_company_id == key.company_id), None)
        if venue is None:
            raise Stop(f"The settings name no company {key.company_id}: its order cannot be changed from here.")
        console.confirm(f"{question}: {_described(venue, key, record)}?", yes)
        here.note(f"order-{what}", key.member, 1, who, why)
        try:
            with bootstrap.http(here.settings) as client:
                status = call(bootstrap.channel_manager(here.settings, venue, client), key.order_id).order.status
        except (ConnectionFault, Throttled) as error:
            raise Stop(f"{_sentence(venue, error)} Nothing was changed.", AWAY) from None
        except (RequestRejected, OrderNotFound) as error:
            # What we hold of it may be old: the fetch shows what it is now.
            _owe(here, key, f"{what}-refused", "Upstream refused it")
            raise Stop(f"{_refusal(venue, error, what)} It is fetched anew: {_look(key)}", FOUND) from None
        except UpstreamError as error:
            _owe(here, key, f"{what}-unsure", "It may have been done upstream")
            raise Stop(f"{_sentence(venue, error)} It may have been done all the same: {_look(key)}", AWAY) from None
        except KeyboardInterrupt:
            _owe(here, key, f"{what}-unsure", "It may have been done upstream")
            console.remark(f"Interrupted; it may have been done upstream, and is fetched to see: {_look(key)}")
            raise
        changed = Changed(venue.slug, key.order_id, status, _owe(here, key, what, "It was done upstream"))
        erased = record is not None and record.erased_at
        follows = "It was erased here, and is not fetched." if erased else f"Its fetch is queued: {_look(key)}"
        console.tell(f"Done: upstream says {status}. {follows}", changed, as_json)


def _owe(here: CommandContext, key: OrderKey, why: str, what: str) -> bool:
    """Owe the fetch; raises Stop, which says `what` was done upstream, where Redis cannot take it."""
    try:
        with translated_errors(here.settings.redis_url.get_secret_value()):
            return here.ledger.request_fetch([key], queue="live", reason=why) == 1
    except StoreUnavailable as away:
        again = f"ota-receiver orders refetch {key.order_id}"
        raise Stop(f"{what}, and its fetch could not be queued. {away}. Then: {again}", AWAY) from None


def _described(venue: Company, key: OrderKey, record: OrderRecord | None) -> str:
    known = record.known_status if record is not None else "unknown"
    wallets = f", {console.many(record.wallets, 'wallet')}" if record is not None and record.wallets else ""
    return f"{key.order_id} of {venue.slug}, {known} as far as we know{wallets}"


def _refusal(venue: Company, error: UpstreamError, why: str) -> str:
    if isinstance(error, OrderNotFound):
        return f"{venue.slug}: upstream has no such order (HTTP 404): a Draft or Error order that was deleted is gone."
    allowed = "only a Draft order can be confirmed" if why == "confirm" else "not while it is being processed"
    return f"{venue.slug}: refused, {reason(error)}: {allowed}."


def _sentence(venue: Company, error: UpstreamError) -> str:
    return f"{venue.slug}: {reason(error)}. {advice(error.reason, context.API_PERMISSIONS)}"


def _look(key: OrderKey) -> str:
    return f"ota-receiver orders explain {key.order_id}"


CHUNK: Final = 200
"""Orders one call of want.lua takes: Redis serves others in between."""


class Asked(msgspec.Struct, frozen=True):
    """What came of it: of `orders`, so many have a new job, so many had one waiting already; erased ones have none."""

    orders: int
    queued: int
    waiting: int
    erased: int = 0

    def sentence(self) -> str:
        erased = f", {self.erased:,} erased and not fetched any more" if self.erased else ""
        return (
            f"{console.many(self.orders, 'order')}: {self.queued:,} queued, {self.waiting:,} waiting already{erased}."
        )


def ask_for(
    here: CommandContext,
    orders: Sequence[OrderKey],
    *,
    queue: Literal["live", "backfill"],
    what: str,
    who: str | None,
    why: str,
) -> Asked:
    """Owe the orders a fetch, in the order given, and note who asks and why; interrupted, it is done so far."""
    here.note(what, context.about(orders), len(orders), who, why)
    if queue == "backfill" and here.settings.backfill_workers == 0:
        console.remark("BACKFILL_WORKERS is 0 here: unless another machine has one, these orders will wait.")
    erased = here.erasure.erased_among(orders)
    queued = 0
    left = (order for order in orders if order not in erased)
    with console.progress("asking for fetches", len(orders) - len(erased)) as step:
        while chunk := list(islice(left, CHUNK)):
            queued += here.ledger.request_fetch(chunk, queue=queue, reason=what)
            step(len(chunk))
    return Asked(len(orders), queued, len(orders) - len(erased) - queued, len(erased))


cli = console.commands(name="orders", help="Orders: fetched, pending and failed.")

_EXPLAIN_CODES: Final = {
    DONE: "complete: fetched, and every sink has it (or deleted upstream)",
    FOUND: "not complete, or order not found",
}
_NOT_FOUND: Final = (
    "Order {text!r} not found: no event for it was accepted, or ORDER_DAYS have passed.",
    "It may not be settled yet: an event arrives about a minute after createOrder. Then wait.",
    (
        "Its event may be lost, or may have been refused for its secret. The Channel Manager's list of orders shows it"
        " (this needs NP_PARTNER_ID): ota-receiver reconcile --from-zero --apply"
    ),
    "If no events arrive at all, check the subscription: ota-receiver check",
    "References of orders never fetched are searched among the newest orders only: give the orderId.",
)

cli.command(epilog=epilog("ota-receiver orders confirm CM-4711 --payment-reference PAY-1", codes=_CHANGE_CODES))(
    confirm
)
cli.command(epilog=epilog("ota-receiver orders cancel CM-4711", codes=_CHANGE_CODES))(cancel)
cli.command(epilog=epilog("ota-receiver orders erase --email - < address.txt", codes=erase.CODES))(erase.erase)


@cli.command(epilog=epilog("ota-receiver orders explain CM-4711", codes=_EXPLAIN_CODES))
def explain(order: Order, company: context.CompanyOption = None, as_json: context.Json = False) -> None:
    """Explain where an order is: its history, what is pending, the next attempt, what to do."""
    with open_context(company) as here:
        try:
            view = view_of(here, here.order(order))
        except Stop as stop:
            if stop.code != FOUND:
                raise
            view = None
        if view is None:
            _tell_not_found(order, as_json)
            raise typer.Exit(FOUND)
        console.tell_lines(view.lines(), view.as_object(), as_json)
    if not view.complete:
        raise typer.Exit(FOUND)


def _tell_not_found(text: str, as_json: bool) -> None:
    sentences = [line.format(text=text) for line in _NOT_FOUND]
    if as_json:
        console.json_line({"order": text, "state": "unknown", "complete": False, "next": " ".join(sentences)})
        return
    for sentence in sentences:
        for line in console.wrapped(sentence):
            console.remark(line)


@cli.command("list", epilog=epilog("ota-receiver orders list --state deferred --since 6h"))
def list_(
    state: Annotated[State | None, typer.Option(help="Where the order stands.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="The same as --state dead.")] = False,
    status: context.Status = None,
    company: context.CompanyOption = None,
    since: context.Since = None,
    until: context.Until = None,
    limit: context.Limit = 50,
    as_json: context.Json = False,
) -> None:
    """List orders, the one that changed last first; --since and --until mean the last change."""
    if dead and state not in (None, "dead"):
        raise Stop(f"--dead and --state {state} exclude each other.")
    with open_context(company) as here:
        now = times.now()
        query = OrderQuery(
            company_id=here.company_id,
            status=status,
            state="dead" if dead else state,
            since=since,
            until=until,
        )
        found = list(islice(here.orders.newest_first(query, now, _remark), limit))
        if as_json:
            for record in found:
                console.json_line(_view(here, record, record.state(now)))
        elif found:
            columns = (
                *(f"changed ({console.zone()})", "?company", "=order", "state", "status"),
                *("#wallets", "#tickets", "#coupons", "?reference", "error"),
            )
            console.table("", columns, (_row(here, record, now) for record in found))
    if not found:
        raise Stop("No order matches.", FOUND)


@cli.command(epilog=epilog("ota-receiver orders show CM-4711 --reveal"))
def show(
    order: Order,
    company: context.CompanyOption = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Show names, ticket and coupon numbers, and links.")] = False,
    as_json: context.Json = False,
) -> None:
    """Show one order: where it stands, what to do next, its wallets with tickets and coupons, and its history."""
    with open_context(company) as here:
        key = here.order(order)
        view = view_of(here, key, reveal=reveal)
        if view is None:
            raise Stop(f"Order {key.order_id} no longer exists.", FOUND)
    if as_json:
        console.json_line(
            view.as_object() | {"order": view.order, "history": [as_object(entry) for entry in view.history]}
        )
        return
    for line in view.lines():
        console.say(line)
    if view.order is not None and view.order.manifest_url:
        console.say(f"manifest  {view.order.manifest_url}")
    if view.order is not None and view.order.wallets:
        headings = ("line", "visit", "wallet", "guest", "asset", "number", "item", "description")
        console.table("", headings, asset_rows(view.order.items))


@cli.command(epilog=epilog("ota-receiver orders refetch CM-4711 CM-4712"))
def refetch(
    named: Annotated[list[str], typer.Argument(metavar="ORDER...", help=context.ORDER)],
    company: context.CompanyOption = None,
    who: context.Who = None,
    why: context.Why = "",
    as_json: context.Json = False,
) -> None:
    """Fetch orders again now, in the live queue. Needed after confirmOrder, which sends no event."""
    with open_context(company) as here:
        found = list(dict.fromkeys(here.order(text) for text in named))
        asked = ask_for(here, found, queue="live", what="refetch", who=who, why=why)
        console.tell(asked.sentence(), asked, as_json)


def _remark(broken: BrokenRecord) -> None:
    console.remark(str(broken))


def _view(here: CommandContext, record: OrderRecord, state: State) -> dict[str, object]:
    return {"company": here.companies.slug(record.company_id), "state": state} | msgspec.structs.asdict(record)


def _row(here: CommandContext, record: OrderRecord, now: datetime) -> tuple[object, ...]:
    return (
        times.short(record.changed),
        here.companies.slug(record.company_id),
        record.order_id,
        record.state(now),
        record.known_status,
        record.wallets,
        record.tickets,
        record.coupons,
        record.reference,
        record.dead or record.error or ", ".join(sink.dead for sink in record.dead_sinks),
    )
