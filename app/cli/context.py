"""What a command of ops works with: settings, the books in Redis, and the names of the companies.

Companies as people name them: the slug of the settings, or the GUID.

The companies with their Channel Managers, for commands that ask upstream and need no Redis.

Options that several commands share, so that they read and mean the same everywhere.

What a command notes in the audit before it changes something: who, when, what, of how many orders, and why.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Final, Literal

import typer

from app import bootstrap, settings, times
from app.audit import LONGEST_TEXT, Deed
from app.bootstrap import Books
from app.cli import console
from app.cli.console import AWAY, FOUND, Stop
from app.errors import Unavailable, UnreadableAnswer, UpstreamError
from app.ids import OrderKey, guid
from app.ledger.orders import MOST_SEARCHED, BrokenRecord
from app.settings import Company, Settings
from app.upstream.client import ChannelManager


class Companies:
    """The companies of the settings, by either name."""

    def __init__(self, companies: Iterable[Company]) -> None:
        self._slugs = {company.np_company_id: company.slug for company in companies}
        self._ids = {slug: company_id for company_id, slug in self._slugs.items()}

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._slugs)

    def slug(self, company_id: str) -> str:
        """Return the slug, or the GUID of a company that the settings do not name (any more)."""
        return self._slugs.get(company_id, company_id)

    def id_of(self, name: str | None) -> str | None:
        """Return the GUID that `name` stands for, None for None; Stop for a slug that is not in the settings.

        A GUID need not be in the settings: orders of a company that was taken out can still be looked up.
        """
        if name is None:
            return None
        found = self._ids.get(name) or guid(name)
        if found is None:
            raise Stop(f"No company {name!r} in the settings; there is: {', '.join(sorted(self._ids))}.")
        return found


@dataclass(frozen=True)
class Session:
    """Open for the time of one command."""

    settings: Settings
    books: Books
    companies: Companies

    def order(self, text: str, company_id: str | None) -> OrderKey:
        """Return the one order that `text` names: an orderId, buyFromOrderReference or sellToOrderReference.

        Raises Stop when there is none, when several companies have one and `company_id` does not say which, and when
        `text` is blank: an order without a reference is not named by that.
        """
        if not text.strip():
            raise Stop("ORDER is empty: give an orderId or a reference.")
        found = [one for one in self._orders(text, company_id) if company_id in (None, one.company_id)]
        if not found:
            looked = "" if guid(text) else f" (references of orders never fetched: among the newest {MOST_SEARCHED:,})"
            raise Stop(f"No order {text!r} is here{looked}.", FOUND)
        if len(found) > 1:
            of = ", ".join(f"{self.companies.slug(one.company_id)} {one.order_id}" for one in found)
            raise Stop(f"Several orders match {text!r}: {of}. Give the orderId, and --company.")
        return found[0]

    def name(self, order: OrderKey) -> str:
        """Return what names this order, and no other, on a command line."""
        others = [one for one in self._orders(order.order_id, None) if one != order]
        return f"{order.order_id} --company {self.companies.slug(order.company_id)}" if others else order.order_id

    def _orders(self, text: str, company_id: str | None) -> list[OrderKey]:
        archive = self.books.archive
        order_id = guid(text)
        if order_id is not None:
            ids = self.companies.ids if company_id is None else (company_id,)
            return archive.of_companies(order_id, ids) or archive.of_any_company(order_id)
        with console.progress("looking through references"):
            return self.books.references.orders(text, company_id)


@contextmanager
def session() -> Iterator[Session]:
    """Open what a command works with; raises SettingsError, and StoreUnavailable when Redis fails.

    A BrokenRecord in the block becomes a Stop.
    """
    bootstrap.configure_cli_log()
    found = settings.load()
    with bootstrap.books(found) as books:
        try:
            yield Session(found, books, Companies(found.companies))
        except BrokenRecord as broken:
            raise Stop(str(broken), FOUND) from None


@dataclass(frozen=True)
class Venue:
    """One company and the calls for it."""

    company: Company
    upstream: ChannelManager

    @property
    def slug(self) -> str:
        return self.company.slug


@dataclass(frozen=True)
class Venues:
    """The companies that a command is about, open for its time."""

    settings: Settings
    chosen: tuple[Venue, ...]

    def one(self) -> Venue:
        """Return the only one; raises Stop when there are several."""
        if len(self.chosen) > 1:
            slugs = ", ".join(sorted(venue.slug for venue in self.chosen))
            raise Stop(f"Say which company by --company: {slugs}.")
        return self.chosen[0]


@contextmanager
def venues(name: str | None) -> Iterator[Venues]:
    """Open the company of this slug or GUID, all of the settings for None; raises SettingsError, Stop."""
    bootstrap.configure_cli_log()
    found = settings.load()
    company_id = Companies(found.companies).id_of(name)
    companies = [one for one in found.companies if company_id in (None, one.np_company_id)]
    if not companies:
        raise Stop(f"No company {name!r} in the settings.")
    with bootstrap.http(found) as client:
        chosen = [Venue(company, bootstrap.channel_manager(found, company, client)) for company in companies]
        yield Venues(found, tuple(chosen))


@contextmanager
def asking(venue: Venue) -> Iterator[None]:
    """Turn upstream's trouble into the sentence that ends the command; raises Stop."""
    try:
        yield
    except UpstreamError as error:
        raise Stop(sentence(venue, error), AWAY) from None


@contextmanager
def changing(venue: Venue) -> Iterator[None]:
    """Do as `asking`, for a call after whose silence, or babble, nobody knows whether it was carried out."""
    try:
        yield
    except (Unavailable, UnreadableAnswer) as error:
        unsure = "It may have been done all the same: look with `ota-receiver subscription list` first."
        raise Stop(f"{sentence(venue, error)} {unsure}", AWAY) from None
    except UpstreamError as error:
        raise Stop(sentence(venue, error), AWAY) from None


def sentence(venue: Venue, error: UpstreamError) -> str:
    """Return what upstream's trouble is, and what to do about it."""
    return f"{venue.slug}: {told(error)}. {advice(error.reason, WEBHOOK_PERMISSIONS)}"


def time(text: str) -> datetime:
    """Return the time that was typed, for an option's `parser`; raises BadParameter."""
    try:
        return times.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Say what would be done, and do nothing.")]
CompanyOption = Annotated[str | None, typer.Option("--company", "-c", help="Slug or GUID of the company.")]
Status = Annotated[str | None, typer.Option("--status", help="Issued, Draft, Error, ...")]
Limit = Annotated[int, typer.Option("--limit", "-l", min=1, help="At most so many.")]
Since = Annotated[datetime | None, typer.Option("--since", parser=time, metavar="TIME", help=times.HINT)]
Until = Annotated[datetime | None, typer.Option("--until", parser=time, metavar="TIME", help=times.HINT)]


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
    return orders[0].member if len(orders) == 1 else console.many(len(orders), "order")


def who_asks(given: str | None) -> str:
    """Return who is noted in the audit: as given, or the user and the machine."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or f"uid{os.getuid()}"
    return printable(given or f"{user}@{socket.gethostname()}", "--who")


def printable(text: str, option: str) -> str:
    """Return the text; raises Stop when it is too long, or would not print on one line."""
    if len(text) > LONGEST_TEXT or not text.isprintable():
        raise Stop(f"{option} is one line of at most {LONGEST_TEXT} printable characters.")
    return text


OutcomeOption = Annotated[
    Literal["queued", "coalesced", "erased"] | None, typer.Option("--outcome", help="What became of the event.")
]

WEBHOOK_PERMISSIONS: Final = "Ext. Events – Subscr"
_UPSTREAM_ADVICE: Final = {
    "unauthorized": "Correct NP_API_KEY: it is wrong, or was revoked (page NaviPartner API Keys).",
    "forbidden": "Give the key's Entra app the permission set {permissions}.",
    "tenant_not_found": "Correct NP_TENANT: the GUID of the Entra tenant.",
    "environment_not_found": "Correct NP_ENVIRONMENT: the name of the Business Central environment.",
    "company_not_found": "Correct NP_COMPANY: the company's name, as page NaviPartner API URL shows it.",
    "not_found": "Correct NP_BASE_URL, NP_TENANT, NP_ENVIRONMENT and NP_COMPANY: nothing answers at that address.",
    "redirected": "Correct NP_BASE_URL: the address there sends us elsewhere, where no API key goes.",
    "unsendable_request": "Correct NP_BASE_URL and NP_API_KEY: they hold characters that HTTP cannot carry.",
    "timeout": "Look at the network and at NP_BASE_URL; raise UPSTREAM_TIMEOUT if the service is slow.",
    "network": "Look at the network (DNS, firewall, TLS) and at NP_BASE_URL.",
    "throttled": "Nothing is wrong with the settings; other programs use up this key's limit.",
}
_OTHERWISE: Final = "Try again; if it stays, ask NaviPartner."


def advice(reason: str, permissions: str) -> str:
    """Return what to do about upstream's reason code; `permissions` is what the key needs for the call."""
    return _UPSTREAM_ADVICE.get(reason, _OTHERWISE).format(permissions=permissions)


def told(error: UpstreamError) -> str:
    """Return the reason code, and the status if there was an answer."""
    return error.reason + (f" (HTTP {error.http_status})" if error.http_status else "")
