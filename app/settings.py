"""The environment, read once into frozen settings; every problem is named in one message, and no value is.

Each variable may also come from a file named by `NAME_FILE`; `.env` is read. Secrets are `SecretStr`: printing
the settings cannot show one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

import msgspec
from pydantic import (
    AfterValidator,
    BeforeValidator,
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
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app import company
from app.company import ApiKey, ClientState, Company, Guid
from app.errors import SettingsError

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
                companies = company.from_file(Path(path))
            except SettingsError as error:
                problems.append(str(error))
        elif missing := [f"{name.upper()}: missing" for name in company.NEEDED if not given.get(name)]:
            problems += [*missing, "(or name several companies in COMPANIES_FILE)"]
        try:
            settings = handler(given)
        except ValidationError as error:
            raise SettingsError("\n".join([*company.named(error), *problems])) from None
        if problems:
            raise SettingsError("\n".join(problems))
        values = {name: getattr(settings, name) for name in company.PER_COMPANY}
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
        values, troubles = company.read_files(self._given, names)
        return {**values, **{name: _Trouble(text) for name, text in troubles.items()}}


def load() -> Settings:
    """Return the settings of this process.

    Raises SettingsError with every problem on its own line.
    """
    return Settings()  # type: ignore[call-arg]  # filled from the environment
