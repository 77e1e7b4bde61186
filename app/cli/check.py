"""The command that says whether everything is set up, and what to do where it is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

import typer

from app import bootstrap, settings
from app.cli import check_redis, check_upstream, options, output
from app.cli.exits import DONE, FOUND, USAGE, epilog
from app.cli.finding import Finding, Level
from app.errors import SettingsError
from app.settings import Settings

_SIGNS: dict[Level, str] = {"good": "✓", "note": "·", "todo": "✗", "wrong": "✗"}
_CODES = "Exit codes: 0 all is well · 1 something is to be done · 2 the settings are wrong"


def register(cli: typer.Typer) -> None:
    cli.command(epilog=epilog("ota-receiver check", codes=_CODES))(check)


def check(as_json: options.Json = False) -> None:
    """Check the settings, Redis and its durability, and each company's API and webhook subscription."""
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
    if found.spool_dir is None:
        advice = "Set SPOOL_DIR to a folder on a disk that outlives the process."
        yield Finding("settings", "spool", "note", "not set: while Redis is away senders are told 503", advice)
    yield Finding("settings", "settings", "good", f"complete, for {len(found.companies)}: {slugs}")
    for company in found.companies:
        if company.np_partner_id is None:
            advice = "Set NP_PARTNER_ID if you know it."
            yield Finding(company.slug, "partner id", "note", "not set: missed events cannot be looked for", advice)
        if company.client_state_previous is not None:
            advice = "Take CLIENT_STATE_PREVIOUS out once no event carries it any more."
            yield Finding(company.slug, "rotation", "note", "two clientStates are taken", advice)


def _of_redis(found: Settings) -> Iterator[Finding]:
    yield from check_redis.of_checks(asyncio.run(bootstrap.redis_checks(found)))
    yield from check_redis.of_address(found.redis_url.get_secret_value())


def _of_companies(found: Settings) -> Iterator[Finding]:
    with bootstrap.http(found) as client, output.progress("asking upstream", len(found.companies)) as step:
        for company in found.companies:
            upstream = bootstrap.channel_manager(found, company, client)
            yield from check_upstream.findings(found, company, upstream)
            step(1)


def _print(findings: Iterable[Finding], as_json: bool) -> None:
    if as_json:
        for finding in findings:
            output.json_line(finding)
        return
    rows = ((_SIGNS[one.level], one.about, one.what, one.detail, one.advice) for one in findings)
    output.table("", ("", "about", "what", "found", "what to do"), rows)
