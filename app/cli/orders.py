"""The commands for orders: list, show, refetch; explain, confirm, cancel and erase have files of their own."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import msgspec
import typer

from app.cli import changes, deeds, erase, explain, moment, options, order_page, output
from app.cli.exits import FOUND, Stop, epilog
from app.cli.fetches import ask_for
from app.cli.lacks import UNREADABLE, lacks, sinks
from app.cli.mask import masked
from app.cli.session import Session, session
from app.errors import UnreadableAnswer
from app.store.archive import BrokenRecord, OrderQuery
from app.store.record import OrderRecord, State

orders = typer.Typer(name="orders", no_args_is_help=True, help="What came home, and what is on its way.")

_NAMED = "orderId, or its buyFromOrderReference or sellToOrderReference."


def register(cli: typer.Typer) -> None:
    orders.command(epilog=epilog("ota-receiver orders explain CM-4711", codes=explain.CODES))(explain.explain)
    confirms = "ota-receiver orders confirm CM-4711 --payment-reference PAY-1"
    orders.command(epilog=epilog(confirms, codes=changes.CODES))(changes.confirm)
    orders.command(epilog=epilog("ota-receiver orders cancel CM-4711", codes=changes.CODES))(changes.cancel)
    erases = "ota-receiver orders erase --email - < address.txt"
    orders.command(epilog=epilog(erases, codes=erase.CODES))(erase.erase)
    cli.add_typer(orders)


@orders.command("list", epilog=epilog("ota-receiver orders list --state parked --since 6h"))
def list_(
    state: Annotated[State | None, typer.Option(help="Where the order stands.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="The same as --state dead.")] = False,
    status: options.Status = None,
    company: options.Company = None,
    since: options.Since = None,
    until: options.Until = None,
    limit: options.Limit = 50,
    as_json: options.Json = False,
) -> None:
    """List orders, the one that changed last first; --since and --until mean the last change."""
    if dead and state not in (None, "dead"):
        raise Stop(f"--dead and --state {state} exclude each other.")
    with session() as here:
        now = moment.now()
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
                output.json_line(_view(here, record, record.state(now)))
        elif found:
            rows = (order_page.row(record, here.companies.slug(record.company_id), now) for record in found)
            output.table("", order_page.columns(), rows)
    if not found:
        raise Stop("No order matches.", FOUND)


@orders.command(epilog=epilog("ota-receiver orders show CM-4711 --reveal"))
def show(
    order: Annotated[str, typer.Argument(metavar="ORDER", help=_NAMED)],
    company: options.Company = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Show names, ticket and coupon numbers, and links.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show one order: where it stands, what to do next, its wallets with tickets and coupons, and its trail."""
    with session() as here:
        archive = here.books.archive
        key = here.order(order, here.companies.id_of(company))
        record = archive.record(key)
        if record is None:
            raise Stop(f"Order {key.order_id} is here no more.", FOUND)
        state, due = record.state(moment.now()), archive.due(key)
        lacking = tuple(lacks(record, state, due, here.settings.sinks))
        try:
            fetched = archive.order(key)
        except UnreadableAnswer:
            fetched, lacking = None, (*lacking, UNREADABLE)
        if fetched is not None and not reveal:
            fetched = masked(fetched)
        page = order_page.OrderPage(
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
        output.json_line(page.as_object())
    else:
        page.print()


@orders.command(epilog=epilog("ota-receiver orders refetch CM-4711 CM-4712"))
def refetch(
    named: Annotated[list[str], typer.Argument(metavar="ORDER...", help=_NAMED)],
    company: options.Company = None,
    who: deeds.Who = None,
    why: deeds.Why = "",
    as_json: options.Json = False,
) -> None:
    """Fetch orders once more, now: among the live ones. Needed after confirmOrder, of which no event tells."""
    with session() as here:
        company_id = here.companies.id_of(company)
        found = list(dict.fromkeys(here.order(text, company_id) for text in named))
        asked = ask_for(here, found, queue="live", what="refetch", who=who, why=why)
        output.tell(asked.sentence(), asked, as_json)


def _remark(broken: BrokenRecord) -> None:
    output.remark(str(broken))


def _view(here: Session, record: OrderRecord, state: State) -> dict[str, object]:
    return {"company": here.companies.slug(record.company_id), "state": state} | msgspec.structs.asdict(record)
