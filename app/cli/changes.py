"""The commands that change an order upstream: confirm, cancel. No event tells of either, so its fetch is owed here.

Killed between the call and that, nothing is lost: the same command again does no harm, and reconcile finds the change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import msgspec
import typer

from app import bootstrap
from app.cli import check_upstream, deeds, options, output
from app.cli.check_upstream import told
from app.cli.exits import AWAY, FOUND, Stop
from app.cli.session import Session, session
from app.errors import ConnectionFault, OrderNotFound, RequestRejected, Throttled, UpstreamError
from app.settings import Company
from app.store.keys import OrderKey
from app.store.outage import StoreUnavailable, translated_errors
from app.store.record import OrderRecord
from app.upstream.client import ChannelManager, Fetched

CODES: Final = (
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
    company: options.Company = None,
    yes: options.Yes = False,
    who: deeds.Who = None,
    why: deeds.Why = "",
    as_json: options.Json = False,
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
    company: options.Company = None,
    yes: options.Yes = False,
    who: deeds.Who = None,
    why: deeds.Why = "",
    as_json: options.Json = False,
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
        output.confirm(f"{question}: {_described(venue, key, record)}?", yes)
        deeds.note(here, f"order-{what}", key.member, 1, who, why)
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
            output.remark(f"Interrupted; it may have been done upstream, and is fetched to see: {_look(key)}")
            raise
        changed = Changed(venue.slug, key.order_id, status, _owe(here, key, what, "It was done upstream"))
        erased = record is not None and record.erased
        follows = "It was erased here, and is not fetched." if erased else f"Its fetch is queued: {_look(key)}"
        output.tell(f"Done: upstream says {status}. {follows}", changed, as_json)


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
    wallets = f", {output.many(record.wallets, 'wallet')}" if record is not None and record.wallets else ""
    return f"{key.order_id} of {venue.slug}, {known} as far as we know{wallets}"


def _refusal(venue: Company, error: UpstreamError, why: str) -> str:
    if isinstance(error, OrderNotFound):
        return f"{venue.slug}: upstream has no such order (HTTP 404): a Draft or Error order that was deleted is gone."
    allowed = "only a Draft order can be confirmed" if why == "confirm" else "not while it is being processed"
    return f"{venue.slug}: refused, {told(error)}: {allowed}."


def _sentence(venue: Company, error: UpstreamError) -> str:
    return f"{venue.slug}: {told(error)}. {check_upstream.advice(error.reason, _PERMISSIONS)}"


def _look(key: OrderKey) -> str:
    return f"ota-receiver orders explain {key.order_id}"
