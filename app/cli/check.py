"""The command that says whether everything is set up, and what to do where it is not.

What `check` finds of Redis: the web process's own checks, and how an address of another machine is protected.

What `check` finds of one company's Channel Manager: is it reached, is the key permitted, is there a subscription?

Nothing is changed there, and no clientState is shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from itertools import islice
from time import monotonic
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec
import typer

from app import bootstrap, settings, subscriptions
from app.cli import console, context
from app.cli.console import AWAY, DONE, FOUND, INTERRUPTED, NEWER, USAGE, epilog
from app.cli.context import API_PERMISSIONS, WEBHOOK_PERMISSIONS, advice, reason
from app.errors import OrderNotFound, RequestRejected, SettingsError, UpstreamError
from app.health import Check
from app.settings import Company, Settings
from app.upstream.client import ChannelManager
from app.upstream.models import EVENT_NAME, ListQuery

_ADVICE: Final = {
    "redis": "Start it, or correct REDIS_URL.",
    "writable": "Name the primary in REDIS_URL; if the AOF cannot be written, look at its disk.",
    "durable": "Set appendonly yes and appendfsync everysec (or always) in its configuration.",
    "schema": "Upgrade this receiver, or name another Redis in REDIS_URL; nothing was changed.",
    "memory": "Set maxmemory-policy noeviction, and maxmemory to what the machine can spare.",
}
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


cli = console.commands()


def of_checks(checks: list[Check]) -> Iterator[Finding]:
    """Return a finding for each check of app.health."""
    for check in checks:
        advice = "" if check.ok else _ADVICE.get(check.name, "Fix it: until then /readyz reports the same.")
        yield Finding("redis", check.name, "good" if check.ok else "todo", check.detail, advice)


def of_address(url: str) -> Iterator[Finding]:
    """Return how the way to Redis is protected, for an address that leaves this machine."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.hostname in _LOOPBACK:
        return
    if not parts.password:
        advice = "Set requirepass (or an ACL user) there and give the password in REDIS_URL."
        yield Finding("redis", "password", "note", "another machine's Redis is used without a password", advice)
    if parts.scheme != "rediss":
        advice = "Unless a private network carries it: use rediss://."
        yield Finding("redis", "tls", "note", "orders travel to another machine unencrypted", advice)


Level = Literal["good", "note", "todo", "wrong"]
"""`note`: worth knowing. `todo`: until it is done, events or orders do not arrive, or may be lost. `wrong`: a setting
without which the service does not start."""


class Finding(msgspec.Struct, frozen=True):
    """`about` is settings, redis, or the slug of a company; `advice` is "" where nothing must be done."""

    about: str
    what: str
    level: Level
    detail: str
    advice: str = ""


NO_ORDER: Final = "00000000-0000-4000-8000-000000000000"
"""A well-formed GUID that no order has: a 404 `resource_not_found` for it proves that we are heard and permitted."""


def findings(settings: Settings, company: Company, upstream: ChannelManager) -> list[Finding]:
    """Return what was found of one company, in one call or two."""
    api = _api(company, upstream)
    if api.level != "good":
        return [api]
    return [api, *_subscription(settings, company, upstream)]


def _api(company: Company, upstream: ChannelManager) -> Finding:
    begun = monotonic()
    try:
        if company.np_partner_id is None:
            _ask_for_no_order(upstream)
        else:
            list(islice(upstream.list_orders(ListQuery(page_size=1)), 1))
    except RequestRejected as error:
        hint = "Correct NP_PARTNER_ID, if it is set; else ask NaviPartner."
        return Finding(company.slug, "api", "todo", reason(error), hint)
    except UpstreamError as error:
        return _trouble(company, "api", error, API_PERMISSIONS)
    milliseconds = round((monotonic() - begun) * 1000)
    allowed = "call getOrder" if company.np_partner_id is None else "list orders"
    return Finding(company.slug, "api", "good", f"the API key may {allowed} ({milliseconds} ms)")


def _ask_for_no_order(upstream: ChannelManager) -> None:
    try:
        upstream.get_order(NO_ORDER)
    except OrderNotFound:
        return


def _subscription(settings: Settings, company: Company, upstream: ChannelManager) -> list[Finding]:
    try:
        ours = subscriptions.for_settled_orders(upstream.subscriptions())
    except UpstreamError as error:
        return [_trouble(company, "subscription", error, WEBHOOK_PERMISSIONS)]
    found = subscriptions.problem(company, settings.webhook_path, ours)
    if found is not None:
        return [Finding(company.slug, "subscription", "todo", found.found, found.advice)]
    return [Finding(company.slug, "subscription", "good", f"{EVENT_NAME} is Active")]


def _trouble(company: Company, what: str, error: UpstreamError, permissions: str) -> Finding:
    return Finding(company.slug, what, "todo", reason(error), advice(error.reason, permissions))


_SIGNS: dict[Level, str] = {"good": "✓", "note": "·", "todo": "✗", "wrong": "✗"}
_CODES: Final = {
    DONE: "all is well",
    FOUND: "something must be done",
    USAGE: "wrong settings",
    AWAY: "",
    NEWER: "",
    INTERRUPTED: "",
}


@cli.command(epilog=epilog("ota-receiver check", codes=_CODES))
def check(as_json: context.Json = False) -> None:
    """Check the settings, Redis and its durability, and each company's API and subscription."""
    bootstrap.configure_cli_log()
    try:
        found = settings.load()
        findings = [*_of_settings(found), *_of_redis(found), *_of_companies(found)]
    except SettingsError as error:
        advice = "Correct it; .env.example names every setting."
        findings = [Finding("settings", "settings", "wrong", line, advice) for line in str(error).splitlines()]
    _print(findings, as_json)
    levels = {finding.level for finding in findings}
    raise typer.Exit(USAGE if "wrong" in levels else FOUND if "todo" in levels else DONE)


def _of_settings(found: Settings) -> Iterator[Finding]:
    from workers.sinks import build  # the arrow points down: only the CLI knows both sides

    build(found.sinks)
    slugs = ", ".join(company.slug for company in found.companies)
    companies = f"{len(found.companies)} {'company' if len(found.companies) == 1 else 'companies'}"
    if found.spool_dir is None:
        advice = "Set SPOOL_DIR to a folder on a disk that outlives the process."
        yield Finding("settings", "spool", "note", "not set: during a Redis outage senders get 503", advice)
    yield Finding("settings", "settings", "good", f"complete ({companies}: {slugs})")
    for company in found.companies:
        if company.np_partner_id is None:
            advice = "Set NP_PARTNER_ID if you know it."
            yield Finding(company.slug, "partner id", "note", "not set: missed events cannot be looked for", advice)
        if company.client_state_previous is not None:
            advice = "Take CLIENT_STATE_PREVIOUS out once no event carries it any more."
            yield Finding(company.slug, "rotation", "note", "current and previous clientState are accepted", advice)


def _of_redis(found: Settings) -> Iterator[Finding]:
    yield from of_checks(asyncio.run(bootstrap.redis_checks(found)))
    yield from of_address(found.redis_url.get_secret_value())


def _of_companies(found: Settings) -> Iterator[Finding]:
    with bootstrap.http(found) as client, console.progress("asking upstream", len(found.companies)) as step:
        for company in found.companies:
            upstream = bootstrap.channel_manager(found, company, client)
            yield from findings(found, company, upstream)
            step(1)


def _print(findings: Iterable[Finding], as_json: bool) -> None:
    if as_json:
        for finding in findings:
            console.json_line(finding)
        return
    rows = ((_SIGNS[one.level], one.about, one.what, one.detail, one.advice) for one in findings)
    console.table("", ("", "about", "what", "found", "what to do"), rows)
