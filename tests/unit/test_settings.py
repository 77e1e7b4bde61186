"""Settings are complete or refused, with every problem in one message and no value in it; the page agrees."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

from app import settings
from app.dev.stack import env_line
from app.errors import SettingsError
from app.setting_values import scheme_and_host
from app.settings import Settings
from app.sink_settings import KINDS
from tests import command, settings_page

COMPANY_ID = "b56a418d-8205-4d3a-bdbb-25d94e42abbd"
OTHER_ID = "0f3f2f5a-6d3b-4b0e-8f55-5a1c9b7d1000"
GOOD = {
    "REDIS_URL": "redis://:canary-password@127.0.0.1:6379/0",
    "CLIENT_STATE": "canary-client-state",
    "NP_TENANT": "tenant",
    "NP_ENVIRONMENT": "Production",
    "NP_COMPANY": "CRONUS International Ltd.",
    "NP_COMPANY_ID": COMPANY_ID,
    "NP_API_KEY": "canary-api-key",
}
TABLE = f"""
[companies.museum]
np_company_id = "{{{COMPANY_ID.upper()}}}"
np_company = "Museum"
np_tenant = "tenant"
np_environment = "Production"
np_api_key = "canary-museum-key"
client_state = "canary-museum-state"
"""


def load(changes: dict[str, str | None]) -> Settings:
    return settings.parse({name: value for name, value in {**GOOD, **changes}.items() if value is not None})


def problems(changes: dict[str, str | None]) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        load(changes)
    return str(refused.value).splitlines()


def companies_file(path: Path, text: str) -> dict[str, str | None]:
    path.write_text(text)
    per_company = dict.fromkeys(GOOD.keys() - {"REDIS_URL"}, None)
    return {**per_company, "COMPANIES_FILE": str(path)}


def test_one_company_is_named_by_the_environment_and_defaults_hold() -> None:
    found = load({"NP_COMPANY_ID": f"{{{COMPANY_ID.upper()}}}"})

    (company,) = found.companies
    assert company.np_company_id == COMPANY_ID
    assert company.client_state.get_secret_value() == "canary-client-state"
    assert company.client_state_previous is None
    assert company.path == "/tenant/Production/CRONUS%20International%20Ltd."
    assert (found.upstream_timeout, found.reconcile_every, found.spool_dir, found.sinks) == (20, 900, None, ())


@pytest.mark.parametrize("name", settings_page.PAGES)
def test_the_pages_of_settings_are_rendered_from_their_declarations(name: str) -> None:
    """Run `python -m tests.settings_page` after a change."""
    page = (settings_page.DOCS / name).read_text(encoding="utf-8")

    assert page == settings_page.rendered(name, page)
    assert {line for line in page.splitlines() if "| – | – |" in line or "`None`" in line} == set()


def test_the_pages_name_every_setting_and_every_kind_of_sink() -> None:
    every, of_sinks = ((settings_page.DOCS / name).read_text(encoding="utf-8") for name in settings_page.PAGES)

    assert [name for name in settings.NAMES if f"| `{name.upper()}` |" not in every] == []
    assert [one for one in re.findall(r"^## (\S+)$", of_sinks, re.MULTILINE) if one in KINDS] == [*KINDS]
    declared = {name for kind in KINDS.values() for name in kind.model_fields} - {"name", "kind"}
    assert [name for name in sorted(declared) if f"| `{name}` |" not in of_sinks] == []


def test_the_example_of_dotenv_names_every_setting() -> None:
    text = (settings_page.DOCS.parent / ".env.example").read_text(encoding="utf-8")

    assert set(re.findall(r"^(?:# )?([A-Z_0-9]+)=", text, re.M)) == {name.upper() for name in settings.NAMES}


SPECIAL = (
    "CRONUS International Ltd.",
    "Tivoli's Garden & Co",
    "a$HOME`id`;b#c&d|e<f>(g)!*?~",
    'say "hi" to\\ all',
    "=a b= c",
)


@pytest.mark.parametrize("value", SPECIAL)
def test_dotenv_means_the_same_to_a_shell_to_docker_and_here(
    value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That of `dev`, and the example with another value between its quotes."""
    line = env_line("NP_ENVIRONMENT", value)
    example = (settings_page.DOCS.parent / ".env.example").read_text(encoding="utf-8")
    assert "\nNP_ENVIRONMENT=''\n" in example
    text = example.replace("NP_ENVIRONMENT=''", line)
    (tmp_path / ".env").write_text(text)
    names = re.findall(r"^([A-Z_]+)=", text, re.MULTILINE)
    shell = "set -a; . ./.env; env -0"
    sourced = subprocess.run(
        ["/bin/sh", "-euc", shell], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True
    )
    by_shell = dict(one.split("=", 1) for one in sourced.stdout.decode().split("\0") if one)
    for name in GOOD:
        monkeypatch.delenv(name, raising=False)
        if name not in ("NP_ENVIRONMENT", "NP_COMPANY"):
            monkeypatch.setenv(name, GOOD[name])
    monkeypatch.chdir(tmp_path)

    assert (sourced.stderr, by_shell["NP_ENVIRONMENT"], by_shell["NP_COMPANY"]) == (b"", value, GOOD["NP_COMPANY"])
    assert set(names) <= by_shell.keys()
    # docker --env-file keeps the quotes.
    for found in (settings.load(), load({"NP_ENVIRONMENT": line.partition("=")[2]})):
        assert (found.companies[0].np_environment, found.companies[0].np_company) == (value, GOOD["NP_COMPANY"])


def test_every_problem_is_in_one_message_and_no_value_is() -> None:
    """Whatever its kind: missing, malformed, out of range, out of order, an unreadable file, given twice."""
    given = {
        "REDIS_URL": "postgres://canary",
        "CLIENT_STATE": "canary" * 10,
        "NP_TENANT": None,
        "NP_ENVIRONMENT": "",
        "NP_COMPANY_FILE": "/nowhere/canary",
        "NP_COMPANY_ID": "canary",
        "NP_API_KEY_FILE": "/nowhere/canary",
        "NP_BASE_URL": "http://canary.example",
        "NP_API_VERSION": "canary",
        "WEBHOOK_PATH": "canary",
        "PORT": "canary",
        "TRUSTED_PROXIES": "10.0.0.1, canary",
        "MAX_BODY_BYTES": "1",
        "DEDUP_DAYS": "91",
        "BACKFILL_CONCURRENCY": "6",
        "UPSTREAM_TIMEOUT": "canary",
        "LOG_FORMAT": "canary",
        "OPS_TOKEN_FILE": "/nowhere/canary",
    }
    found = problems(given)

    *names, advice = [line.partition(":")[0] for line in found]
    assert advice == "(or name several companies in COMPANIES_FILE)"
    # EVENT_DAYS, by default 90, is below DEDUP_DAYS.
    assert sorted(names) == sorted(({name.removesuffix("_FILE") for name in given} | {"EVENT_DAYS"}) - {"DEDUP_DAYS"})
    networks = "TRUSTED_PROXIES: must be IP addresses or networks, separated by commas, for example 127.0.0.0/8,::1"
    assert networks in found
    assert "canary" not in "\n".join(found).lower()


@pytest.mark.parametrize("name", ["CLIENT_STATE", "NP_API_KEY", "REDIS_URL", "OPS_TOKEN", "NP_COMPANY_ID"])
def test_a_value_may_come_from_a_file(name: str, tmp_path: Path) -> None:
    """Container platforms mount secrets as files, with or without a newline at the end."""
    value = GOOD.get(name, "canary-ops-token")
    (tmp_path / "secret").write_text(f"{value}\n")

    found = load({name: None, f"{name}_FILE": str(tmp_path / "secret")})

    holder = found if hasattr(found, name.lower()) else found.companies[0]
    held = getattr(holder, name.lower())
    assert (held if isinstance(held, str) else held.get_secret_value()) == value


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"", b"\n"], ids=["absent", "binary", "empty", "blank"])
def test_a_file_without_a_usable_secret_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "secret").write_bytes(content)

    found = problems({"CLIENT_STATE": None, "CLIENT_STATE_FILE": str(tmp_path / "secret")})

    assert {line.partition(":")[0] for line in found} >= {"CLIENT_STATE"}


def test_the_environment_overrides_dotenv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-the-file-named-in-dotenv")
    lines = {**GOOD, "NP_TENANT": "from-dotenv", "WORKERS": "3", "NP_API_KEY_FILE": str(tmp_path / "secret")}
    del lines["NP_API_KEY"]
    (tmp_path / ".env").write_text("".join(f'{name}="{value}"\n' for name, value in lines.items()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORKERS", "4")

    found = settings.load()

    (company,) = found.companies
    assert company.np_tenant == "from-dotenv"
    assert company.np_api_key.get_secret_value() == "from-the-file-named-in-dotenv"
    assert found.workers == 4


@pytest.mark.parametrize(
    "around", ["{}\n", "{}\r\n", " {}\t", "\ufeff{}", '"{}"', "'{}'", ' "{}"\n'], ids=lambda text: repr(text)
)
@pytest.mark.parametrize("name", ["CLIENT_STATE", "OPS_TOKEN", "NP_TENANT", "NP_API_KEY"])
@pytest.mark.parametrize("source", ["environment", "file", "table"])
def test_what_stands_around_a_value_is_no_part_of_it(name: str, around: str, source: str, tmp_path: Path) -> None:
    """`echo` adds a newline, `docker --env-file` keeps quotes, editors add a byte order mark."""
    text = around.format("the-value")
    if source == "environment":
        found = load({name: text})
    elif source == "file":
        (tmp_path / "value").write_text(text, encoding="utf-8", newline="")
        found = load({name: None, f"{name}_FILE": str(tmp_path / "value")})
    elif name == "OPS_TOKEN":
        return
    else:
        table = re.sub(rf"{name.lower()} = .*", lambda _: f"{name.lower()} = {json.dumps(text)}", TABLE)
        found = load(companies_file(tmp_path / "companies.toml", table))

    held = getattr(found if name == "OPS_TOKEN" else found.companies[0], name.lower())
    assert (held if isinstance(held, str) else held.get_secret_value()) == "the-value"


@pytest.mark.parametrize(
    ("inside", "character"),
    [("\u200b", "U+200B"), ("\u00a0", "U+00A0"), ("\n", "U+000A"), ("\udcff", "U+DCFF"), ("\x1b", "U+001B")],
)
@pytest.mark.parametrize("name", ["CLIENT_STATE", "NP_COMPANY", "REDIS_URL", "SPOOL_DIR"])
def test_an_invisible_character_inside_a_value_is_refused_by_name(name: str, inside: str, character: str) -> None:
    assert problems({name: f"canary{inside}canary"}) == [
        f"{name}: holds an invisible character ({character}); write it anew"
    ]


def test_dotenv_is_read_as_it_stands_and_unknown_names_have_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in GOOD:
        monkeypatch.delenv(name, raising=False)
    good = "\ufeff" + "".join(f'{name}="{value}"\n' for name, value in GOOD.items())
    (tmp_path / ".env").write_text(f"{good}SPOOLDIR=/spool\nMY_OWN=1\nHOST='${{HOME}}'\n", encoding="utf-8")
    monkeypatch.setenv("CLIENTSTATE", "canary")

    found = settings.load()

    assert found.host == "${HOME}"
    assert found.unknown == (
        "SPOOLDIR (.env line 8): unknown name, perhaps SPOOL_DIR",
        "MY_OWN (.env line 9): unknown name",
        "CLIENTSTATE: unknown name, perhaps CLIENT_STATE",
    )


def test_the_variables_of_opentelemetry_may_stand_in_dotenv_and_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(
        "OTEL_EXPORTER_OTLP_ENDPOINT='http://collector:4318'\nOTEL_EXPORTER_OTLP_HEADERS='api-key=canary'\n"
        "OTEL_EXPORTER_OTLP_ENDPIONT=x\n"
    )
    for name, value in (GOOD | {"OTEL_SERVICE_NAME": '"orders"', "OTEL_TRACES_SAMPLER": ""}).items():
        monkeypatch.setenv(name, value)

    found = settings.load()

    assert found.otel == {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=canary",
        "OTEL_EXPORTER_OTLP_ENDPIONT": "x",
        "OTEL_SERVICE_NAME": "orders",
    }
    assert found.unknown == (
        "OTEL_EXPORTER_OTLP_ENDPIONT (.env line 3): unknown name, perhaps OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    assert "canary" not in f"{found!r} {found} {found.model_dump()}"


def test_levels_and_formats_are_read_in_any_case() -> None:
    found = load({"LOG_LEVEL": "debug", "LOG_FORMAT": "JSON"})

    assert (found.log_level, found.log_format) == ("DEBUG", "json")


def test_printing_settings_shows_no_secret() -> None:
    found = load({"OPS_TOKEN": "canary-ops-token", "CLIENT_STATE_PREVIOUS": "canary-former"})

    assert "canary" not in f"{found!r} {found} {found.companies!r} {found.model_dump()}"


class Mistake(NamedTuple):
    """What a person who sets this up does wrong, and the one line that the program `command` then ends with.

    `env`: changes of GOOD. `dotenv`: the content of `.env`. `table`: that of COMPANIES_FILE, instead of one company.
    `files`: name -> content, None for a folder; they stand in the working directory.
    """

    env: dict[str, str | None]
    says: str
    dotenv: bytes | str = ""
    table: str = ""
    files: Mapping[str, bytes | None] = MappingProxyType({})
    command: str = "worker"


URL_EXAMPLE = "for example redis://:password@redis:6379/0"
TWICE = "remove one of them"
MUSEUM = "COMPANIES_FILE [companies.museum]"
VALUES = {
    "REDIS_URL=": f"missing, {URL_EXAMPLE}",
    "REDIS_URL=redis:6379": (
        f"is not an address redis://, rediss:// or unix:// (percent-encode the password), {URL_EXAMPLE}"
    ),
    "REDIS_URL=redis://:can/ary@redis:6379/0": (
        f"is not an address redis://, rediss:// or unix:// (percent-encode the password), {URL_EXAMPLE}"
    ),
    "REDIS_URL=redis://:canary@:6379/0": f"names no host, {URL_EXAMPLE}",
    "REDIS_URL=redis://redis:6379/orders": (
        f"must end with the number of a database, such as /0 (percent-encode the password), {URL_EXAMPLE}"
    ),
    "REDIS_URL=redis://redis:6379/0?ssl=true": (
        f"has an unknown option after the ?, or a wrong value of db; those of TLS need rediss://, {URL_EXAMPLE}"
    ),
    "REDIS_URL=rediss://redis:6379/0?ssl_ca_certs=/nowhere/ca.pem": (
        f"names a file in ssl_ca_certs that is not there, {URL_EXAMPLE}"
    ),
    "CLIENT_STATE= ": "missing, for example the output of openssl rand -hex 20",
    "CLIENT_STATE=canarycanarycanarycanarycanarycanarycanarycanarycanary": (
        "must have 1 to 50 characters, for example the output of openssl rand -hex 20"
    ),
    "CLIENT_STATE=canary\u200b-state": "holds an invisible character (U+200B); write it anew",
    "NP_API_KEY=canary-schlüssel": (
        "must be of printable ASCII characters: it is sent in a header,"
        " for example the key as NaviPartner API Keys shows it"
    ),
    "NP_COMPANY_ID=canary": "is not a GUID, for example b56a418d-8205-4d3a-bdbb-25d94e42abbd",
    "NP_PARTNER_ID=42": "is not a GUID, for example 21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e",
    "NP_TENANT=": "missing, for example 5d2c6b0e-3f1a-4a57-9d0e-0c4c5b7f1a11",
    "NP_BASE_URL=http://api.npretail.app": (
        "must be https, since what is sent there carries a secret, for example https://api.npretail.app"
    ),
    "NP_BASE_URL=api.npretail.app": "is not an http(s) address, for example https://api.npretail.app",
    "NP_API_VERSION=v1": "is not a date, for example 2026-08-21",
    "OTEL_EXPORTER_OTLP_ENDPOINT=collector:4318": "is not an http(s) address, for example http://otel-collector:4318",
    "OTEL_EXPORTER_OTLP_ENDPOINT=https://me:canary@collector": (
        "must hold no user, password or option: send a key by OTEL_EXPORTER_OTLP_HEADERS,"
        " for example http://otel-collector:4318"
    ),
    "NP_PROXY=https://me:canary@proxy:3128": (
        "is not an address http://host:port (percent-encode user and password),"
        " for example http://proxy.example.com:3128"
    ),
    "SSL_CERT_FILE=/nowhere/ca.pem": "/nowhere/ca.pem is not there, for example /etc/ssl/certs/ca-certificates.crt",
    "WEBHOOK_PATH=https://example.com/hook": (
        "must be a path: a slash, then letters, digits and any of / _ . ~ -, for example /webhooks/ota-channel-manager"
    ),
    "WEBHOOK_PATH=/readyz": "is the path of a probe, for example /webhooks/ota-channel-manager",
    "HOST=0.0.0.0:8080": "is not a host name or an IP address alone (the port is PORT), for example 127.0.0.1",
    "PORT=http": "is not a whole number, for example 8080",
    "PORT=80800": "must be at most 65535, for example 8080",
    "MAX_BODY_BYTES=1MB": "is not a whole number, for example 1048576",
    "UPSTREAM_TIMEOUT=2m": "must be at most 100s, for example 20s",
    "RECONCILE_EVERY=15 minutes": "is not a duration such as 90s, 15m or 2h30m, for example 900s",
    "WORKERS=0": "must be at least 1, for example 8",
    "KEY_PREFIX=OTA:prod": "must be of lower-case letters, digits and hyphens, at most 20, for example ota",
    "LOG_LEVEL=verbose": "must be 'DEBUG', 'INFO', 'WARNING' or 'ERROR', for example INFO",
    "ERASED_FILE=/nowhere/erased": "the folder of /nowhere/erased is missing: make it first",
    "COMPANIES_FILE=/nowhere/companies.toml": "the file is missing, for example /etc/ota-receiver/companies.toml",
}
"""NAME=value in the environment -> what is said of the name."""

MISTAKES = {
    "a secret given twice": Mistake(
        {"CLIENT_STATE_FILE": "secret"},
        f"CLIENT_STATE: given twice, also as CLIENT_STATE_FILE: {TWICE}",
        files={"secret": b"canary"},
    ),
    "a secret in the environment and in .env": Mistake(
        {},
        f"CLIENT_STATE: given twice, also as CLIENT_STATE_FILE (.env line 2): {TWICE}",
        dotenv="\nCLIENT_STATE_FILE=secret\n",
    ),
    "the file of a secret is missing": Mistake(
        {"NP_API_KEY": None, "NP_API_KEY_FILE": "/nowhere/canary"},
        "NP_API_KEY: the file of NP_API_KEY_FILE is missing, for example NP_API_KEY_FILE=/run/secrets/np_api_key",
    ),
    "a folder in place of a secret": Mistake(
        {"NP_API_KEY": None, "NP_API_KEY_FILE": "canary"},
        "NP_API_KEY: the file of NP_API_KEY_FILE is a folder, for example NP_API_KEY_FILE=/run/secrets/np_api_key",
        files={"canary": None},
    ),
    "a secret in UTF-16": Mistake(
        {"NP_API_KEY": None, "NP_API_KEY_FILE": "canary"},
        "NP_API_KEY: the file of NP_API_KEY_FILE is not UTF-8 text,"
        " for example NP_API_KEY_FILE=/run/secrets/np_api_key",
        files={"canary": "canary".encode("utf-16")},
    ),
    "a token that no header carries": Mistake(
        {"OPS_TOKEN": "canary-tökén"},
        "OPS_TOKEN: must be of printable ASCII characters: it is sent in a header, for example the output of openssl"
        " rand -hex 20",
        command="serve",
    ),
    "a comment behind a value": Mistake(
        {},
        "RECONCILE_EVERY (.env line 1): is not a duration such as 90s, 15m or 2h30m, for example 900s",
        dotenv="RECONCILE_EVERY='15m # a quarter'\n",
    ),
    "events forgotten too early": Mistake(
        {"DEDUP_DAYS": "91"}, "EVENT_DAYS: is 90, and must not be below DEDUP_DAYS, which is 91"
    ),
    "a file as spool": Mistake(
        {"SPOOL_DIR": "spool"}, "SPOOL_DIR: spool is not a folder", files={"spool": b""}, command="serve"
    ),
    "a spool in a missing folder": Mistake(
        {"SPOOL_DIR": "/nowhere/spool"},
        "SPOOL_DIR: /nowhere/spool is in a folder that is missing: make it first",
        command="serve",
    ),
    "YAML in .env": Mistake({}, ".env line 2: is not NAME=value, for example WORKERS=8", dotenv="# it\nNP_TENANT: a b"),
    ".env in UTF-16": Mistake({}, ".env: the file is not UTF-8 text", dotenv="WORKERS=4".encode("utf-16")),
    "a wrong value in .env": Mistake(
        {}, "WORKERS (.env line 3): must be at least 1, for example 8", dotenv="PORT=80\n\nWORKERS=-1\n"
    ),
    "two values in .env": Mistake(
        {}, f"WORKERS (.env line 2): given twice, also in .env line 1: {TWICE}", dotenv="WORKERS=4\nWORKERS=5\n"
    ),
    "no quotes in TOML": Mistake(
        {},
        'COMPANIES_FILE line 2: is not TOML, for example np_company = "CRONUS International Ltd."',
        table="[companies.museum]\nnp_company = Museum\n",
    ),
    "no table of a company": Mistake(
        {},
        "COMPANIES_FILE: has no table [companies.NAME], for example [companies.museum]",
        table='[museum]\nnp_company = "Museum"\n',
    ),
    "an unknown name in a table": Mistake(
        {},
        f"np_partnerid ({MUSEUM} line 9): unknown name, perhaps np_partner_id",
        table=f'{TABLE}np_partnerid = "canary"\n',
    ),
    "a number for a text": Mistake(
        {},
        f"NP_TENANT ({MUSEUM} line 5): must be a text in quotes, for example 5d2c6b0e-3f1a-4a57-9d0e-0c4c5b7f1a11",
        table=TABLE.replace('"tenant"', "42"),
    ),
    "a capital name of a table": Mistake(
        {},
        "SLUG (COMPANIES_FILE [companies.Museum] line 2): the table's name must be of lower-case letters, digits, - and"
        " _, at most 31, for example museum",
        table=TABLE.replace("museum]", "Museum]"),
    ),
    "one company in two tables": Mistake(
        {},
        "NP_COMPANY_ID (COMPANIES_FILE [companies.zoo] line 11): same as in [companies.museum]",
        table=TABLE + TABLE.replace("museum]", "zoo]"),
    ),
    **{
        given: Mistake({name: value}, f"{name}: {text}")
        for given, text in VALUES.items()
        for name, _, value in [given.partition("=")]
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_start_with_one_plain_sentence(
    mistake: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has the name, the line of a file, and an example; never a secret."""
    env, says, dotenv, table, files, program = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).mkdir() if content is None else Path(name).write_bytes(content)
    if dotenv:
        Path(".env").write_bytes(dotenv if isinstance(dotenv, bytes) else dotenv.encode())
    changes = companies_file(Path("companies.toml"), table) if table else env
    variables = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}

    ended = command.run([program], variables, "")

    hint = "(or name several companies in COMPANIES_FILE)"
    lines = [line.strip() for line in ended.err.splitlines()]
    assert (ended.code, [line for line in lines if line != hint]) == (
        2,
        ["The settings are incomplete or wrong:", says],
    )
    assert "canary" not in ended.err.replace("/nowhere/canary", "")


def test_what_has_no_effect_is_named(tmp_path: Path) -> None:
    proxies: dict[str, str | None] = {"HTTPS_PROXY": "http://canary:1", "all_proxy": "http://canary:1"}
    several = {**companies_file(tmp_path / "companies.toml", TABLE), "CLIENT_STATE": "canary", "NP_API_KEY_FILE": "/x"}

    assert load(proxies).unknown == (
        "HTTPS_PROXY, all_proxy: not used; NP_PROXY names the proxy for the calls of the API",
    )
    assert load({**proxies, "NP_PROXY": "http://proxy:3128"}).unknown == ()
    assert load(several).unknown == (
        "CLIENT_STATE: not used, since COMPANIES_FILE names the companies",
        "NP_API_KEY_FILE: not used, since COMPANIES_FILE names the companies",
    )


WRONG = {
    "NP_BASE_URL": (
        *("http://api.npretail.app", "http://127.0.0.1@evil.example", "http://127.0.0.1.evil.example"),
        *("ftp://127.0.0.1", "api.npretail.app", "https://", "https://host/?key=1", "https://[canary]"),
        "https://host:99999",
    ),
    "WEBHOOK_PATH": ("/", "//host/path", "hook", "/a?b", "/healthz", "/readyz/", "/metrics"),
    "REDIS_URL": (
        *("127.0.0.1:6379", "http://127.0.0.1", "redis://:can/ary@host", "redis://h:99999", "redis://h:canary"),
        *("REDIS://h", "redis://h/abc", "redis://h/1/2", "redis://h/-1", "redis://h/0/", "redis://h/99e9"),
        *("redis://h?canary=1", "redis://h?canary=", "redis://h?protocol=3", "redis://h?decode_responses=1"),
        *("redis://h?socket_timeout=canary", "redis://h?db=canary", "redis://:can?ary=1@h", "redis://h?ssl_certfile=c"),
        *("rediss://h?ssl_cert_reqs=canary", "unix:///socket?protocol=3", "redis://:can/ary@host", "redis://h/canary"),
        *("redis://canary:12/3@host", "redis://:12?canary@host", "redis://:1#canary@host", "unix://:can/ary@/socket"),
        *("redis+sentinel://:canary@h:26379/main", "redis://h/0?password=canary", "redis://:can[ary@h"),
    ),
    "DEDUP_DAYS": ("9" * 20,),
    "SPOOL_MAX_MB": ("9" * 20, "1e3"),
    "UPSTREAM_TIMEOUT": ("9" * 5000, "101"),
    "RECONCILE_EVERY": ("15 minutes", "-1", "1.5h", "h", "59"),
    "SUBSCRIPTION_CHECK_EVERY": ("59", "8d", "never"),
    "WEBHOOK_URL": ("http://hooks.example.com/", "hooks.example.com", "https://h/?code=canary"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name(name: str, value: str) -> None:
    """Plain http would send the API key readable; redis-py would quote a wrong address in its error."""
    (line,) = problems({name: value})

    assert line.startswith(f"{name}: ")
    assert "canary" not in line


@pytest.mark.parametrize(
    "url",
    ["redis://h", "redis://u:p@h:1/15", "unix:///s?db=1", f"rediss://h/?ssl_cert_reqs=none&ssl_ca_certs={__file__}"],
)
def test_an_address_of_redis_may_name_a_database_and_files_of_tls(url: str) -> None:
    assert load({"REDIS_URL": url}).redis_url.get_secret_value() == url


@pytest.mark.parametrize("address", ["http://127.0.0.1:8081", "http://localhost/", "http://[::1]:1", "https://host/"])
def test_plain_http_is_allowed_to_this_machine(address: str) -> None:
    assert load({"NP_BASE_URL": address}).np_base_url == address.rstrip("/")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://shop.example.com/hooks/canary?token=canary", "https://shop.example.com"),
        ("postgresql+psycopg://user:can@ry@db.example.com/orders", "postgresql+psycopg://db.example.com"),
        ("redis://:canary@redis.example.com:6379/1", "redis://redis.example.com"),
        ("sqlite:////var/lib/orders.db", "sqlite://"),
        ("postgresql://canary/more@db.example.com/orders", "an address"),
        ("postgresql://canary:12#34@db.example.com/orders", "an address"),
        ("postgresql://user:can/ary@db.example.com/orders", "an address"),
        ("redis://[canary@redis.example.com", "an address"),
    ],
)
def test_only_scheme_and_host_of_an_address_are_shown(address: str, shown: str) -> None:
    """A password that is not percent-encoded may look like the host."""
    assert scheme_and_host(address) == shown


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("CRONUS%20International%20Ltd.", "CRONUS International Ltd."),
        ("CRONUS+International+Ltd.", "CRONUS International Ltd."),
        ("Z%C3%BCri%2BZoo", "Züri+Zoo"),
        ("100 % Zoo + Co", "100 % Zoo + Co"),
        ("100%Zoo", "100%Zoo"),
    ],
)
def test_a_company_name_may_be_copied_from_an_address(given: str, name: str) -> None:
    (company,) = load({"NP_COMPANY": given}).companies

    assert company.np_company == name


def test_events_are_kept_as_long_as_deduplication_and_orders_as_long_as_events() -> None:
    """A forgotten event would be fetched again. An order forgotten before its events could not be replayed."""
    assert problems({"EVENT_DAYS": "90", "ORDER_DAYS": "89"}) == [
        "ORDER_DAYS: is 89, and must not be below EVENT_DAYS, which is 90"
    ]
    assert load(dict.fromkeys(("DEDUP_DAYS", "EVENT_DAYS", "ORDER_DAYS"), "30")).order_days == 30


@pytest.mark.parametrize(("given", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("2h30m", 9000), ("1d", 86400)])
def test_durations_have_units(given: str, seconds: int) -> None:
    assert load({"RECONCILE_EVERY": given}).reconcile_every == seconds


def test_sinks_are_separated_by_commas() -> None:
    assert load({"SINKS": " python:a:b, ,python:c:d,"}).sinks == ("python:a:b", "python:c:d")


def test_several_companies_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "zoo-state").write_text("canary-zoo-state\n")
    zoo = (
        TABLE.replace("museum]", "zoo]")
        .replace(COMPANY_ID.upper(), OTHER_ID)
        .replace('client_state = "canary-museum-state"', f'client_state_file = "{tmp_path}/zoo-state"')
    )

    found = load(companies_file(tmp_path / "companies.toml", TABLE + zoo))

    assert [(one.slug, one.np_company_id, one.client_state.get_secret_value()) for one in found.companies] == [
        ("museum", COMPANY_ID, "canary-museum-state"),
        ("zoo", OTHER_ID, "canary-zoo-state"),
    ]


def test_problems_of_companies_name_the_table_and_come_with_all_others(tmp_path: Path) -> None:
    text = f"""
    [companies.museum]
    np_company_id = "{COMPANY_ID}"
    np_company = "Museum"
    np_tenant = "tenant"
    np_environment = "Production"
    np_api_key = "canary"
    np_api_key_file = "/nowhere/canary"
    client_state_file = "/nowhere/canary"
    colour = "canary"
    [companies.Zoo]
    np_company_id = "canary"
    client_state = 5
    np_api_key_file = 5
    """

    found = problems({**companies_file(tmp_path / "companies.toml", text), "PORT": "canary"})

    museum = {"colour": " line 10", "NP_API_KEY": " line 7", "CLIENT_STATE": " line 9"}
    zoo = {"SLUG": " line 11", "NP_COMPANY_ID": " line 12", "CLIENT_STATE": " line 13", "NP_API_KEY": " line 14"}
    zoo |= dict.fromkeys(("NP_COMPANY", "NP_TENANT", "NP_ENVIRONMENT"), "")
    assert sorted(line.partition(": ")[0] for line in found) == sorted(
        [
            "PORT",
            *(f"{name} (COMPANIES_FILE [companies.museum]{line})" for name, line in museum.items()),
            *(f"{name} (COMPANIES_FILE [companies.Zoo]{line})" for name, line in zoo.items()),
        ]
    )
    assert "canary" not in "\n".join(found)


@pytest.mark.parametrize("text", ["", "companies = 5", "[companies]", "not toml", "[companies]\nzoo = 5"])
def test_a_companies_file_without_companies_is_refused(text: str, tmp_path: Path) -> None:
    (found,) = problems(companies_file(tmp_path / "companies.toml", text))

    assert found.startswith("COMPANIES_FILE")


def test_serve_without_settings_names_what_is_missing_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    ended = command.run(["serve"], {}, "")

    assert (ended.code, ended.out) == (2, "")
    assert [name for name in GOOD if f"  {name}: missing" not in ended.err] == []


@pytest.mark.parametrize("program", ["serve", "worker"])
def test_with_json_logs_a_failed_start_is_a_json_line(
    program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    ended = command.run([program], {**GOOD, "LOG_FORMAT": "json", "WORKERS": "0"}, "")

    (line,) = ended.objects
    assert (ended.code, ended.err, line["event"]) == (2, "", "service.bad_settings")
    assert line["problems"] == ["WORKERS: must be at least 1, for example 8"]
