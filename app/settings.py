"""All settings, each declared once: name, default, meaning and example. tests/settings_page.py renders their page.

They come from the environment or `.env`; each may also come from the file that `NAME_FILE` names. `load` reports every
problem in one message without any value, since a value may be a secret. Secrets are `SecretStr` and print as stars.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from io import StringIO
from operator import gt, lt
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal
from urllib.parse import quote

from dotenv.parser import parse_stream
from pydantic import BeforeValidator, Field, PrivateAttr

from app.declared import Declared, at, meant, tables, unknown_names, unreadable, validated
from app.errors import SettingsError
from app.setting_values import (
    SHORTEST_PASSWORD,
    ClientState,
    CollectorUrl,
    CommaList,
    CompanyName,
    Date,
    Guid,
    HeaderSecret,
    Host,
    HttpsUrl,
    KeyPrefix,
    Networks,
    PasswordToAct,
    ProxyUrl,
    RedisUrl,
    Seconds,
    SecondsOrOff,
    Slug,
    Text,
    WebhookPath,
    besides,
    not_,
)
from app.sink_settings import SinkSettings, of_file, of_specification
from app.texts import cleaned


class Company(Declared):
    """One company of upstream that the partner sells for, and its secrets."""

    slug: Slug = Field(examples=["museum"])
    """Its name in logs, metrics and commands: `default`, or the name of its table in COMPANIES_FILE."""

    client_state: ClientState = Field(
        description="Secret of the webhook subscription, 1 to 50 characters.",
        examples=["the output of openssl rand -hex 20"],
    )
    client_state_previous: ClientState | None = Field(
        default=None,
        description="The previous secret, accepted during a rotation. Remove it a day after the last event with it.",
    )
    np_tenant: Text = Field(
        description="Tenant, from the Business Central page *NaviPartner API URL*.",
        examples=["5d2c6b0e-3f1a-4a57-9d0e-0c4c5b7f1a11"],
    )
    np_environment: Text = Field(description="Environment, from the same page.", examples=["Production"])
    np_company: CompanyName = Field(
        description="Company name, from the same page, plain or as the address there shows it. Write a plus in a name"
        " without blanks as `%2B`.",
        examples=["CRONUS International Ltd."],
    )
    np_company_id: Guid = Field(
        description="GUID of the company. Only its events are accepted.",
        examples=["b56a418d-8205-4d3a-bdbb-25d94e42abbd"],
    )
    np_api_key: HeaderSecret = Field(
        description="API key, from the page *NaviPartner API Keys*; permission set `NPR API Channel Mgr`.",
        examples=["the key as NaviPartner API Keys shows it"],
    )
    np_partner_id: Guid | None = Field(
        default=None,
        description="Your partner id. Without it, orders whose events were lost cannot be found in the order list.",
        examples=["21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"],
    )

    @property
    def path(self) -> str:
        """Return `/tenant/environment/company`, each part percent-encoded once (upstream.md 2)."""
        parts = (self.np_tenant, self.np_environment, self.np_company)
        return "".join("/" + quote(part, safe="") for part in parts)


class Settings(Declared):
    """The settings of a process; `load` reads them."""

    redis_url: RedisUrl = Field(
        description="Address of Redis: `redis://`, `rediss://` for TLS, or `unix://`.",
        examples=["redis://:password@redis:6379/0"],
    )
    key_prefix: KeyPrefix = Field(
        default="ota",
        description="Before all keys in Redis, and RQ's names of queues and jobs: lower-case letters, digits and"
        " hyphens, at most 20. Each deployment on one Redis needs its own.",
    )
    companies_file: Path | None = Field(
        default=None,
        description="TOML file of several companies, instead of the settings of one company below.",
        examples=["/etc/ota-receiver/companies.toml"],
    )
    np_base_url: HttpsUrl = Field(
        default="https://api.npretail.app", description="Address of the API; https unless it is on this machine."
    )
    np_proxy: ProxyUrl | None = Field(
        default=None,
        description="HTTP proxy for the calls of the API, with `user:password@` before the host if it asks for them. It"
        " tunnels TLS. `HTTPS_PROXY` and the like are not used; nor is this one for an API on this machine.",
        examples=["http://proxy.example.com:3128"],
    )
    np_api_version: Date = Field(default="2026-08-21", description="Version of the API that every call names.")
    webhook_path: WebhookPath = Field(
        default="/webhooks/ota-channel-manager",
        description="Path that events are posted to, with or without a slash at its end.",
    )
    webhook_url: HttpsUrl | None = Field(
        default=None,
        description="Public address of the webhook, as the subscription has it. Without it a subscription to another"
        " address than ours is not noticed.",
        examples=["https://hooks.example.com/webhooks/ota-channel-manager"],
    )
    host: Host = Field(default="127.0.0.1", description="Address that `serve` listens on. The image sets `0.0.0.0`.")
    port: int = Field(ge=0, le=65535, default=8080, description="Port that `serve` listens on.")
    api_host: Host = Field(default="127.0.0.1", description="Address that `api` listens on. The image sets `0.0.0.0`.")
    api_port: int = Field(ge=0, le=65535, default=8081, description="Port that `api` listens on.")
    api_requests_per_min: int = Field(
        ge=1, le=1_000_000, default=600, description="Requests to the API that one key may make in a minute."
    )
    feed_ack_alert: SecondsOrOff = Field(
        le=7 * 86400,
        default=1800,
        description="Time after which a revision that a consumer of the feed has not acknowledged is an alert; 0 for"
        " none.",
    )
    trusted_proxies: Networks = Field(
        default="127.0.0.0/8,::1",
        validate_default=True,
        description="Addresses and networks of proxies whose `X-Forwarded-For` and `X-Request-Id` are believed.",
    )
    max_body_bytes: int = Field(
        ge=2**10, le=2**26, default=2**20, description="Largest body of a POST in bytes; a larger one is answered 413."
    )
    max_items: int = Field(
        ge=100,
        le=10_000,
        default=5000,
        description="Most items of a POST; one with more, or with more than eight `{` and `[` for each of them, is"
        " answered 413, and nothing of it is recorded.",
    )
    dedup_days: int = Field(
        ge=1,
        le=3650,
        default=7,
        description="Days in which a repeated event is recognised as a duplicate and not fetched again.",
    )
    event_days: Annotated[int, Field(ge=1, le=3650, validate_default=True), not_("below", "dedup_days", lt)] = Field(
        default=90, description="Days for which events, replays and the audit are kept; at least `DEDUP_DAYS`."
    )
    order_days: Annotated[int, Field(ge=1, le=3650, validate_default=True), not_("below", "event_days", lt)] = Field(
        default=400,
        description="Days for which orders are kept; at least `EVENT_DAYS`. Pending and dead orders never expire.",
    )
    revisions_kept: int = Field(
        ge=1,
        le=20,
        default=5,
        description="Revisions of an order whose content is kept for `orders show --diff`; 1 keeps only the latest. Of"
        " older ones the digest is kept.",
    )
    workers: int = Field(ge=1, le=256, default=8, description="Worker processes of a pool for live events.")
    backfill_workers: int = Field(
        ge=0,
        le=64,
        default=1,
        description="Worker processes of a pool for replays and reconciling. With 0 its live workers do these jobs"
        " while no live job waits.",
    )
    upstream_concurrency: int = Field(
        ge=1, le=100, default=5, description="Calls at once with one API key, on all machines together."
    )
    backfill_concurrency: Annotated[
        int, Field(ge=1, le=100, validate_default=True), not_("above", "upstream_concurrency", gt)
    ] = Field(default=1, description="Calls at once for replays and reconciling; at most `UPSTREAM_CONCURRENCY`.")
    upstream_requests_per_5_min: int = Field(
        ge=1,
        le=1_000_000,
        default=6000,
        description="Calls in any 5 minutes with one API key, on all machines together.",
    )
    upstream_timeout: Seconds = Field(ge=1, le=100, default=20, description="Time for a whole call, at most 100 s.")
    fetch_target: Seconds = Field(
        ge=1,
        le=86_400,
        default=30,
        description="95 of 100 events should be fetched within this time of their arrival; the ops page shows it.",
    )
    sinks: CommaList = Field(
        default=(),
        description="Functions that get each order, separated by commas; `entry:NAME` for that of an installed package."
        " All worker pools need the same.",
        examples=["python:mypackage.orders:on_order"],
    )
    sink_workers: int = Field(
        ge=1, le=64, default=2, description="Worker processes of a pool for each sink of `SINKS`."
    )
    sinks_file: Path | None = Field(
        default=None,
        description="TOML file of sinks: HTTP endpoints, databases, streams, files and functions, besides those of"
        " `SINKS`. [sinks.md](sinks.md) explains it.",
        examples=["/etc/ota-receiver/sinks.toml"],
    )
    spool_dir: Path | None = Field(
        default=None,
        description="Folder where `serve` keeps events while Redis is unavailable: mode 0700, or the root of a volume"
        " with the setgid bit, on a disk of this machine that outlives the process. Without it, senders get 503.",
        examples=["/var/lib/ota-receiver/spool"],
    )
    spool_max_mb: int = Field(ge=1, le=1_000_000, default=512, description="Largest size of the spool's files in MB.")
    erased_file: Path | None = Field(
        default=None,
        description="File of salted digests of the erased orders, which `orders erase` writes and the workers read, so"
        " that no erased order comes back after Redis lost its data. Keep it apart from Redis, with a backup.",
        examples=["/var/lib/ota-receiver/erased"],
    )
    reconcile_every: Seconds = Field(
        ge=60,
        le=7 * 86400,
        default=900,
        description="Time between two comparisons of the order list with the orders here. Needs `NP_PARTNER_ID`.",
    )
    subscription_check_every: SecondsOrOff = Field(
        le=7 * 86400,
        default=300,
        description="Time between two checks of each subscription by one of the worker pools; 0 for none.",
    )
    ops_token: HeaderSecret | None = Field(
        default=None,
        description="Bearer token for `/metrics` (404 without it) and for the details of `/readyz`, and the password of"
        " the [ops page](ops-page.md).",
        examples=["the output of openssl rand -hex 20"],
    )
    ops_act_token: Annotated[PasswordToAct | None, besides("ops_token")] = Field(
        default=None,
        description=f"Password of the ops page for those who may also act there, of {SHORTEST_PASSWORD} characters or"
        " more; without it no one can.",
        examples=["the output of openssl rand -hex 20"],
    )
    ops_host: Host = Field(default="127.0.0.1", description="Address that `ops` listens on. The image sets `0.0.0.0`.")
    ops_port: int = Field(ge=0, le=65535, default=8082, description="Port that `ops` listens on.")
    otel_exporter_otlp_endpoint: CollectorUrl | None = Field(
        default=None,
        description="Address of an OpenTelemetry collector, for OTLP by HTTP. Without it no traces are made."
        " [traces.md](traces.md) explains this one and the other `OTEL_…` variables.",
        examples=["http://otel-collector:4318"],
    )
    log_format: Annotated[Literal["auto", "json", "ecs", "console"], BeforeValidator(str.lower)] = Field(
        default="auto",
        description="`json`, `ecs` (JSON with the field names of Elastic), `console`, or `auto`: JSON unless stdout is"
        " a terminal.",
    )
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)] = Field(
        default="INFO", description="`DEBUG`, `INFO`, `WARNING` or `ERROR`."
    )

    _companies: tuple[Company, ...] = PrivateAttr(default=())
    _declared_sinks: tuple[SinkSettings, ...] = PrivateAttr(default=())
    _unknown: tuple[str, ...] = PrivateAttr(default=())
    _otel: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def companies(self) -> tuple[Company, ...]:
        """Return every company whose events are accepted; at least one."""
        return self._companies

    @property
    def declared_sinks(self) -> tuple[SinkSettings, ...]:
        """Return the sinks of SINKS and SINKS_FILE, each with another name."""
        return self._declared_sinks

    @property
    def deployment(self) -> str:
        """Return what tells this deployment from others on this machine; it holds the password of Redis."""
        return f"{self.key_prefix} {self.redis_url.get_secret_value()}"

    @property
    def otel(self) -> Mapping[str, str]:
        """Return the variables of OpenTelemetry, by name; OTEL_EXPORTER_OTLP_HEADERS may hold a secret."""
        return self._otel

    @property
    def unknown(self) -> tuple[str, ...]:
        """Return a sentence for each name that is no setting: of `.env`, nearly one, or of a proxy that is not used."""
        return self._unknown


_PER_COMPANY: Final = tuple(name for name in Company.model_fields if name != "slug")

NAMES: Final = (*Settings.model_fields, *_PER_COMPANY)
"""Every setting in lower case."""

_SYSTEM: Final = {"SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt", "SSL_CERT_DIR": "/etc/ssl/certs"}
_OTEL: Final = "OTEL_"
_PROXIES: Final = frozenset({"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"})

_ALL_NAMES: Final = frozenset(NAMES) | {f"{name}_file" for name in NAMES}


def load() -> Settings:
    """Return the settings of this process, from its environment and `.env`; raises SettingsError."""
    found, places = of_dotenv(Path(".env"))
    return parse({**found, **os.environ}, {name: place for name, place in places.items() if name not in os.environ})


def parse(variables: Mapping[str, str], places: Mapping[str, str] = MappingProxyType({})) -> Settings:
    """Return the settings that these variables give; `places`: where each stands that is not in the environment.

    Raises SettingsError with every problem on its own line, so that one restart is enough to correct them all.
    """
    given = {name.lower(): value for name, value in variables.items() if cleaned(value)}
    where = {name.lower(): place for name, place in places.items()}
    problems: list[str] = []
    settings = validated(Settings, given, problems, where)
    if path := given.get("companies_file"):
        companies = _companies(Path(cleaned(path)), problems)
    else:
        of_company: list[str] = []
        company = validated(Company, {**given, "slug": "default"}, of_company, where)
        companies = [company] if company else []
        problems += of_company
        if any(": missing" in line for line in of_company):
            problems.append("(or name several companies in COMPANIES_FILE)")
    sinks = tuple(_sinks(settings, {one.slug for one in companies}, problems)) if settings else ()
    for name, is_there in (("SSL_CERT_FILE", os.path.isfile), ("SSL_CERT_DIR", os.path.isdir)):
        if name not in places and (certificates := variables.get(name)) and not is_there(certificates):
            problems.append(f"{name}: {certificates} is not there, for example {_SYSTEM[name]}")
    if settings is None or problems:
        raise SettingsError("\n".join(problems))
    settings._companies = tuple(companies)
    settings._declared_sinks = sinks
    settings._otel = {
        name: cleaned(value) for name, value in variables.items() if name.startswith(_OTEL) and cleaned(value)
    }
    if settings.otel_exporter_otlp_endpoint:
        settings._otel["OTEL_EXPORTER_OTLP_ENDPOINT"] = settings.otel_exporter_otlp_endpoint
    settings._unknown = _unknown(variables, places, settings)
    return settings


def _unknown(variables: Mapping[str, str], places: Mapping[str, str], settings: Settings) -> tuple[str, ...]:
    """Return a sentence for each name that looks like a setting, or acts like one elsewhere, and has no effect here."""
    found = tuple(
        f"{name}{at(places.get(name))}: unknown name" + (f", perhaps {near.upper()}" if near else "")
        for name in variables
        if name.lower() not in _ALL_NAMES
        if (near := meant(name, _ALL_NAMES)) or (name in places and not name.startswith(_OTEL))
    )
    proxies = [name for name in variables if name.upper() in _PROXIES and variables[name] and name not in places]
    if proxies and settings.np_proxy is None:
        found += (f"{', '.join(proxies)}: not used; NP_PROXY names the proxy for the calls of the API",)
    if settings.companies_file is not None:
        of_one = {f"{name}{end}".upper() for name in _PER_COMPANY for end in ("", "_file")}
        unused = [f"{name}{at(places.get(name))}" for name in variables if name.upper() in of_one and variables[name]]
        found += tuple(f"{name}: not used, since COMPANIES_FILE names the companies" for name in unused)
    return found


def of_dotenv(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the variables of the file and where each stands; no value is expanded. Raises SettingsError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: the file {unreadable(error)}") from None
    found: dict[str, str] = {}
    places: dict[str, str] = {}
    wrong = []
    for one in parse_stream(StringIO(text)):
        # dotenv counts from the blank lines before.
        blank = re.match(r"\s*", one.original.string)
        place = f"{path} line {one.original.line + (blank[0].count(chr(10)) if blank else 0)}"
        if one.error:
            wrong.append(f"{place}: is not NAME=value, for example WORKERS=8")
        elif one.key in found:
            wrong.append(f"{one.key} ({place}): given twice, also in {places[one.key]}: remove one of them")
        elif one.key is not None:
            found[one.key], places[one.key] = one.value or "", place
    if wrong:
        raise SettingsError("\n".join(wrong))
    return found, places


def _sinks(settings: Settings, slugs: Collection[str], problems: list[str]) -> Iterator[SinkSettings]:
    """Yield the sinks of SINKS and SINKS_FILE; each problem gets its line in `problems`."""
    for specification in dict.fromkeys(settings.sinks):
        yield of_specification(specification, settings.sink_workers)
    for one, place in of_file(settings.sinks_file, problems) if settings.sinks_file else ():
        if unknown := sorted(set(one.companies) - set(slugs)):
            problems.append(f"COMPANIES ({place}): no company {', '.join(unknown)}; there are: {', '.join(slugs)}")
        yield one


def _companies(path: Path, problems: list[str]) -> list[Company]:
    """Return the companies of the tables `[companies.<slug>]` of COMPANIES_FILE."""
    example = 'np_company = "CRONUS International Ltd."'
    companies: dict[str, Company] = {}
    for table in tables(
        "COMPANIES_FILE", "companies", path, problems, example=example, named_by="slug", names=_PER_COMPANY
    ):
        problems += unknown_names(table, _PER_COMPANY)
        company = validated(Company, {**table.values, "slug": table.name}, problems, table.places)
        if company is not None:
            first = companies.setdefault(company.np_company_id, company)
            if first is not company:
                problems.append(f"NP_COMPANY_ID ({table.places['np_company_id']}): same as in [companies.{first.slug}]")
    return [*companies.values()]
