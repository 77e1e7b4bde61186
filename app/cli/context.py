"""What a command works with: settings, companies and the stores in Redis.

Also the options that several commands share, and the advice on upstream's errors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Final, Literal

import msgspec
import typer

from app import bootstrap, settings, times
from app.audit import LONGEST_TEXT, AuditEntry, append
from app.cli import console
from app.cli.command import FOUND, USAGE, Stop, flags
from app.deployment import Deployment
from app.errors import UpstreamError
from app.ids import OrderKey, beginning, guid
from app.ledger.dead_letters import DeadLetters
from app.ledger.events import EventLog
from app.ledger.ledger import Ledger
from app.ledger.orders import MOST_ALIKE, MOST_SEARCHED, Archive, References
from app.ledger.redis import Redis, for_command, server_time
from app.operations import Operations
from app.replay import Plans
from app.settings import Company, Settings
from app.snapshot import Breaker, SinkSnapshot

_TIME_OF_EVENT: Final = re.compile(r"\d{4,13}-?")


class Companies:
    """The companies of the settings and of the deployment (`declared`: id -> slug), and those of --company.

    `chosen` are the chosen ones of the settings; `chosen_id` is None for all. A GUID need not be among them: orders of
    a removed company can still be looked up. Raises Stop for a slug that is neither in the settings nor declared.
    """

    def __init__(self, companies: Sequence[Company], declared: Mapping[str, str]) -> None:
        self._slugs = {**declared, **{company.np_company_id: company.slug for company in companies}}
        self.ids = tuple(self._slugs)
        self.are_several = len(self.ids) > 1
        name, ids = flags().company, {slug: company_id for company_id, slug in self._slugs.items()}
        self.chosen_id = ids.get(name or "") or guid(name)
        if name is not None and self.chosen_id is None:
            raise Stop(f"No company {name!r} is known. There are: {', '.join(sorted(ids))}.")
        self.chosen = [one for one in companies if self.chosen_id in (None, one.np_company_id)]

    def column(self, found: Sequence[Any]) -> tuple[console.Column, ...]:
        """Return the column `company` of a list: there is none if all are of the only company that is known."""
        return () if not self.are_several and {one.company_id for one in found} <= {*self.ids} else ("?company",)

    def slug(self, company_id: str) -> str:
        """Return the slug, or the GUID of a company that is not known (any more)."""
        return self._slugs.get(company_id, company_id)


class CommandContext:
    """The settings and stores of one command; `company_id` is that of --company, None for all."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self.settings = settings
        self.redis = redis
        self.deployment = Deployment(redis)
        declared = {id_: one.slug for id_, one in self.deployment.companies().items()}
        self.companies = Companies(settings.companies, declared)
        self.company_id = self.companies.chosen_id
        self.orders = Archive(redis)
        self.references = References(redis)
        self.events = EventLog(redis)
        self.dead_letters = DeadLetters(redis)
        self.erasure = bootstrap.erasure(settings, redis)
        self.plans = Plans(redis, event_days=settings.event_days)

    @cached_property
    def ledger(self) -> Ledger:
        return bootstrap.ledger(self.settings, self.redis)

    @cached_property
    def operations(self) -> Operations:
        return Operations(self.ledger, self.plans, who=flags().who, why=flags().why)

    @cached_property
    def sinks(self) -> tuple[str, ...]:
        """Return the sinks of the deployment, whatever SINKS and SINKS_FILE are here."""
        return self.deployment.sinks()

    def no_sink(self, name: str, code: int = USAGE) -> Stop:
        """Return the error for a sink that no worker pool has declared; it names those that there are."""
        return Stop(f"No worker pool has declared a sink {name!r}. There are: {', '.join(self.sinks) or 'none'}.", code)

    def warn_of_disabled(self, sinks: Collection[str]) -> None:
        """Say which of these sinks are disabled: what is requested is delivered once they are enabled."""
        for name in sorted(self.deployment.disabled().intersection(sinks)):
            console.remark(f"{name} is disabled, so its deliveries wait. To go on: ota-receiver sinks enable {name}")

    def now(self) -> datetime:
        """Return the time of the Redis server, which set the leases and due times."""
        return times.from_ms(server_time(self.redis))

    def order(self, text: str) -> OrderKey:
        """Return the order as `find` does; raises Stop also when there is none."""
        found = self.find(text)
        if found is None:
            raise self.not_found(text)
        return found

    def not_found(self, text: str) -> Stop:
        """Return the error for an order that is not there."""
        limit = f" (references of orders never fetched: only the newest {MOST_SEARCHED:,} are searched)"
        return Stop(f"No order {text!r} found{'' if guid(text) else limit}.", FOUND)

    def find(self, text: str) -> OrderKey | None:
        """Return the order as `find_whole` does, or the only one whose orderId begins so, which is then shown."""
        found = self.find_whole(text)
        prefix = None if found else beginning(text)
        if prefix is None:
            return found
        with console.progress("searching orderIds"):
            alike = self.orders.beginning_with(prefix, self.company_id)
        slug = self.companies.slug
        several = " --company {}".format if self.companies.are_several else lambda _: ""
        names = {f"{one.order_id}{several(slug(one.company_id))}": one for one in alike}
        name = only("order", text, [*names])
        return names[name] if name else None

    def find_whole(self, text: str) -> OrderKey | None:
        """Return the order with this orderId, reference of either side or request_id, None if there is none.

        Raises Stop when there are several, and when `text` is blank: that is not the name of an order without a
        reference.
        """
        if not text.strip():
            raise Stop("ORDER is empty: give an orderId or a reference.")
        found = [one for one in self._orders(text, self.company_id) if self.company_id in (None, one.company_id)]
        if len(found) > 1:
            names = ", ".join(f"{self.companies.slug(one.company_id)} {one.order_id}" for one in found)
            raise Stop(f"Several orders match {text!r}: {names}. Give the orderId, and --company.")
        return found[0] if found else None

    def event_id(self, text: str) -> str:
        """Return the id of the only event that begins so, which is then shown; else the text as it is."""
        if not _TIME_OF_EVENT.fullmatch(text):
            return text
        return only("event", text, self.events.beginning_with(text.rstrip("-"))) or text

    def name(self, order: OrderKey) -> str:
        """Return the words that identify this order on a command line."""
        others = [one for one in self._orders(order.order_id, None) if one != order]
        return f"{order.order_id} --company {self.companies.slug(order.company_id)}" if others else order.order_id

    def view(self, found: Any, **derived: object) -> dict[str, Any]:
        """Return an order, an event or a difference for machines: its fields, and its company's slug."""
        return {"company": self.companies.slug(found.company_id)} | derived | msgspec.structs.asdict(found)

    def _orders(self, text: str, company_id: str | None) -> list[OrderKey]:
        order_id = guid(text)
        if order_id is not None:
            ids = self.companies.ids if company_id is None else (company_id,)
            return self.orders.of_companies(order_id, ids) or self.orders.of_any_company(order_id)
        with console.progress("searching references"):
            return self.references.orders(text, company_id)


@contextmanager
def open_context() -> Iterator[CommandContext]:
    """Open settings and Redis for a command; raises SettingsError, Stop, and StoreUnavailable when Redis fails."""
    bootstrap.configure_cli_log()
    found = settings.load()
    with for_command(found.redis_url.get_secret_value(), found.key_prefix) as redis:
        yield CommandContext(found, redis)


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
    return orders[0].member if len(orders) == 1 else console.many(len(orders), "order")


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


def breaker_words(breaker: Breaker, now: datetime) -> str:
    """Return why nothing is fetched for a company, since when, and when the next probe is made."""
    probe = f"at {times.short(breaker.probe_at)}" if breaker.probe_at > now else "with the next order that is due"
    return f"{_opened(breaker, now)}; next probe {probe}"


def _opened(breaker: Breaker, now: datetime) -> str:
    is_named = not breaker.http_status or str(breaker.http_status) in breaker.reason
    http = "" if is_named else f" (HTTP {breaker.http_status})"
    return f"{breaker.reason}{http} since {times.short(breaker.since)} ({times.age(now - breaker.since)})"


def sink_words(name: str, sink: SinkSnapshot, now: datetime) -> str:
    """Return why nothing is delivered to a sink and since when, "" if deliveries may start."""
    if sink.disabled_at:
        since = times.short(times.from_ms(sink.disabled_at))
        return f"disabled since {since}: {sink.disabled_reason}. To go on: ota-receiver sinks enable {name}"
    if sink.breaker is None:
        return ""
    if times.from_ms(sink.probe_until) > now:
        return f"breaker open: {_opened(sink.breaker, now)}; a probe runs"
    return f"breaker open: {breaker_words(sink.breaker, now)}"


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
