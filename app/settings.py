"""All settings, each declared once: name, default, meaning and example. tests/settings_page.py renders their page.

They come from the environment or `.env`; each may also come from the file that `NAME_FILE` names. `load` reports every
problem in one message without any value, since a value may be a secret. Secrets are `SecretStr` and print as stars.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from operator import gt, lt
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar
from urllib.parse import quote, urlsplit

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
)

from app.errors import SettingsError
from app.ids import guid

_DURATION: Final = re.compile(r"(\d+)(s|m|h|d)?")
_UNITS: Final = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_LOOPBACK: Final = {"127.0.0.1", "localhost", "::1"}


def _guid(value: str) -> str:
    found = guid(value.strip())
    if found is None:
        raise ValueError("is not a GUID")
    return found


def _client_state(value: SecretStr) -> SecretStr:
    """Refuse what a subscription cannot carry: clientState is 1 to 50 characters (upstream.md 3)."""
    if not 1 <= len(value.get_secret_value()) <= 50:
        raise ValueError("must have 1 to 50 characters")
    return value


def _seconds(value: object) -> int:
    match = _DURATION.fullmatch(str(value).strip())
    if match is None:
        raise ValueError("is not a duration such as 90s, 15m or 2h")
    return int(match[1]) * _UNITS[match[2] or "s"]


def _https_unless_loopback(value: str) -> str:
    parts = _parts(value)
    if parts is None or parts[1] is None or parts[0] not in {"http", "https"} or "?" in value or "#" in value:
        raise ValueError("is not an http(s) address")
    if parts[0] == "http" and parts[1] not in _LOOPBACK:
        raise ValueError("must be https, because each call carries the API key")
    return value.rstrip("/")


def _redis_url(value: SecretStr) -> SecretStr:
    parts = _parts(value.get_secret_value())
    if parts is None or parts[0] not in {"redis", "rediss", "unix"}:
        raise ValueError("is not an address redis://, rediss:// or unix:// (percent-encode the password)")
    return value


def _parts(url: str) -> tuple[str, str | None] | None:
    """Return scheme and host of an address, None if it is not one; urlsplit's own errors quote the address."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts.scheme, parts.hostname


def _comma_list(value: object) -> object:
    return tuple(filter(None, (part.strip() for part in value.split(",")))) if isinstance(value, str) else value


def _not(relation: str, other: str, is_wrong: Callable[[int, int], bool]) -> AfterValidator:
    """Compare with a field that was declared before; if that one is wrong itself, there is nothing to compare with."""

    def check(value: int, info: ValidationInfo) -> int:
        if is_wrong(value, info.data.get(other, value)):
            raise ValueError(f"must not be {relation} {other.upper()}")
        return value

    return AfterValidator(check)


_AS_SECONDS: Final = BeforeValidator(_seconds)

Guid = Annotated[str, AfterValidator(_guid)]
ClientState = Annotated[SecretStr, AfterValidator(_client_state)]
Text = Annotated[str, Field(min_length=1)]
Seconds = Annotated[int, _AS_SECONDS]


class Company(BaseModel):
    """One company of upstream that the partner sells for, and its secrets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slug: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")]
    """Its name in logs, metrics and commands: `default`, or the name of its table in COMPANIES_FILE."""

    client_state: ClientState = Field(description="Secret of the webhook subscription, 1 to 50 characters.")
    client_state_previous: ClientState | None = Field(
        default=None,
        description="The previous secret, accepted during a rotation. Remove it a day after the last event with it.",
    )
    np_tenant: Text = Field(
        description="Tenant, from the Business Central page *NaviPartner API URL*.",
        examples=["5d2c6b0e-3f1a-4a57-9d0e-0c4c5b7f1a11"],
    )
    np_environment: Text = Field(description="Environment, from the same page.", examples=["Production"])
    np_company: Text = Field(description="Company name, from the same page.", examples=["CRONUS International Ltd."])
    np_company_id: Guid = Field(
        description="GUID of the company. Only its events are accepted.",
        examples=["b56a418d-8205-4d3a-bdbb-25d94e42abbd"],
    )
    np_api_key: Annotated[SecretStr, Field(min_length=1)] = Field(
        description="API key, from the page *NaviPartner API Keys*; permission set `NPR API Channel Mgr`."
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


class Settings(BaseModel):
    """The settings of a process; `load` reads them."""

    model_config = ConfigDict(frozen=True)

    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] = Field(
        description="Address of Redis: `redis://`, `rediss://` for TLS, or `unix://`.",
        examples=["redis://:password@redis:6379/0"],
    )
    key_prefix: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,19}$")] = Field(
        default="ota",
        description="Before all keys in Redis, and RQ's names of queues and jobs. Each deployment on one"
        " Redis needs its own.",
    )
    companies_file: Path | None = Field(
        default=None,
        description="TOML file of several companies, instead of the settings of one company below.",
        examples=["/etc/ota-receiver/companies.toml"],
    )
    np_base_url: Annotated[str, AfterValidator(_https_unless_loopback)] = Field(
        default="https://api.npretail.app", description="Address of the API; https unless it is on this machine."
    )
    np_api_version: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = Field(
        default="2026-08-21", description="Version of the API that every call names."
    )
    webhook_path: Annotated[str, Field(pattern=r"^/[A-Za-z0-9/_.~-]+$")] = Field(
        default="/webhooks/ota-channel-manager", description="Path that events are posted to."
    )
    host: str = Field(default="127.0.0.1", description="Address that `serve` listens on. The image sets `0.0.0.0`.")
    port: int = Field(ge=0, le=65535, default=8080, description="Port that `serve` listens on.")
    max_body_bytes: int = Field(
        ge=2**10, le=2**26, default=2**20, description="Largest body of a POST in bytes; a larger one is answered 413."
    )
    dedup_days: int = Field(
        ge=1,
        default=7,
        description="Days in which a repeated event is recognised as a duplicate and not fetched again.",
    )
    event_days: Annotated[int, Field(ge=1, validate_default=True), _not("below", "dedup_days", lt)] = Field(
        default=90, description="Days for which events, replays and the audit are kept; at least `DEDUP_DAYS`."
    )
    order_days: Annotated[int, Field(ge=1, validate_default=True), _not("below", "event_days", lt)] = Field(
        default=400,
        description="Days for which orders are kept; at least `EVENT_DAYS`. Pending and dead orders never expire.",
    )
    workers: int = Field(ge=1, le=256, default=8, description="Worker processes of a pool for live events.")
    backfill_workers: int = Field(
        ge=0, le=64, default=1, description="Worker processes of a pool for replays and reconciling."
    )
    upstream_concurrency: int = Field(
        ge=1, le=100, default=5, description="Calls at once with one API key, on all machines together."
    )
    backfill_concurrency: Annotated[
        int, Field(ge=1, le=100, validate_default=True), _not("above", "upstream_concurrency", gt)
    ] = Field(default=1, description="Calls at once for replays and reconciling; at most `UPSTREAM_CONCURRENCY`.")
    upstream_requests_per_5_min: int = Field(
        ge=1, default=6000, description="Calls in any 5 minutes with one API key, on all machines together."
    )
    upstream_timeout: Seconds = Field(ge=1, le=100, default=20, description="Time for a whole call, at most 100 s.")
    sinks: Annotated[tuple[str, ...], BeforeValidator(_comma_list)] = Field(
        default=(),
        description="Functions that get each order, separated by commas. All worker pools need the same.",
        examples=["python:mypackage.orders:on_order"],
    )
    spool_dir: Path | None = Field(
        default=None,
        description="Folder where `serve` keeps events while Redis is unavailable: mode 0700, on a disk of this machine"
        " that outlives the process. Without it, senders get 503.",
        examples=["/var/lib/ota-receiver/spool"],
    )
    spool_max_mb: int = Field(ge=1, default=512, description="Largest size of `SPOOL_DIR` in MB.")
    reconcile_every: Seconds = Field(
        ge=60,
        default=900,
        description="Time between two comparisons of the order list with the orders here. Needs `NP_PARTNER_ID`.",
    )
    ops_token: SecretStr | None = Field(
        default=None, description="Bearer token for `/metrics` (404 without it) and for the details of `/readyz`."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`json`, `console`, or `auto`: JSON unless stdout is a terminal."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="`DEBUG`, `INFO`, `WARNING` or `ERROR`."
    )

    _companies: tuple[Company, ...] = PrivateAttr(default=())

    @property
    def companies(self) -> tuple[Company, ...]:
        """Return every company whose events are accepted; at least one."""
        return self._companies


_PER_COMPANY: Final = tuple(name for name in Company.model_fields if name != "slug")

NAMES: Final = (*Settings.model_fields, *_PER_COMPANY)
"""Every setting in lower case."""

_Model = TypeVar("_Model", bound=BaseModel)


def load() -> Settings:
    """Return the settings of this process, from its environment and `.env`; raises SettingsError."""
    return parse({**_filled(dotenv_values(".env")), **_filled(os.environ)})


def parse(variables: Mapping[str, str]) -> Settings:
    """Return the settings that these variables give.

    Raises SettingsError with every problem on its own line, so that one restart is enough to correct them all.
    """
    given = _filled(variables)
    problems: list[str] = []
    settings = _validated(Settings, given, problems)
    if path := given.get("companies_file"):
        companies = _from_file(Path(path), problems)
    else:
        of_company: list[str] = []
        company = _validated(Company, {**given, "slug": "default"}, of_company)
        companies = [company] if company else []
        problems += of_company
        if any(line.endswith(": missing") for line in of_company):
            problems.append("(or name several companies in COMPANIES_FILE)")
    if settings is None or problems:
        raise SettingsError("\n".join(problems))
    settings._companies = tuple(companies)
    return settings


def _filled(variables: Mapping[str, str | None]) -> dict[str, str]:
    """Return the variables that are not empty, by their names in lower case."""
    return {name.lower(): value for name, value in variables.items() if value}


def _validated(model: type[_Model], given: Mapping[str, Any], problems: list[str], where: str = "") -> _Model | None:
    """Return the model of what is given, by name or as `name_file`; None after a problem, which gets its line."""
    values: dict[str, Any] = {}
    found: dict[str, str] = {}
    for name in model.model_fields:
        path = given.get(f"{name}_file")
        if path and given.get(name):
            found[name] = f"given twice, also as {name.upper()}_FILE"
        elif path:
            try:
                values[name] = Path(path).read_text(encoding="utf-8").strip()
            except (OSError, ValueError, TypeError) as error:
                found[name] = f"the file of {name.upper()}_FILE cannot be read ({type(error).__name__})"
        elif name in given:
            values[name] = given[name]
    result = None
    try:
        result = model(**values)
    except ValidationError as error:
        # The value itself is left out: it may be a secret.
        for problem in error.errors(include_url=False, include_input=False, include_context=False):
            text = "missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")
            found.setdefault(".".join(str(part) for part in problem["loc"]), text)
    problems += [f"{where}{name.upper()}: {text}" for name, text in found.items()]
    return None if found else result


def _from_file(path: Path, problems: list[str]) -> list[Company]:
    """Return the companies of the TOML file's tables `[companies.<slug>]`."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("companies", {})
    except (OSError, ValueError) as error:
        problems.append(f"COMPANIES_FILE: cannot be read ({type(error).__name__})")
        return []
    if not isinstance(tables, dict) or not tables:
        problems.append("COMPANIES_FILE: has no table [companies.<slug>]")
        return []
    names = {*_PER_COMPANY, *(f"{name}_file" for name in _PER_COMPANY)}
    companies: dict[str, Company] = {}
    for slug, table in tables.items():
        where = f"COMPANIES_FILE [companies.{slug}] "
        if not isinstance(table, dict):
            problems.append(f"{where}is not a table")
            continue
        problems += [f"{where}{name}: unknown name" for name in table if name not in names]
        company = _validated(Company, {**table, "slug": slug}, problems, where)
        if company is not None:
            first = companies.setdefault(company.np_company_id, company)
            if first is not company:
                problems.append(f"{where}NP_COMPANY_ID: same as in [companies.{first.slug}]")
    return [*companies.values()]
