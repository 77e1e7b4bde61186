"""All settings, each declared once: name, default, meaning and example. tests/settings_page.py renders their page.

They come from the environment or `.env`; each may also come from the file that `NAME_FILE` names. `load` reports every
problem in one message without any value, since a value may be a secret. Secrets are `SecretStr` and print as stars.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from operator import gt, lt
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, TypeVar
from urllib.parse import parse_qsl, quote, unquote_plus, urlsplit

from dotenv.parser import parse_stream
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from app.errors import SettingsError
from app.ids import guid

_DURATION: Final = re.compile(r"(\d{1,9})(s|m|h|d)?")
_UNITS: Final = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DATABASE: Final = re.compile(r"/?|/[0-9]{1,5}")
_REDIS_OPTIONS: Final = {
    "db": "[0-9]{1,5}",
    "ssl_cert_reqs": "none|optional|required",
    "ssl_check_hostname": "(?i:true|false)",
    "ssl_ca_certs": ".+",
    "ssl_certfile": ".+",
    "ssl_keyfile": ".+",
}
"""Options of REDIS_URL, those of TLS only for rediss://. Time-outs, protocol and the rest are ours."""
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


def _header(value: SecretStr) -> SecretStr:
    """Refuse what no header of HTTP can carry."""
    if not re.fullmatch(r"[!-~](?:[ -~]*[!-~])?", value.get_secret_value()):
        raise ValueError("must be of printable ASCII characters")
    return value


def _company_name(value: str) -> str:
    """Decode a name that was copied from an address: it has no blank, and holds what stands for one there."""
    return unquote_plus(value) if re.fullmatch(r"\S*(?:%[0-9A-Fa-f]{2}|\+)\S*", value) else value


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


def _not_a_probe(value: str) -> str:
    if value.rstrip("/") in {"/healthz", "/readyz", "/metrics"}:
        raise ValueError("is the path of a probe")
    return value


def _redis_url(value: SecretStr) -> SecretStr:
    """Refuse what redis-py would ignore, or would raise only when it connects, with a text that quotes it."""
    url = value.get_secret_value()
    if _parts(url) is None or not url.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("is not an address redis://, rediss:// or unix:// (percent-encode the password)")
    parts = urlsplit(url)
    is_database = parts.scheme == "unix" or _DATABASE.fullmatch(parts.path)
    # With an @ after host and port, these are a part of the password, and would be shown.
    if "@" in parts.path or parts.fragment or not is_database:
        raise ValueError("must end with the number of a database, such as /0 (percent-encode the password)")
    allowed = _REDIS_OPTIONS if parts.scheme == "rediss" else {"db": _REDIS_OPTIONS["db"]}
    for name, option in parse_qsl(parts.query, keep_blank_values=True):
        if name not in allowed or not re.fullmatch(allowed[name], option):
            raise ValueError(f"has an option that is not one of {', '.join(allowed)}, or is not valid")
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


class Declared(BaseModel):
    """Settings, and where each came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def secrets(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, value and origin of each secret that is set."""
        for name in type(self).model_fields:
            if isinstance(value := getattr(self, name), SecretStr):
                yield name.upper(), value.get_secret_value(), self._origins[name]


class Company(Declared):
    """One company of upstream that the partner sells for, and its secrets."""

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
    np_company: Annotated[Text, AfterValidator(_company_name)] = Field(
        description="Company name, from the same page, plain or as the address there shows it. Write a plus in a name"
        " without blanks as `%2B`.",
        examples=["CRONUS International Ltd."],
    )
    np_company_id: Guid = Field(
        description="GUID of the company. Only its events are accepted.",
        examples=["b56a418d-8205-4d3a-bdbb-25d94e42abbd"],
    )
    np_api_key: Annotated[SecretStr, AfterValidator(_header)] = Field(
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


class Settings(Declared):
    """The settings of a process; `load` reads them."""

    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] = Field(
        description="Address of Redis: `redis://`, `rediss://` for TLS, or `unix://`.",
        examples=["redis://:password@redis:6379/0"],
    )
    key_prefix: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,19}$")] = Field(
        default="ota",
        description="Before all keys in Redis, and RQ's names of queues and jobs: lower-case letters, digits and"
        " hyphens, at most 20. Each deployment on one Redis needs its own.",
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
    webhook_path: Annotated[
        str, Field(pattern=r"^/[A-Za-z0-9_.~-][A-Za-z0-9/_.~-]*$"), AfterValidator(_not_a_probe)
    ] = Field(
        default="/webhooks/ota-channel-manager",
        description="Path that events are posted to, with or without a slash at its end.",
    )
    host: str = Field(default="127.0.0.1", description="Address that `serve` listens on. The image sets `0.0.0.0`.")
    port: int = Field(ge=0, le=65535, default=8080, description="Port that `serve` listens on.")
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], BeforeValidator(_comma_list)] = Field(
        default="127.0.0.0/8,::1", validate_default=True, description="Networks of proxies whose headers are believed."
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
    event_days: Annotated[int, Field(ge=1, le=3650, validate_default=True), _not("below", "dedup_days", lt)] = Field(
        default=90, description="Days for which events, replays and the audit are kept; at least `DEDUP_DAYS`."
    )
    order_days: Annotated[int, Field(ge=1, le=3650, validate_default=True), _not("below", "event_days", lt)] = Field(
        default=400,
        description="Days for which orders are kept; at least `EVENT_DAYS`. Pending and dead orders never expire.",
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
        int, Field(ge=1, le=100, validate_default=True), _not("above", "upstream_concurrency", gt)
    ] = Field(default=1, description="Calls at once for replays and reconciling; at most `UPSTREAM_CONCURRENCY`.")
    upstream_requests_per_5_min: int = Field(
        ge=1,
        le=1_000_000,
        default=6000,
        description="Calls in any 5 minutes with one API key, on all machines together.",
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
    spool_max_mb: int = Field(ge=1, le=1_000_000, default=512, description="Largest size of `SPOOL_DIR` in MB.")
    reconcile_every: Seconds = Field(
        ge=60,
        le=7 * 86400,
        default=900,
        description="Time between two comparisons of the order list with the orders here. Needs `NP_PARTNER_ID`.",
    )
    ops_token: SecretStr | None = Field(
        default=None, description="Bearer token for `/metrics` (404 without it) and for the details of `/readyz`."
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
    _unknown: tuple[str, ...] = PrivateAttr(default=())

    @property
    def companies(self) -> tuple[Company, ...]:
        """Return every company whose events are accepted; at least one."""
        return self._companies

    @property
    def unknown(self) -> tuple[str, ...]:
        """Return a sentence for each name in `.env` that is no setting, or that is nearly one."""
        return self._unknown


_PER_COMPANY: Final = tuple(name for name in Company.model_fields if name != "slug")

NAMES: Final = (*Settings.model_fields, *_PER_COMPANY)
"""Every setting in lower case."""

_ALL_NAMES: Final = frozenset(NAMES) | {f"{name}_file" for name in NAMES}

_SENTENCES: Final = {
    "missing": "missing",
    "int_parsing": "is not a whole number",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "is empty",
    "too_short": "is empty",
    "string_pattern_mismatch": "has not the right form",
    "literal_error": "must be {expected}",
}
"""pydantic's kind of error -> what is wrong, in plain words; other kinds keep pydantic's text."""

_Model = TypeVar("_Model", bound="Declared")


def load() -> Settings:
    """Return the settings of this process, from its environment and `.env`; raises SettingsError."""
    found, places = _of_dotenv(Path(".env"))
    return parse({**found, **os.environ}, {name: place for name, place in places.items() if name not in os.environ})


def parse(variables: Mapping[str, str], places: Mapping[str, str] = MappingProxyType({})) -> Settings:
    """Return the settings that these variables give; `places`: where each stands that is not in the environment.

    Raises SettingsError with every problem on its own line, so that one restart is enough to correct them all.
    """
    given = {name.lower(): value for name, value in variables.items() if _clean(value)}
    where = {name.lower(): place for name, place in places.items()}
    problems: list[str] = []
    settings = _validated(Settings, given, problems, where)
    if path := given.get("companies_file"):
        companies = _from_file(Path(_clean(path)), problems)
    else:
        of_company: list[str] = []
        company = _validated(Company, {**given, "slug": "default"}, of_company, where)
        companies = [company] if company else []
        problems += of_company
        if any(": missing" in line for line in of_company):
            problems.append("(or name several companies in COMPANIES_FILE)")
    if settings is None or problems:
        raise SettingsError("\n".join(problems))
    settings._companies = tuple(companies)
    settings._unknown = tuple(
        f"{name}{_at(places.get(name))}: unknown name" + (f", perhaps {meant}" if meant else "")
        for name in variables
        if name.lower() not in _ALL_NAMES
        if (meant := _meant(name)) or name in places
    )
    return settings


def _of_dotenv(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the variables of the file and where each stands; no value is expanded. Raises SettingsError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read ({type(error).__name__})") from None
    lines = [*parse_stream(StringIO(text))]
    if wrong := [f"{path} line {one.original.line}: is not NAME=value" for one in lines if one.error]:
        raise SettingsError("\n".join(wrong))
    named = [(one.key, one.value or "", f"{path} line {one.original.line}") for one in lines if one.key is not None]
    return {name: value for name, value, _ in named}, {name: place for name, _, place in named}


def _clean(value: str) -> str:
    """Return a value without the blanks and the pair of quotes that editors and `docker --env-file` leave around it."""
    text = value.strip().strip("\ufeff").strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _invisible(value: str) -> str | None:
    """Return the name of the first character that no one sees in an editor, None if there is none."""
    found = (one for one in value if one != " " and unicodedata.category(one) in {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})
    return next((f"U+{ord(one):04X}" for one in found), None)


def _meant(name: str) -> str | None:
    """Return the setting that a wrong name nearly is (`SPOOLDIR`, `CLIENT_STATES`); None for names of others."""
    squashed = {known.replace("_", ""): known for known in _ALL_NAMES}
    near = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), squashed, 1, 0.93)
    return squashed[near[0]].upper() if near else None


def _at(place: str | None) -> str:
    return f" ({place})" if place else ""


def _validated(
    model: type[_Model], given: Mapping[str, Any], problems: list[str], where: Mapping[str, str]
) -> _Model | None:
    """Return the model of what is given, by name or as `name_file`; None after a problem, which gets its line.

    `where`: name -> the place that messages name.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    found: dict[str, str] = {}
    for name in model.model_fields:
        path = given.get(f"{name}_file")
        if path and given.get(name):
            found[name] = f"given twice, also as {name.upper()}_FILE"
        elif path:
            try:
                values[name] = Path(_clean(str(path))).read_text(encoding="utf-8")
                origins[name] = f"the file of {name.upper()}_FILE"
            except (OSError, ValueError) as error:
                found[name] = f"the file of {name.upper()}_FILE cannot be read ({type(error).__name__})"
        elif name in given:
            values[name] = given[name]
            origins[name] = where.get(name, "the environment")
        if isinstance(value := values.get(name), str):
            values[name] = _clean(value)
            if invisible := _invisible(values[name]):
                found[name] = f"holds an invisible character ({invisible}); write it anew"
    result = None
    try:
        result = model(**values)
    except ValidationError as error:
        # The value itself is left out: it may be a secret.
        for problem in error.errors(include_url=False, include_input=False):
            name = str(problem["loc"][0])
            found.setdefault(name, _sentence(problem, model.model_fields.get(name)))
    problems += [f"{name.upper()}{_at(where.get(name))}: {text}" for name, text in found.items()]
    if found or result is None:
        return None
    result._origins = origins
    return result


def _sentence(problem: ErrorDetails, field: FieldInfo | None) -> str:
    """Return what is wrong with a value and an example of a right one."""
    kind = problem["type"]
    text = _SENTENCES.get(kind, problem["msg"].removeprefix("Value error, ")).format(**problem.get("ctx", {}))
    examples = [*(field.examples or ()), *([field.default] if kind in _SENTENCES else [])] if field else []
    return f"{text}, for example {examples[0]}" if examples and isinstance(examples[0], str | int) else text


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
        where = f"COMPANIES_FILE [companies.{slug}]"
        if not isinstance(table, dict):
            problems.append(f"{where}: is not a table")
            continue
        problems += [f"{name} ({where}): unknown name" for name in table if name not in names]
        company = _validated(Company, {**table, "slug": slug}, problems, dict.fromkeys(("slug", *_PER_COMPANY), where))
        if company is not None:
            first = companies.setdefault(company.np_company_id, company)
            if first is not company:
                problems.append(f"NP_COMPANY_ID ({where}): same as in [companies.{first.slug}]")
    return [*companies.values()]
