"""The environment, read once into frozen settings; every problem is named in one message, and no value is.

Each variable may also come from a file named by `NAME_FILE`; `.env` is read. Secrets are `SecretStr`: printing
the settings cannot show one.

The venues a partner sells for: the one that the environment names, or the tables of COMPANIES_FILE.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import quote, urlsplit

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from app.errors import SettingsError
from app.ids import guid


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


Guid = Annotated[str, AfterValidator(_guid)]
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


PER_COMPANY: Final = tuple(name for name in Company.model_fields if name != "slug")
"""What each table may hold, and what the environment holds for one company."""

NEEDED: Final = tuple(name for name in PER_COMPANY if Company.model_fields[name].is_required())


def from_file(path: Path) -> tuple[Company, ...]:
    """Return the companies of the TOML file's tables `[companies.<slug>]`; at least one.

    Raises SettingsError with every problem on its own line.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("companies", {})
    except (OSError, ValueError) as error:
        raise SettingsError(f"COMPANIES_FILE: cannot be read ({type(error).__name__})") from None
    if not isinstance(tables, dict) or not tables:
        raise SettingsError("COMPANIES_FILE: has no table [companies.<slug>]")
    problems: list[str] = []
    companies: list[Company] = []
    for slug, table in tables.items():
        try:
            companies.append(_company(slug, table))
        except SettingsError as error:
            problems += [f"COMPANIES_FILE [companies.{slug}] {line}" for line in str(error).splitlines()]
    seen: dict[str, str] = {}
    for company in companies:
        first = seen.setdefault(company.np_company_id, company.slug)
        if first != company.slug:
            problems.append(f"COMPANIES_FILE [companies.{company.slug}] NP_COMPANY_ID: the same as of {first}")
    if problems:
        raise SettingsError("\n".join(problems))
    return tuple(companies)


def _company(slug: str, table: object) -> Company:
    if not isinstance(table, dict):
        raise SettingsError("is not a table")
    files, troubles = read_files(table, PER_COMPANY)
    known = {*PER_COMPANY, *(f"{name}_file" for name in PER_COMPANY)}
    problems = [f"{name}: unknown name" for name in table if name not in known]
    problems += [f"{name.upper()}: {trouble}" for name, trouble in troubles.items()]
    values = {name: table[name] for name in PER_COMPANY if name in table} | files
    try:
        company = Company(slug=slug, **values)
    except ValidationError as error:
        # What could not be read is not also missing.
        problems += list(named(error, told=troubles))
    else:
        if not problems:
            return company
    raise SettingsError("\n".join(problems))


def read_files(given: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return what the files hold that `given` names as `<name>_file`, and name -> what is wrong with it."""
    values: dict[str, str] = {}
    troubles: dict[str, str] = {}
    for name in names:
        path = given.get(f"{name}_file")
        if path is None or path == "":
            continue
        if given.get(name):
            troubles[name] = f"given twice, also as {name.upper()}_FILE"
            continue
        try:
            values[name] = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, ValueError, TypeError) as error:
            troubles[name] = f"the file of {name.upper()}_FILE cannot be read ({type(error).__name__})"
    return values, troubles


def named(error: ValidationError, told: Iterable[str] = ()) -> Iterable[str]:
    """Return one line a problem, without the value: it may be a secret. `told`: names that have their line."""
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        name = ".".join(str(part) for part in problem["loc"])
        if name not in told:
            text = "missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")
            yield f"{name.upper()}: {text}"


__all__ = ["Company", "Settings", "load"]

_DURATION: Final = re.compile(r"(\d+)(s|m|h|d)?")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LOOPBACK: Final = {"127.0.0.1", "localhost", "::1"}


class _Trouble(msgspec.Struct, frozen=True):
    """Stands for a value that could not be had, until the field is validated and says why."""

    text: str


def _seconds(value: object) -> object:
    match = _DURATION.fullmatch(str(value).strip())
    if match is None:
        raise ValueError("is not a duration such as 90s, 15m or 2h")
    return int(match[1]) * _UNITS[match[2] or "s"]


def _https_unless_loopback(value: str) -> str:
    parts = _parts(value)
    if parts is None or parts[1] is None or parts[0] not in {"http", "https"} or "?" in value or "#" in value:
        raise ValueError("is not an http(s) address")
    if parts[0] == "http" and parts[1] not in _LOOPBACK:
        raise ValueError("must be https: an API key travels with every call")
    return value.rstrip("/")


def _redis_url(value: SecretStr) -> SecretStr:
    parts = _parts(value.get_secret_value())
    if parts is None or parts[0] not in {"redis", "rediss", "unix"}:
        raise ValueError("is not an address redis://, rediss:// or unix:// (percent-encode the password)")
    return value


def _parts(url: str) -> tuple[str, str | None] | None:
    """Return scheme and host of an address, None if it is none; urlsplit's own errors quote what they refuse."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts.scheme, parts.hostname


Seconds = Annotated[int, BeforeValidator(_seconds)]


class Settings(BaseSettings):
    """All that can be set; README.md explains each."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, env_file=".env")

    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)]
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
    event_days: Annotated[int, Field(ge=1, validate_default=True)] = 90
    order_days: Annotated[int, Field(ge=1, validate_default=True)] = 400
    workers: Annotated[int, Field(ge=1, le=256)] = 8
    backfill_workers: Annotated[int, Field(ge=0, le=64)] = 1
    upstream_concurrency: Annotated[int, Field(ge=1, le=100)] = 5
    backfill_concurrency: Annotated[int, Field(ge=1, le=100, validate_default=True)] = 1
    upstream_requests_per_5_min: Annotated[int, Field(ge=1)] = 6000
    upstream_timeout: Annotated[Seconds, Field(ge=1, le=100)] = 20
    spool_dir: Path | None = None
    spool_max_mb: Annotated[int, Field(ge=1)] = 512
    reconcile_every: Annotated[Seconds, Field(ge=60)] = 900
    ops_token: SecretStr | None = None
    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    sinks: Annotated[tuple[str, ...], NoDecode] = ()

    _companies: tuple[Company, ...] = PrivateAttr(default=())

    @property
    def companies(self) -> tuple[Company, ...]:
        """Return every company events are accepted from; at least one."""
        return self._companies

    @model_validator(mode="wrap")
    @classmethod
    def _tell_all(cls, given: dict[str, Any], handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Read the companies too, whatever else is wrong: nobody shall start the service once a mistake.

        Raises SettingsError.
        """
        problems: list[str] = []
        companies: tuple[Company, ...] = ()
        path = given.get("companies_file")
        if path and not isinstance(path, _Trouble):
            try:
                companies = from_file(Path(path))
            except SettingsError as error:
                problems.append(str(error))
        elif missing := [f"{name.upper()}: missing" for name in NEEDED if not given.get(name)]:
            problems += [*missing, "(or name several companies in COMPANIES_FILE)"]
        try:
            settings = handler(given)
        except ValidationError as error:
            raise SettingsError("\n".join([*named(error), *problems])) from None
        if problems:
            raise SettingsError("\n".join(problems))
        values = {name: getattr(settings, name) for name in PER_COMPANY}
        settings._companies = companies or (Company(slug="default", **values),)
        return settings

    @field_validator("*", mode="before")
    @classmethod
    def _told_by_the_source(cls, value: object) -> object:
        if isinstance(value, _Trouble):
            raise ValueError(value.text)
        return value

    @field_validator("event_days", "order_days", "backfill_concurrency", mode="after")
    @classmethod
    def _in_order(cls, value: int, info: ValidationInfo) -> int:
        """Compare with the field before; where that one is wrong itself, there is nothing to compare with."""
        below, above = {
            "event_days": ("dedup_days", None),
            "order_days": ("event_days", None),
            "backfill_concurrency": (None, "upstream_concurrency"),
        }[info.field_name or ""]
        if below is not None and value < info.data.get(below, value):
            raise ValueError(f"must not be below {below.upper()}")
        if above is not None and value > info.data.get(above, value):
            raise ValueError(f"must not be above {above.upper()}")
        return value

    @field_validator("sinks", mode="before")
    @classmethod
    def _split_sinks(cls, value: object) -> object:
        return tuple(filter(None, (part.strip() for part in value.split(",")))) if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments, then the environment, then `.env`; of a file that either names, nothing else may speak."""
        files = _NamedFiles(settings_cls, env_settings, dotenv_settings)
        return init_settings, files, env_settings, dotenv_settings


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
        names = [name for name in Settings.model_fields if name != "companies_file"]
        values, troubles = read_files(self._given, names)
        return {**values, **{name: _Trouble(text) for name, text in troubles.items()}}


def load() -> Settings:
    """Return the settings of this process.

    Raises SettingsError with every problem on its own line.
    """
    return Settings()  # type: ignore[call-arg]  # filled from the environment
