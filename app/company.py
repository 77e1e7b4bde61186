"""The venues a partner sells for: the one that the environment names, or the tables of COMPANIES_FILE."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from app.errors import SettingsError

_GUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _guid(value: str) -> str:
    text = value.strip().strip("{}").lower()
    if not _GUID.fullmatch(text):
        raise ValueError("is not a GUID")
    return text


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
