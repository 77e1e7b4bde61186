"""The commands for orders: list, show, explain, refetch, confirm, cancel; erase has a file of its own.

confirm and cancel change an order upstream, which sends no event for it: they request its fetch here. A command that is
killed between the two loses nothing: it may be repeated, and reconcile finds the change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Annotated, Final, Literal

import typer

from app import bootstrap
from app.cli import console, context, erase, order_diff
from app.cli.command import AWAY, DONE, FOUND, NO_ANSWER, Stop, command, commands, flags
from app.cli.context import API_PERMISSIONS, CommandContext, open_context, reason, trouble
from app.cli.order_view import lines
from app.errors import ConnectionFault, OrderNotFound, RequestRejected, StoreUnavailable, Throttled, UpstreamError
from app.explain.order_view import NOT_FOUND, asset_rows, view_of
from app.explain.words import many
from app.ids import OrderKey
from app.ledger.history import as_object
from app.ledger.orders import OrderQuery
from app.ledger.record import OrderRecord, State
from app.ledger.redis import translated_errors
from app.upstream.client import ChannelManager, Fetched

_CONFIRM: Final = "ota-receiver orders confirm CM-4711 --payment-reference PAY-1"
_LONGEST_REFERENCE: Final = 50
_CHANGE_CODES: Final = {
    DONE: "done, and its fetch is queued",
    FOUND: "refused by the Channel Manager, or order not found",
    AWAY: "Redis unavailable: it may have been done",
    NO_ANSWER: "no usable answer from the Channel Manager: it may have been done",
}
_EXPLAIN_CODES: Final = {
    DONE: "complete: fetched, and every sink has it (or deleted upstream)",
    FOUND: "not complete, or order not found",
}
_NO_POOL: Final = (
    "No worker pool runs under KEY_PREFIX {prefix}: is this the Redis and the KEY_PREFIX of the pools?"
    " See: ota-receiver check"
)

cli = commands(name="orders", help="Orders: fetched, pending and failed.")
command(cli, erase.EXAMPLE, options="company why who dry_run yes", codes=erase.CODES)(erase.erase)


def request_fetches(
    here: CommandContext,
    orders: Mapping[OrderKey, str],
    queue: Literal["live", "backfill"],
    what: Literal["refetch", "reconcile"],
) -> tuple[str, dict[str, int]]:
    """Request the fetches of the orders.

    Returns, in words and by name, how many have a new job, had one already, or were erased and have none.
    `orders`: of each the digest of the row in the order list that causes its request, "" without one.
    """
    with console.progress("requesting fetches", len(orders)) as step:
        done = here.operations.refetch(orders, queue=queue, what=what, selected=context.about([*orders]), step=step)
    waiting = done.waiting + done.broken
    found = {"orders": len(orders), "queued": done.queued, "waiting": waiting, "erased": done.erased}
    not_fetched = f", {done.erased:,} erased and no longer fetched" if done.erased else ""
    counts = f"{done.queued:,} queued, {waiting:,} already waiting{not_fetched}"
    return f"{many(len(orders), 'order')}: {counts}.", found


@command(cli, "ota-receiver orders list --state deferred --since 6h", options="company")
def list_(
    state: Annotated[State | None, typer.Option(help="State of the order.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="The same as --state dead.")] = False,
    status: context.Status = None,
    since: context.Since = None,
    until: context.Until = None,
    limit: context.Limit = 50,
) -> None:
    """List orders, the latest change first. --since and --until select by that change."""
    if dead and state not in (None, "dead"):
        raise Stop(f"--dead and --state {state} exclude each other.")
    with open_context() as here:
        now, state = here.now(), "dead" if dead else state
        query = OrderQuery(company_id=here.company_id, status=status, state=state, since=since, until=until)
        matching = here.orders.newest_first(query, now, lambda broken: console.remark(str(broken)))
        found = list(islice(matching, limit))
        columns = (
            ("@changed", lambda record: record.changed),
            *here.company_column(found),
            ("=order", "order_id"),
            "state",
            "=reference",
            ("?status", lambda record: record.known_status),
            (">error", _errors),
            "#wallets",
            "#tickets",
            "#coupons",
        )
        console.listing(
            found, columns, lambda record: here.view(record, state=record.state(now)), nothing="No order matches."
        )


@command(
    cli,
    "ota-receiver orders show CM-4711 --reveal",
    "ota-receiver orders show CM-4711 --diff",
    "ota-receiver orders show CM-4711 --diff 3",
    options="company",
)
def show(
    order: context.Order,
    revision: Annotated[
        int | None, typer.Argument(min=1, metavar="[REVISION]", help="With --diff: a revision; default: the latest.")
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Show what came, changed or went since the revision before.")
    ] = False,
    reveal: Annotated[bool, typer.Option("--reveal", help="Show names, ticket and coupon numbers, and links.")] = False,
) -> None:
    """Show one order with its wallets, tickets and coupons. Also its state, its history, and what to do next.

    --diff [REVISION] shows instead which wallets, tickets and coupons came, changed or went between that revision and
    the one before it. The content of the last REVISIONS_KEPT revisions is kept.
    """
    if revision is not None and not diff:
        raise Stop("REVISION needs --diff.")
    with open_context() as here:
        if diff:
            order_diff.show(here, here.order(order), revision, reveal=reveal)
            return
        view = view_of(here, here.order(order), reveal=reveal)
    whole = view.as_object() | {"order": view.order, "history": [as_object(entry) for entry in view.history]}
    console.result(lines(view), whole)
    if view.order is not None and view.order.manifest_url:
        console.say(f"manifest  {view.order.manifest_url}")
    if view.order is not None and view.order.wallets:
        headings = ("line", "visit", "=wallet", "guest", "asset", "=number", "item", "description")
        console.say("")
        console.table("", headings, asset_rows(view.order.items))


@command(cli, "ota-receiver orders explain CM-4711", options="company", codes=_EXPLAIN_CODES)
def explain(order: context.Order) -> None:
    """Explain where an order is and what to do. It shows the history, what is pending, and the next attempt."""
    with open_context() as here:
        key = here.only_order(order)
        if key is None:
            sentences = [line.format(text=order) for line in NOT_FOUND]
            if not here.deployment.running():
                sentences.insert(1, _NO_POOL.format(prefix=here.settings.key_prefix))
            if flags().as_json:
                console.json_line({"order": order, "state": "unknown", "complete": False, "next": " ".join(sentences)})
                raise typer.Exit(FOUND)
            raise Stop("\n".join(line for sentence in sentences for line in console.wrapped(sentence)), FOUND)
        view = view_of(here, key)
    console.result(lines(view), view.as_object())
    if not view.complete:
        raise typer.Exit(FOUND)


@command(cli, "ota-receiver orders refetch CM-4711 CM-4712", options="company who why")
def refetch(named: Annotated[list[str], typer.Argument(metavar="ORDER...", help=context.ORDER)]) -> None:
    """Fetch orders again now, in the live queue. Use it after a confirmOrder of your own, which sends no event.

    For many orders use `events replay`, for dead letters `dead requeue`, for missing orders `reconcile`.
    """
    with open_context() as here:
        orders = dict.fromkeys(map(here.order, named), "")
        console.result(*request_fetches(here, orders, "live", "refetch"))


def _errors(record: OrderRecord) -> object:
    """Return the error of the fetch, or else that of each sink with its name."""
    failed = (f"{one.name}: {one.error or one.dead}" for one in record.sinks if one.error or one.dead)
    return record.dead or record.error or tuple(failed)


def _reference(text: str) -> str:
    found = text.strip()
    if not 0 < len(found) <= _LONGEST_REFERENCE or not found.isprintable():
        raise typer.BadParameter(f"is not 1 to {_LONGEST_REFERENCE} printable characters")
    return found


@command(cli, _CONFIRM, options="company yes who why", codes=_CHANGE_CODES)
def confirm(
    order: context.Order,
    payment_reference: Annotated[
        str, typer.Option("--payment-reference", parser=_reference, metavar="REF", help="Reference of the payment.")
    ],
) -> None:
    """Confirm a Draft order as paid (confirmOrder), and fetch it.

    Confirming an Issued order again changes nothing.
    """
    _change(
        order,
        "confirm",
        "Confirm the order as paid",
        lambda upstream, order_id: upstream.confirm_order(order_id, payment_reference),
        "only a Draft order can be confirmed",
    )


@command(cli, "ota-receiver orders cancel CM-4711", options="company yes who why", codes=_CHANGE_CODES)
def cancel(order: context.Order) -> None:
    """Cancel an order (deleteOrder), and fetch it. Upstream deletes a Draft or Error order, and keeps an Issued one.

    This cannot be undone.
    """
    refused = "an order that is being processed cannot be cancelled"
    _change(order, "cancel", "Cancel the order, for good", ChannelManager.delete_order, refused)


def _change(text: str, what: str, question: str, call: Callable[[ChannelManager, str], Fetched], refused: str) -> None:
    """Ask, note the change in the audit, make it upstream, and request the fetch; raises Stop when it fails.

    `what` is its name in the audit, `refused` says why upstream may refuse it.
    """
    with open_context() as here:
        key = here.order(text)
        record = here.orders.record(key)
        company = next((one for one in here.settings.companies if one.np_company_id == key.company_id), None)
        if company is None:
            raise Stop(f"The settings have no company {key.company_id}: its order cannot be changed from here.")
        known = record.known_status if record is not None else "unknown"
        wallets = f", {many(record.wallets, 'wallet')}" if record is not None and record.wallets else ""
        console.confirm(f"{question}: {key.order_id} of {company.slug}, last known status {known}{wallets}?")
        context.note(here.redis, f"order-{what}", key.member, 1)
        request = partial(_request_fetch, here, key)
        see = f"ota-receiver orders explain {key.order_id}"
        try:
            with bootstrap.http(here.settings) as client:
                upstream = bootstrap.channel_manager(here.settings, company, client)
                status = call(upstream, key.order_id).order.status
        except (ConnectionFault, Throttled) as error:
            raise Stop(f"{trouble(company.slug, error, API_PERMISSIONS)} Nothing was changed.", NO_ANSWER) from None
        except (RequestRejected, OrderNotFound) as error:
            # The copy here may be old: the fetch shows what the order is now.
            request(f"{what}-refused", "Upstream refused it")
            why_not = "upstream has no such order (HTTP 404): deleted Draft and Error orders are gone."
            if isinstance(error, RequestRejected):
                why_not = f"refused, {reason(error)}: {refused}."
            raise Stop(f"{company.slug}: {why_not} Its fetch is queued: {see}", FOUND) from None
        except UpstreamError as error:
            request(f"{what}-unsure", "It may have been done upstream")
            cause = trouble(company.slug, error, API_PERMISSIONS)
            raise Stop(f"{cause} It may have been done upstream; its fetch is queued: {see}", NO_ANSWER) from None
        except KeyboardInterrupt:
            request(f"{what}-unsure", "It may have been done upstream")
            console.remark(f"Interrupted; it may have been done upstream, and its fetch is queued: {see}")
            raise
        queued = request(what, "It was done upstream")
        erased = record is not None and record.erased_at
        follows = "It was erased here, and is not fetched." if erased else f"Its fetch is queued: {see}"
        changed = {"company": company.slug, "order_id": key.order_id, "status": status, "queued": queued}
        console.result(f"Done: upstream answered {status}. {follows}", changed)


def _request_fetch(here: CommandContext, key: OrderKey, why: str, what: str) -> bool:
    """Return whether the fetch has a new job; raises Stop, which begins with `what`, where Redis cannot take it."""
    try:
        with translated_errors(here.redis):
            return here.ledger.request_fetch([key], queue="live", reason=why).queued == 1
    except StoreUnavailable as error:
        again = f"ota-receiver orders refetch {key.order_id}"
        raise Stop(f"{what}, and its fetch could not be queued. {error}. Then: {again}", AWAY) from None
