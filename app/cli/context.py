"""What a command works with: settings, companies and the stores in Redis.

Also the options that several commands share, and the advice on upstream's errors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Final, Literal

import msgspec
import typer

from app import bootstrap, settings, times
from app.audit import LONGEST_TEXT, AuditEntry, append
from app.cli import console
from app.cli.command import FOUND, USAGE, Stop, flags
from app.errors import UpstreamError
from app.explain.stores import Stores
from app.explain.words import many
from app.ids import OrderKey, beginning, guid
from app.ledger.ledger import Ledger
from app.ledger.orders import MOST_ALIKE, MOST_SEARCHED
from app.ledger.redis import Redis, for_command
from app.operations import Operations
from app.settings import Company, Settings

_TIME_OF_EVENT: Final = re.compile(r"\d{4,13}-?")


def chosen(companies: Sequence[Company], slugs: Mapping[str, str]) -> tuple[str | None, list[Company]]:
    """Return the id of the company of --company, None for all, and the chosen ones of `companies`, of the settings.

    `slugs`: id -> slug of each known company. A GUID need not be among them: orders of a removed company can still be
    looked up. Raises Stop for a slug that is not.
    """
    name, ids = flags().company, {slug: company_id for company_id, slug in slugs.items()}
    chosen_id = ids.get(name or "") or guid(name)
    if name is not None and chosen_id is None:
        raise Stop(f"No company {name!r} is known. There are: {', '.join(sorted(ids))}.")
    return chosen_id, [one for one in companies if chosen_id in (None, one.np_company_id)]


class CommandContext(Stores):
    """The settings and stores of one command; `company_id` is that of --company, None for all."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        super().__init__(redis, settings)
        self.company_id, self.chosen = chosen(settings.companies, self.slugs)
        self.erasure = bootstrap.erasure(settings, redis)

    @cached_property
    def ledger(self) -> Ledger:
        return bootstrap.ledger(self.settings, self.redis)

    @cached_property
    def operations(self) -> Operations:
        return bootstrap.operations(self.settings, self.redis, flags().who, flags().why)

    def no_sink(self, name: str, code: int = USAGE) -> Stop:
        """Return the error for a sink that no worker pool has declared; it names those that there are."""
        return Stop(f"No worker pool has declared a sink {name!r}. There are: {', '.join(self.sinks) or 'none'}.", code)

    def warn_of_disabled(self, sinks: Collection[str]) -> None:
        """Say which of these sinks are disabled: what is requested is delivered once they are enabled."""
        for name in sorted(self.deployment.disabled().intersection(sinks)):
            console.remark(f"{name} is disabled, so its deliveries wait. To go on: ota-receiver sinks enable {name}")

    def order(self, text: str) -> OrderKey:
        """Return the order as `only_order` does; raises Stop also when there is none."""
        found = self.only_order(text)
        if found is None:
            raise self.not_found(text)
        return found

    def not_found(self, text: str) -> Stop:
        """Return the error for an order that is not there."""
        limit = f" (references of orders never fetched: only the newest {MOST_SEARCHED:,} are searched)"
        return Stop(f"No order {text!r} found{'' if guid(text) else limit}.", FOUND)

    def only_order(self, text: str) -> OrderKey | None:
        """Return the order as `only_whole` does, or the only one whose orderId begins so, which is then shown."""
        found = self.only_whole(text)
        if found is not None or beginning(text) is None:
            return found
        with console.progress("searching orderIds"):
            alike = self.find_beginning(text, self.company_id)
        several = " --company {}".format if self.are_several else lambda _: ""
        names = {f"{one.order_id}{several(self.slug(one.company_id))}": one for one in alike}
        name = only("order", text, [*names])
        return names[name] if name else None

    def only_whole(self, text: str) -> OrderKey | None:
        """Return the order that `find_whole` finds, None if there is none.

        Raises Stop when there are several, and when `text` is blank: that is not the name of an order without a
        reference.
        """
        if not text.strip():
            raise Stop("ORDER is empty: give an orderId or a reference.")
        with nullcontext() if guid(text) else console.progress("searching references"):
            found = self.find_whole(text, self.company_id)
        if len(found) > 1:
            names = ", ".join(f"{self.slug(one.company_id)} {one.order_id}" for one in found)
            raise Stop(f"Several orders match {text!r}: {names}. Give the orderId, and --company.")
        return found[0] if found else None

    def event_id(self, text: str) -> str:
        """Return the id of the only event that begins so, which is then shown; else the text as it is."""
        if not _TIME_OF_EVENT.fullmatch(text):
            return text
        return only("event", text, self.events.beginning_with(text.rstrip("-"))) or text

    def view(self, found: Any, **derived: object) -> dict[str, Any]:
        """Return an order, an event or a difference for machines: its fields, and its company's slug."""
        return {"company": self.slug(found.company_id)} | derived | msgspec.structs.asdict(found)

    def company_column(self, found: Sequence[Any]) -> tuple[console.Column, ...]:
        """Return the column `company` of a list: there is none if all are of the only company that is known."""
        is_needless = not self.are_several and {one.company_id for one in found} <= {*self.company_ids}
        return () if is_needless else ("?company",)


@contextmanager
def open_context() -> Iterator[CommandContext]:
    """Open settings and Redis for a command; raises SettingsError, Stop, and StoreUnavailable when Redis fails."""
    bootstrap.configure_cli_log()
    found = settings.load()
    with for_command(found.redis_url.get_secret_value(), found.key_prefix) as redis:
        yield CommandContext(redis, found)


def only(what: str, text: str, alike: Sequence[str]) -> str | None:
    """Return the only one of these ids, which begin with `text`, and show it; None without one.

    Raises Stop when there are several.
    """
    if len(alike) > 1:
        shown = [f"  {one}" for one in alike[:MOST_ALIKE]] + ["  …"] * (len(alike) > MOST_ALIKE)
        raise Stop("\n".join([f"Several {what}s begin with {text!r}:", *shown, "Give more of the id."]))
    if not alike:
        return None
    if alike[0] != text:
        console.remark(f"{text!r} is {what} {alike[0]}.")
    return alike[0]


def note(redis: Redis, what: str, selected: str, orders: int = 0) -> None:
    """Write a change to the audit before it is made, so that an interrupted one is there too."""
    words = {"who": flags().who, "why": flags().why, "selected": selected[:LONGEST_TEXT]}
    append(redis, redis.names, AuditEntry(what=what, orders=orders, **words))


def about(orders: Sequence[OrderKey]) -> str:
    """Return the orders of a command for the audit: the id of a single one, or their number."""
    return orders[0].member if len(orders) == 1 else many(len(orders), "order")


def time(text: str) -> datetime:
    """Return the time that was typed, for an option's `parser`; a local one is shown. Raises BadParameter."""
    try:
        found = times.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if text.strip().isalpha() or re.fullmatch(r"[\d:T -]+", text):
        console.remark(f"{text!r} is {found.astimezone():%Y-%m-%d %H:%M:%S %Z}.")
    return found


ORDER: Final = "orderId (its first 4 digits may be enough), buyFromOrderReference, sellToOrderReference or request_id."

Order = Annotated[str, typer.Argument(metavar="ORDER", help=ORDER)]
Orders = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ORDER]...", help="orderIds (the first 4 digits may be enough) or references."),
]
Status = Annotated[str | None, typer.Option("--status", help="Status of the order: Issued, Draft, Error, ...")]
Limit = Annotated[int, typer.Option("--limit", "-l", min=1, max=1_000_000, help="Show at most this many.")]
Since = Annotated[datetime | None, typer.Option("--since", parser=time, metavar="TIME", help=times.HINT)]
Until = Annotated[datetime | None, typer.Option("--until", parser=time, metavar="TIME", help=times.HINT)]
OutcomeOption = Annotated[
    Literal["queued", "coalesced", "erased"] | None, typer.Option("--outcome", help="Outcome of the event.")
]


API_PERMISSIONS: Final = "NPR API Channel Mgr"
WEBHOOK_PERMISSIONS: Final = "Ext. Events – Subscr"
_UPSTREAM_ADVICE: Final = {
    "unauthorized": "Correct NP_API_KEY: it is wrong or was revoked (page NaviPartner API Keys).",
    "forbidden": "Give the key's Entra app the permission set {permissions}.",
    "tenant_not_found": "Correct NP_TENANT: the GUID of the Entra tenant.",
    "environment_not_found": "Correct NP_ENVIRONMENT: the name of the Business Central environment.",
    "company_not_found": "Correct NP_COMPANY: the company's name as page NaviPartner API URL shows it.",
    "not_found": "Correct NP_BASE_URL, NP_TENANT, NP_ENVIRONMENT and NP_COMPANY: nothing answers at that address.",
    "redirected": "Correct NP_BASE_URL: that address redirects, and the API key is not sent to other addresses.",
    "unsendable_request": "Correct NP_BASE_URL and NP_API_KEY: they hold characters that HTTP does not allow.",
    "timeout": "Check the network and NP_BASE_URL. If the service is slow, raise UPSTREAM_TIMEOUT.",
    "network": "Check the network (DNS, firewall, TLS) and NP_BASE_URL.",
    "proxy_unreachable": "Correct NP_PROXY, or start the proxy: it does not answer.",
    "proxy_407": "Correct user and password in NP_PROXY: the proxy refuses them, or asks for them.",
    "proxy_403": "Allow the host of NP_BASE_URL in the proxy of NP_PROXY, which refuses it.",
    "proxy_": "Look at the log of the proxy of NP_PROXY: it does not reach NP_BASE_URL.",
    "throttled": "The settings are right; other programs use up the limit of this key.",
}


def trouble(slug: str, error: UpstreamError, permissions: str) -> str:
    """Return an upstream error in words, with what to do about it."""
    return f"{slug}: {reason(error)}. {advice(error.reason, permissions)}"


def advice(code: str, permissions: str) -> str:
    """Return what to do about a reason code of upstream; `permissions` is the permission set that the call needs."""
    found = _UPSTREAM_ADVICE.get(code) or _UPSTREAM_ADVICE.get(code.rstrip("0123456789"))
    return (found or "Try again. If it persists, ask NaviPartner.").format(permissions=permissions)


def reason(error: UpstreamError) -> str:
    """Return the reason code, with the HTTP status if there was an answer."""
    return error.reason + (f" (HTTP {error.http_status})" if error.http_status else "")
