"""The commands for orders: list, show, refetch; explain, confirm, cancel and erase have files of their own.

The commands that change an order upstream: confirm, cancel. No event tells of either, so its fetch is owed here.

Killed between the call and that, nothing is lost: the same command again does no harm, and reconcile finds the change.

Asking for fetches of many orders: in chunks, with a bar, and with a count of what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Annotated, Final, Literal

import msgspec
import typer

from app import bootstrap, times
from app.cli import console, context, erase
from app.cli.console import AWAY, FOUND, Stop, epilog
from app.cli.context import Session, advice, session, told
from app.cli.mask import masked
from app.cli.order_view import CODES, UNREADABLE, OrderPage, columns, explain, lacks, row, sinks
from app.errors import ConnectionFault, OrderNotFound, RequestRejected, Throttled, UnreadableAnswer, UpstreamError
from app.ids import OrderKey
from app.ledger.orders import BrokenRecord, OrderQuery, OrderRecord, State
from app.ledger.redis import StoreUnavailable, translated_errors
from app.settings import Company
from app.upstream.client import ChannelManager, Fetched

_CHANGE_CODES: Final = (
    "Exit codes: 0 done, and its fetch is queued · 1 the Channel Manager refuses it, or the order is not here · 2 usage"
    " or settings, or a question that nobody could answer · 3 the Channel Manager or Redis did not answer: it may have"
    " been done · 4 data of a newer version · 130 interrupted"
)
_PERMISSIONS: Final = "NPR API Channel Mgr"
_LONGEST_REFERENCE: Final = 50

Order = Annotated[
    str, typer.Argument(metavar="ORDER", help="orderId, or its buyFromOrderReference or sellToOrderReference.")
]


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
    with session() as here:
        key = here.order(text, here.companies.id_of(company))
        record = here.books.archive.record(key)
        venue = next((one for one in here.settings.companies if one.np_company_id == key.company_id), None)
        if venue is None:
            raise Stop(f"The settings name no company {key.company_id}: its order cannot be changed from here.")
        console.confirm(f"{question}: {_described(venue, key, record)}?", yes)
        context.note(here, f"order-{what}", key.member, 1, who, why)
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
        erased = record is not None and record.erased
        follows = "It was erased here, and is not fetched." if erased else f"Its fetch is queued: {_look(key)}"
        console.tell(f"Done: upstream says {status}. {follows}", changed, as_json)


def _owe(here: Session, key: OrderKey, why: str, what: str) -> bool:
    """Owe the fetch; raises Stop, which says `what` was done upstream, where Redis cannot take it."""
    try:
        with translated_errors(here.settings.redis_url.get_secret_value()):
            return here.books.ledger.want([key], bootstrap.clock(), queue="live", why=why) == 1
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
    return f"{venue.slug}: refused, {told(error)}: {allowed}."


def _sentence(venue: Company, error: UpstreamError) -> str:
    return f"{venue.slug}: {told(error)}. {advice(error.reason, _PERMISSIONS)}"


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
    here: Session,
    orders: Sequence[OrderKey],
    *,
    queue: Literal["live", "backfill"],
    what: str,
    who: str | None,
    why: str,
) -> Asked:
    """Owe the orders a fetch, in the order given, and note who asks and why; interrupted, it is done so far."""
    context.note(here, what, context.about(orders), len(orders), who, why)
    if queue == "backfill" and here.settings.backfill_workers == 0:
        console.remark("BACKFILL_WORKERS is 0 here: unless another machine has one, these orders will wait.")
    erased = here.books.erasure.erased_among(orders)
    queued = 0
    left = (order for order in orders if order not in erased)
    with console.progress("asking for fetches", len(orders) - len(erased)) as step:
        while chunk := list(islice(left, CHUNK)):
            queued += here.books.ledger.want(chunk, bootstrap.clock(), queue=queue, why=what)
            step(len(chunk))
    return Asked(len(orders), queued, len(orders) - len(erased) - queued, len(erased))


orders = typer.Typer(name="orders", no_args_is_help=True, help="What came home, and what is on its way.")

_NAMED = "orderId, or its buyFromOrderReference or sellToOrderReference."


def register(cli: typer.Typer) -> None:
    orders.command(epilog=epilog("ota-receiver orders explain CM-4711", codes=CODES))(explain)
    confirms = "ota-receiver orders confirm CM-4711 --payment-reference PAY-1"
    orders.command(epilog=epilog(confirms, codes=CODES))(confirm)
    orders.command(epilog=epilog("ota-receiver orders cancel CM-4711", codes=CODES))(cancel)
    erases = "ota-receiver orders erase --email - < address.txt"
    orders.command(epilog=epilog(erases, codes=erase.CODES))(erase.erase)
    cli.add_typer(orders)


@orders.command("list", epilog=epilog("ota-receiver orders list --state parked --since 6h"))
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
    with session() as here:
        now = times.now()
        query = OrderQuery(
            company_id=here.companies.id_of(company),
            status=status,
            state="dead" if dead else state,
            since=since,
            until=until,
        )
        found = list(islice(here.books.archive.newest_first(query, now, _remark), limit))
        if as_json:
            for record in found:
                console.json_line(_view(here, record, record.state(now)))
        elif found:
            rows = (row(record, here.companies.slug(record.company_id), now) for record in found)
            console.table("", columns(), rows)
    if not found:
        raise Stop("No order matches.", FOUND)


@orders.command(epilog=epilog("ota-receiver orders show CM-4711 --reveal"))
def show(
    order: Annotated[str, typer.Argument(metavar="ORDER", help=_NAMED)],
    company: context.CompanyOption = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Show names, ticket and coupon numbers, and links.")] = False,
    as_json: context.Json = False,
) -> None:
    """Show one order: where it stands, what to do next, its wallets with tickets and coupons, and its trail."""
    with session() as here:
        archive = here.books.archive
        key = here.order(order, here.companies.id_of(company))
        record = archive.record(key)
        if record is None:
            raise Stop(f"Order {key.order_id} is here no more.", FOUND)
        state, due = record.state(times.now()), archive.due(key)
        lacking = tuple(lacks(record, state, due, here.settings.sinks))
        try:
            fetched = archive.order(key)
        except UnreadableAnswer:
            fetched, lacking = None, (*lacking, UNREADABLE)
        if fetched is not None and not reveal:
            fetched = masked(fetched)
        page = OrderPage(
            slug=here.companies.slug(key.company_id),
            record=record,
            state=state,
            due=due,
            order=fetched,
            lacks=lacking,
            sinks=tuple(sinks(record, here.settings.sinks)) if record.revision else record.sinks,
            name=here.name(key),
            trail=archive.trail(key),
        )
    if as_json:
        console.json_line(page.as_object())
    else:
        page.print()


@orders.command(epilog=epilog("ota-receiver orders refetch CM-4711 CM-4712"))
def refetch(
    named: Annotated[list[str], typer.Argument(metavar="ORDER...", help=_NAMED)],
    company: context.CompanyOption = None,
    who: context.Who = None,
    why: context.Why = "",
    as_json: context.Json = False,
) -> None:
    """Fetch orders once more, now: among the live ones. Needed after confirmOrder, of which no event tells."""
    with session() as here:
        company_id = here.companies.id_of(company)
        found = list(dict.fromkeys(here.order(text, company_id) for text in named))
        asked = ask_for(here, found, queue="live", what="refetch", who=who, why=why)
        console.tell(asked.sentence(), asked, as_json)


def _remark(broken: BrokenRecord) -> None:
    console.remark(str(broken))


def _view(here: Session, record: OrderRecord, state: State) -> dict[str, object]:
    return {"company": here.companies.slug(record.company_id), "state": state} | msgspec.structs.asdict(record)
