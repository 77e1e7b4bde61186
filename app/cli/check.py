"""The command that checks whether everything is set up, and says what to do where it is not.

It changes nothing, and shows no clientState.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec
import typer

from app import bootstrap, settings, subscriptions, times
from app.cli import console
from app.cli.command import DONE, FOUND, LOOPBACK, NO_REDIS, USAGE, command, commands
from app.cli.context import API_PERMISSIONS, WEBHOOK_PERMISSIONS, advice, reason
from app.declared import Declared
from app.deployment import Deployment, differences
from app.erased_file import ErasedFile
from app.errors import (
    OrderNotFound,
    OtherDeployment,
    RequestRejected,
    SettingsError,
    StoreUnavailable,
    UnreadableAnswer,
    UpstreamError,
)
from app.explain.words import breaker_words, many
from app.ids import guid
from app.intake.spool import refuse_open
from app.intake.spool_file import ROOM, free_bytes, own_files, waiting
from app.ledger import rights
from app.ledger.orders import Archive, OrderQuery
from app.ledger.redis import for_command, translated_errors
from app.ledger.rq_jobs import RESUME
from app.setting_values import scheme_and_host
from app.settings import Company, Settings
from app.sink_settings import FilesSink, HttpsSink, ObjectSink, PythonSink, RedisStreamSink, SinkSettings, SqlSink
from app.snapshot import Snapshot, SnapshotReader
from app.upstream.client import ChannelManager

Level = Literal["good", "note", "todo", "wrong"]
"""`note`: worth knowing. `todo`: until it is done, events or orders do not arrive, or may be lost. `wrong`: a setting
without which the service does not start."""

NO_ORDER: Final = "00000000-0000-4000-8000-000000000000"
"""A well-formed GUID that no order has: a 404 `resource_not_found` for it proves that the key may call getOrder."""

_NAMED: Final = 5
"""Foreign files in SPOOL_DIR that are named."""

_LATEST: Final = 50
"""Orders whose partner is compared with NP_PARTNER_ID when its list is empty."""

_REDIS_ADVICE: Final = {
    "redis": "Then run this again.",
    "writable": "Use a primary and a user with the rights in docs/operations.md. If the AOF fails, look at its disk.",
    "durable": "Set appendonly yes and appendfsync everysec (or always) in its configuration.",
    "schema": "If an upgrade is under way, finish it. If the data is older, use an empty Redis. Nothing was changed.",
    "memory": "Set maxmemory-policy noeviction, and maxmemory to what the machine can spare.",
}
_SIGNS: Final[dict[Level, str]] = {"good": "✓", "note": "·", "todo": "✗", "wrong": "✗"}
_CODES: Final = NO_REDIS | {DONE: "everything is set up", FOUND: "something must be done", USAGE: "wrong settings"}

cli = commands()


class Finding(msgspec.Struct, frozen=True):
    """`about` is settings, redis, or the name of a company or a sink; `advice` is "" where nothing must be done."""

    about: str
    what: str
    level: Level
    detail: str
    advice: str = ""


@command(cli, "ota-receiver check", codes=_CODES)
def check() -> None:
    """Check the settings, Redis and its durability, and each company's API and subscription."""
    bootstrap.configure_cli_log()
    try:
        loaded = settings.load()
        found = [*_of_settings(loaded), *_of_redis(loaded), *_of_companies(loaded)]
    except SettingsError as error:
        found = [_of_problem(line) for line in str(error).splitlines()]
    signs = ("", lambda one: _SIGNS[one.level])
    console.listing(found, (signs, "about", "what", ("found", "detail"), (">what to do", "advice")))
    levels = {finding.level for finding in found}
    raise typer.Exit(USAGE if "wrong" in levels else FOUND if "todo" in levels else DONE)


def _of_problem(line: str) -> Finding:
    page = "docs/sinks.md explains every kind" if "SINKS_FILE" in line else "docs/settings.md explains every setting"
    return Finding("settings", "settings", "wrong", line, f"Correct it: {page}.")


def _of_settings(loaded: Settings) -> Iterator[Finding]:
    from workers.sinks.build import build  # here: of app only the CLI may import workers

    sinks = build(loaded.declared_sinks)
    ErasedFile(loaded.erased_file).read()
    yield from _of_spool(loaded.spool_dir)
    slugs = ", ".join(company.slug for company in loaded.companies)
    companies = many(len(loaded.companies), "company")
    yield Finding("settings", "settings", "good", f"complete ({companies}: {slugs})")
    yield from of_sinks(loaded.declared_sinks)
    for declared in loaded.declared_sinks:
        if declared.kind == "sql":
            yield _of_tables(declared.name, sinks[declared.name])
        if isinstance(declared, FilesSink) and not os.access(declared.folder, os.W_OK | os.X_OK):
            hint = "It must be there, and writable, where the workers run."
            yield Finding(declared.name, "folder", "note", "is missing here, or may not be written", hint)
    for sentence in loaded.unknown:
        yield Finding("settings", "unknown name", "note", sentence, "Correct it, or remove it.")
    yield from _of_secrets("settings", loaded)
    for company in loaded.companies:
        yield from _of_secrets(company.slug, company)
        where = f"{company.np_company!r} in {company.np_environment!r}, tenant {company.np_tenant!r}"
        yield Finding(company.slug, "company", "good", where)
        if company.np_partner_id is None:
            detail = "not set: orders without an event cannot be found"
            yield Finding(company.slug, "partner id", "note", detail, "Set NP_PARTNER_ID if you know it.")
        if company.client_state_previous is not None:
            hint = "Remove CLIENT_STATE_PREVIOUS when events no longer use it."
            yield Finding(company.slug, "rotation", "note", "current and previous clientState are accepted", hint)


def of_sinks(declared: tuple[SinkSettings, ...]) -> Iterator[Finding]:
    """Return where each sink delivers and which orders it gets, and its secrets as those of the settings."""
    for sink in declared:
        orders = [f"only company {', '.join(sink.companies)}"] if sink.companies else []
        orders += [f"only status {', '.join(sink.statuses)}"] if sink.statuses else []
        yield Finding(sink.name, sink.kind, "good", "; ".join((_destination(sink), *orders)))
        yield from _of_secrets(sink.name, sink)
    if not declared:
        detail = "none: fetched orders stay in Redis"
        yield Finding("settings", "sinks", "note", detail, "docs/sinks.md says where they may go.")


def _destination(sink: SinkSettings) -> str:
    """Return where a sink delivers, without what may be a secret."""
    match sink:
        case PythonSink():
            return sink.function
        case FilesSink():
            return str(sink.folder)
        case ObjectSink():
            return scheme_and_host(sink.url)
        case HttpsSink() | SqlSink() | RedisStreamSink():
            return scheme_and_host(sink.url.get_secret_value())
    raise NotImplementedError(sink.kind)


def _of_tables(name: str, sink: object) -> Finding:
    """Return whether a sql sink reaches its database, and finds its tables there."""
    from workers.sinks.contract import Failed
    from workers.sinks.sql import Tables  # here: it loads SQLAlchemy

    assert isinstance(sink, Tables)
    try:
        with contextlib.closing(sink):
            held, needed = sink.version()
    except Failed as error:
        hint = "Check its url, the database and the network: until then its deliveries wait."
        return Finding(name, "database", "todo", error.reason, hint)
    if held < needed:
        detail = f"the tables are of version {held}, not {needed}" if held else "the tables are missing"
        return Finding(name, "database", "todo", detail, f"Run ota-receiver sinks migrate {name}")
    return Finding(name, "database", "good", f"answers, and has tables of version {held}")


def _of_spool(folder: Path | None) -> Iterator[Finding]:
    if folder is None:
        hint = "Set SPOOL_DIR to a folder on a disk that outlives the process."
        yield Finding("settings", "spool", "note", "not set: during a Redis outage senders get 503", hint)
        return
    try:
        if folder.exists():
            user = os.geteuid() or folder.lstat().st_uid  # root looks at it for the user of `serve`
            refuse_open(folder, user)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0")
        elif not os.access(folder.parent, os.W_OK | os.X_OK):
            raise SettingsError(f"SPOOL_DIR: {folder} is not there and cannot be made")
    except SettingsError as error:
        yield Finding("settings", "spool", "wrong", str(error), "Until then `serve` does not start.")
        return
    except OSError as error:
        detail = f"{folder} cannot be written to: {error.strerror}"
        yield Finding("settings", "spool", "todo", detail, "See docs/operations.md#spool-filling.")
        return
    if not folder.exists():
        yield Finding("settings", "spool", "good", f"{folder} is not there yet: `serve` makes it")
        return
    yield from _of_spool_folder(folder)


def _of_spool_folder(folder: Path) -> Iterator[Finding]:
    events, free = waiting(folder), max(free_bytes(folder), 0)
    if free < ROOM:
        detail = "the disk is full: no event can be kept there"
        yield Finding("settings", "spool", "todo", detail, "See docs/operations.md#spool-filling.")
    elif events is not None:
        yield Finding("settings", "spool", "good", f"{folder} can be written to, {free // 10**6:,} MB are free")
    if events is None:
        detail = "the file is broken, not ours, or was deleted"
        yield Finding("settings", "spool", "todo", detail, "See docs/operations.md#spool-filling.")
    elif events:
        detail = f"{many(events, 'event')} wait on this machine for Redis"
        hint = "A running `ota-receiver serve` records them when Redis is back."
        yield Finding("settings", "spool", "todo", detail, hint)
    ours = own_files(folder)
    if foreign := sorted(one.name for one in folder.iterdir() if one not in ours):
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        detail = f"{folder} also has {', '.join(foreign[:_NAMED])}{more}: nothing of the spool"
        yield Finding(
            "settings", "spool", "note", detail, "Fine on the root of a volume. Otherwise give it a folder of its own."
        )


def _of_secrets(about: str, declared: Declared) -> Iterator[Finding]:
    """Return by what each secret can be compared with the one in another place without being shown."""
    for name, value, origin in declared.secrets():
        fingerprint = sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        detail = f"{many(len(value), 'character')} from {origin}, fingerprint {fingerprint}"
        yield Finding(about, name, "good", detail)


def _of_redis(loaded: Settings) -> Iterator[Finding]:
    checks = asyncio.run(bootstrap.redis_checks(loaded))
    for check in checks:
        hint = "" if check.ok else _REDIS_ADVICE.get(check.name, "Fix it: until then /readyz reports the same.")
        yield Finding("redis", check.name, "good" if check.ok else "todo", check.detail, hint)
    if all(check.ok for check in checks if check.name == "redis"):
        yield from _of_rights(loaded)
    yield from _of_pools(loaded)
    yield from of_address(loaded.redis_url.get_secret_value())


def _of_rights(loaded: Settings) -> Iterator[Finding]:
    """Return whether the Redis user may do what each process does; `writable` is only what web does."""
    try:
        with bootstrap.worker_redis(loaded) as redis, translated_errors(redis):
            missing = rights.missing(redis, *rights.NEEDED)
    except StoreUnavailable as error:
        yield Finding("redis", "rights", "todo", str(error), _REDIS_ADVICE["redis"])
        return
    if missing:
        hint = "Give it these rights with ACL SETUSER: docs/operations.md has all that are needed."
        yield Finding("redis", "rights", "todo", f"the user may not: {missing}", hint)
    else:
        yield Finding("redis", "rights", "good", "the user may run every command")


def _of_pools(loaded: Settings) -> Iterator[Finding]:
    """Return whether these settings fit the running pools, and whether the pools agree."""
    with (
        contextlib.suppress(StoreUnavailable),
        for_command(loaded.redis_url.get_secret_value(), loaded.key_prefix) as redis,
    ):
        deployment = Deployment(redis)
        pools = deployment.running()
        try:
            deployment.refuse_other(bootstrap.configuration(loaded))
        except OtherDeployment as refusal:
            yield Finding("redis", "deployment", "todo", str(refusal), "Until then web and workers refuse to start.")
        for name, words in differences(pools).items():
            hint = "After a change of settings restart every pool. A rolling change ends by itself."
            yield Finding("redis", "pools", "note", f"pool {name} differs: {', '.join(words)}", hint)
        yield from _of_work(SnapshotReader(loaded.companies).read(redis))
        if pools:
            yield Finding("redis", "pools", "good", f"{many(len(pools), 'worker pool')} under this KEY_PREFIX")
            return
        detail = f"no worker pool runs under KEY_PREFIX {loaded.key_prefix}: nothing is fetched"
        # The Redis user may have no right to see the keys of others.
        with contextlib.suppress(StoreUnavailable), translated_errors(redis):
            if others := deployment.other_prefixes():
                detail += f"; pools run under {', '.join(others)}"
        hint = "Start `ota-receiver worker`, or set KEY_PREFIX and REDIS_URL as the pools have them."
        yield Finding("redis", "pools", "todo", detail, hint)


def _of_work(snapshot: Snapshot) -> Iterator[Finding]:
    """Return what keeps the pools from fetching or delivering, which a call of ours may not show."""
    if snapshot.suspended:
        detail = "RQ is suspended: nothing is fetched or delivered"
        yield Finding("redis", "rq", "todo", detail, f"To go on: {RESUME}")
    for slug, breaker in snapshot.open_breakers().items():
        words = breaker_words(breaker, times.from_ms(snapshot.now))
        hint = f"{advice(breaker.reason, API_PERMISSIONS)} See docs/operations.md#breaker-open."
        yield Finding(slug, "breaker", "todo", f"open, so nothing is fetched: {words}", hint)
    for slug, until in snapshot.throttled().items():
        detail = f"the API key is throttled (Retry-After) until {times.short(until)}: nothing is fetched"
        yield Finding(slug, "throttled", "todo", detail, advice("throttled", API_PERMISSIONS))
    for name, sink in snapshot.sinks.items():
        if sink.disabled_at:
            detail = f"disabled since {times.short(times.from_ms(sink.disabled_at))}: {sink.disabled_reason}"
            hint = f"When it takes orders again: ota-receiver sinks enable {name}"
            yield Finding(name, "deliveries", "todo", detail, hint)
        elif sink.fails(snapshot.now) or (sink.breaker and sink.behind):
            detail = f"nothing is delivered: {sink.breaker_reason or sink.error}"
            yield Finding(
                name, "deliveries", "todo", detail, "See ota-receiver status, docs/operations.md#sink-failing."
            )


def of_address(url: str) -> Iterator[Finding]:
    """Return how the connection to Redis is protected, for an address on another machine."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.hostname in LOOPBACK:
        return
    if not parts.password:
        hint = "Set requirepass (or an ACL user) there and give the password in REDIS_URL."
        yield Finding("redis", "password", "note", "a Redis on another machine is used without a password", hint)
    if parts.scheme != "rediss":
        hint = "Use rediss://, except in a private network."
        yield Finding("redis", "tls", "note", "orders travel to another machine unencrypted", hint)


def _of_companies(loaded: Settings) -> Iterator[Finding]:
    with bootstrap.http(loaded) as client, console.progress("calling upstream", len(loaded.companies)) as step:
        for company in loaded.companies:
            upstream = bootstrap.channel_manager(loaded, company, client)
            yield from _of_company(loaded, company, upstream)
            step(1)


def _of_company(loaded: Settings, company: Company, upstream: ChannelManager) -> Iterator[Finding]:
    """Return what its API answers, and if it does, how its subscription is."""
    started, slug = monotonic(), company.slug
    has_orders = True
    try:
        with contextlib.suppress(OrderNotFound):
            upstream.get_order(NO_ORDER)
        if company.np_partner_id is not None:
            has_orders = any(page.rows or page.unreadable for page in islice(upstream.list_orders(page_size=1), 1))
    except UpstreamError as error:
        hint = advice(error.reason, API_PERMISSIONS)
        if isinstance(error, RequestRejected):
            hint = "Correct NP_PARTNER_ID, if it is set; else ask NaviPartner."
        yield Finding(slug, "api", "todo", reason(error), hint)
        return
    milliseconds = round((monotonic() - started) * 1000)
    allowed = "call getOrder" + ("" if company.np_partner_id is None else " and list orders")
    yield Finding(slug, "api", "good", f"the API key may {allowed} ({milliseconds} ms)")
    if not has_orders:
        yield _of_empty_list(loaded, company)
    try:
        ours = subscriptions.for_settled_orders(upstream.subscriptions())
    except UpstreamError as error:
        yield Finding(slug, "subscription", "todo", reason(error), advice(error.reason, WEBHOOK_PERMISSIONS))
        return
    found = subscriptions.status_of(company, loaded.webhook_path, ours, loaded.webhook_url)
    level: Level = "good" if found.state == subscriptions.ACTIVE else "todo"
    yield Finding(slug, "subscription", level, found.detail, found.advice)


def _of_empty_list(loaded: Settings, company: Company) -> Finding:
    """Return whether NP_PARTNER_ID is wrong: the list of an unknown partner is empty (upstream.md 6)."""
    partners: set[str | None] = set()
    url, prefix = loaded.redis_url.get_secret_value(), loaded.key_prefix
    with contextlib.suppress(StoreUnavailable), for_command(url, prefix) as redis:
        orders, query = Archive(redis), OrderQuery(company_id=company.np_company_id)
        for record in islice(orders.newest_first(query, times.now()), _LATEST):
            with contextlib.suppress(UnreadableAnswer):
                order = orders.order(record.key)
                partners.add(guid(order.partner_id) if order is not None else None)
    others = sorted(filter(None, partners))
    if others and company.np_partner_id not in others:
        detail = f"the order list is empty, and the orders fetched last have the partner id {', '.join(others)}"
        return Finding(company.slug, "partner id", "todo", detail, "Correct NP_PARTNER_ID.")
    hint = "Right for a new partner. Otherwise correct NP_PARTNER_ID: an unknown partner has an empty list."
    return Finding(company.slug, "partner id", "note", "the order list is empty", hint)
