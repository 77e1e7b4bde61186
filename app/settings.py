"""The environment, read once into frozen settings; every problem is named in one message, and no value is.

Each variable may also come from a file named by `NAME_FILE`; `.env` is read. Secrets are `SecretStr`: printing
the settings cannot show one.
"""

from __future__ import annotations

import re
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app.errors import SettingsError

_GUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DURATION = re.compile(r"(\d+)(s|m|h|d)?")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def _guid(value: str) -> str:
    text = value.strip().strip("{}").lower()
    if not _GUID.fullmatch(text):
        raise ValueError("is not a GUID")
    return text


def _seconds(value: object) -> object:
    match = _DURATION.fullmatch(str(value).strip())
    if match is None:
        raise ValueError("is not a duration such as 90s, 15m or 2h")
    return int(match[1]) * _UNITS[match[2] or "s"]


def _https_unless_loopback(value: str) -> str:
    parts = urlsplit(value)
    if parts.hostname is None or parts.scheme not in {"http", "https"} or parts.query or parts.fragment:
        raise ValueError("is not an http(s) address")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise ValueError("must be https: an API key travels with every call")
    return value.rstrip("/")


def _client_state(value: SecretStr) -> SecretStr:
    """Refuse what a subscription cannot carry: clientState is 1 to 50 characters (upstream.md 3)."""
    if not 1 <= len(value.get_secret_value()) <= 50:
        raise ValueError("must have 1 to 50 characters")
    return value


Guid = Annotated[str, AfterValidator(_guid)]
Seconds = Annotated[int, BeforeValidator(_seconds)]
ClientState = Annotated[SecretStr, AfterValidator(_client_state)]
ApiKey = Annotated[SecretStr, Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class Company(BaseModel):
    """One venue that the partner sells for: its address at the Channel Manager and its secrets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slug: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")]
    np_company_id: Guid
    np_company: Text
    np_tenant: Text
    np_environment: Text
    np_api_key: ApiKey
    np_partner_id: Guid | None = None
    client_state: ClientState
    client_state_previous: ClientState | None = None

    @property
    def path(self) -> str:
        """Return `/tenant/environment/company`, each part percent-encoded once (upstream.md 2)."""
        parts = (self.np_tenant, self.np_environment, self.np_company)
        return "".join("/" + quote(part, safe="") for part in parts)


class Settings(BaseSettings):
    """All that can be set; README.md explains each."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, env_file=".env")

    redis_url: SecretStr
    client_state: ClientState | None = None
    client_state_previous: ClientState | None = None
    np_base_url: Annotated[str, AfterValidator(_https_unless_loopback)] = "https://api.npretail.app"
    np_api_key: ApiKey | None = None
    np_api_version: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = "2026-08-21"
    np_tenant: str | None = None
    np_environment: str | None = None
    np_company: str | None = None
    np_company_id: Guid | None = None
    np_partner_id: Guid | None = None
    companies_file: Path | None = None
    webhook_path: Annotated[str, Field(pattern=r"^/[A-Za-z0-9/_.~-]+$")] = "/webhooks/ota-channel-manager"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    max_body_bytes: Annotated[int, Field(ge=1024, le=64 * 1024 * 1024)] = 1024 * 1024
    dedup_days: Annotated[int, Field(ge=1)] = 7
    event_days: Annotated[int, Field(ge=1)] = 90
    order_days: Annotated[int, Field(ge=1)] = 400
    workers: Annotated[int, Field(ge=1, le=256)] = 8
    backfill_workers: Annotated[int, Field(ge=0, le=64)] = 1
    upstream_concurrency: Annotated[int, Field(ge=1, le=100)] = 5
    backfill_concurrency: Annotated[int, Field(ge=1, le=100)] = 1
    upstream_requests_per_5_min: Annotated[int, Field(ge=1)] = 6000
    upstream_timeout: Annotated[Seconds, Field(ge=1, le=100)] = 20
    spool_dir: Path | None = None
    spool_max_mb: Annotated[int, Field(ge=1)] = 512
    reconcile_every: Annotated[Seconds, Field(ge=60)] = 900
    ops_token: SecretStr | None = None
    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    sinks: Annotated[tuple[str, ...], NoDecode] = ()

    @field_validator("sinks", mode="before")
    @classmethod
    def _split_sinks(cls, value: object) -> object:
        return tuple(filter(None, (part.strip() for part in value.split(",")))) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _ordered_retention(self) -> Settings:
        if not self.dedup_days <= self.event_days <= self.order_days:
            raise ValueError("DEDUP_DAYS <= EVENT_DAYS <= ORDER_DAYS must hold")
        if self.backfill_concurrency > self.upstream_concurrency:
            raise ValueError("BACKFILL_CONCURRENCY must not be above UPSTREAM_CONCURRENCY")
        return self

    @cached_property
    def companies(self) -> tuple[Company, ...]:
        """Return every company events are accepted from; at least one."""
        return _companies_from_file(self.companies_file) if self.companies_file else (_company_from(self),)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments first, then the environment, then `.env`, then the files that either names."""
        return (
            init_settings,
            env_settings,
            dotenv_settings,
            _NamedFiles(settings_cls, env_settings, dotenv_settings),
        )


class _NamedFiles(PydanticBaseSettingsSource):
    """Values out of files: `NAME_FILE=/run/secrets/name` as container platforms hand secrets over."""

    def __init__(self, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource) -> None:
        super().__init__(settings_cls)
        self._given: dict[str, str] = {}
        for source in reversed(sources):
            if isinstance(source, EnvSettingsSource):
                self._given.update({key.lower(): value for key, value in source.env_vars.items() if value})

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        problems: list[str] = []
        values = _from_files(self._given, tuple(Settings.model_fields), problems)
        if problems:
            raise SettingsError("\n".join(problems))
        return values


_PER_COMPANY = tuple(name for name in Company.model_fields if name != "slug")
_NEEDED = ("np_company_id", "np_company", "np_tenant", "np_environment", "np_api_key", "client_state")


def load() -> Settings:
    """Return the settings of this process.

    Raises SettingsError with every problem on its own line.
    """
    try:
        settings = Settings()  # type: ignore[call-arg]  # filled from the environment
        _ = settings.companies
    except ValidationError as error:
        raise SettingsError("\n".join(_named(error))) from None
    return settings


def _from_files(given: dict[str, str], names: tuple[str, ...], problems: list[str]) -> dict[str, str]:
    """Return what the files hold that `given` names as `<name>_file`."""
    values: dict[str, str] = {}
    for name in names:
        path = given.get(f"{name}_file")
        if not path or f"{name}_file" in names:
            continue
        if given.get(name):
            problems.append(f"{name.upper()}: given twice, also as {name.upper()}_FILE")
            continue
        try:
            values[name] = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{name.upper()}_FILE: cannot be read ({type(error).__name__})")
    return values


def _company_from(settings: Settings) -> Company:
    values = {name: getattr(settings, name) for name in _PER_COMPANY}
    missing = [f"{name.upper()}: missing" for name in _NEEDED if not values[name]]
    if missing:
        raise SettingsError("\n".join([*missing, "(or name several companies in COMPANIES_FILE)"]))
    return Company(slug="default", **values)


def _companies_from_file(path: Path) -> tuple[Company, ...]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("companies", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"COMPANIES_FILE: cannot be read ({type(error).__name__})") from error
    if not isinstance(tables, dict) or not tables:
        raise SettingsError("COMPANIES_FILE: has no table [companies.<slug>]")
    problems: list[str] = []
    companies: list[Company] = []
    for slug, table in tables.items():
        where = f"COMPANIES_FILE [companies.{slug}]"
        if not isinstance(table, dict):
            problems.append(f"{where}: is not a table")
            continue
        known = {*_PER_COMPANY, *(f"{name}_file" for name in _PER_COMPANY)}
        problems += [f"{where} {name}: unknown name" for name in table if name not in known]
        local: list[str] = []
        values = {name: table[name] for name in _PER_COMPANY if name in table}
        values.update(_from_files(table, _PER_COMPANY, local))
        problems += [f"{where} {line}" for line in local]
        try:
            companies.append(Company(slug=slug, **values))
        except ValidationError as error:
            problems += [f"{where} {line}" for line in _named(error)]
    ids = [company.np_company_id for company in companies]
    twice = sorted({one for one in ids if ids.count(one) > 1})
    problems += [f"COMPANIES_FILE: company id {one} stands in two tables" for one in twice]
    if problems:
        raise SettingsError("\n".join(problems))
    return tuple(companies)


def _named(error: ValidationError) -> list[str]:
    """Return one line a problem, without the value: it may be a secret."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        name = ".".join(str(part) for part in problem["loc"]).upper()
        text = "missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")
        lines.append(f"{name}: {text}" if name else text)
    return lines
