"""Settings are complete or refused, with every problem in one message and no value in it; the page agrees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import settings
from app.errors import SettingsError
from app.settings import Settings
from tests import settings_page

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


@pytest.fixture(autouse=True)
def _without_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a `.env` of the test itself is read."""
    monkeypatch.chdir(tmp_path)


def load(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None]) -> Settings:
    for name, value in {**GOOD, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    return settings.load()


def problems(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None]) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        load(monkeypatch, changes)
    return str(refused.value).splitlines()


def companies_file(path: Path, text: str) -> dict[str, str | None]:
    path.write_text(text)
    per_company = dict.fromkeys(GOOD.keys() - {"REDIS_URL"}, None)
    return {**per_company, "COMPANIES_FILE": str(path)}


def test_one_company_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(monkeypatch, {"NP_COMPANY_ID": f"{{{COMPANY_ID.upper()}}}"})

    (company,) = found.companies
    assert company.np_company_id == COMPANY_ID
    assert company.client_state.get_secret_value() == "canary-client-state"
    assert company.client_state_previous is None
    assert company.path == "/tenant/Production/CRONUS%20International%20Ltd."


def test_the_page_of_settings_is_rendered_from_their_declarations() -> None:
    """Run `python -m tests.settings_page` after a change."""
    page = settings_page.PAGE.read_text(encoding="utf-8")

    assert page == settings_page.rendered(page)
    assert [name for name in settings.NAMES if f"| `{name.upper()}` |" not in page] == []
    assert {line for line in page.splitlines() if "| – | – |" in line or "None" in line} == set()


def test_without_values_the_defaults_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(monkeypatch, {})

    assert (found.upstream_timeout, found.reconcile_every, found.spool_dir, found.sinks) == (20, 900, None, ())


def test_every_problem_is_in_one_message_and_no_value_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its kind: missing, malformed, out of range, out of order, an unreadable file, given twice."""
    found = problems(
        monkeypatch,
        {
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
            "MAX_BODY_BYTES": "1",
            "DEDUP_DAYS": "91",
            "BACKFILL_CONCURRENCY": "6",
            "UPSTREAM_TIMEOUT": "canary",
            "LOG_FORMAT": "canary",
            "OPS_TOKEN_FILE": "/nowhere/canary",
        },
    )

    names = [line.partition(":")[0] for line in found]
    assert names[-1] == "(or name several companies in COMPANIES_FILE)"
    assert len(names) == len(set(names))
    assert {*names[:-1]} == {
        *("REDIS_URL", "CLIENT_STATE", "NP_TENANT", "NP_ENVIRONMENT", "NP_COMPANY", "NP_COMPANY_ID", "NP_API_KEY"),
        *("NP_BASE_URL", "NP_API_VERSION", "WEBHOOK_PATH", "PORT", "MAX_BODY_BYTES", "EVENT_DAYS"),
        *("BACKFILL_CONCURRENCY", "UPSTREAM_TIMEOUT", "LOG_FORMAT", "OPS_TOKEN"),
    }
    assert "NP_TENANT: missing" in found
    assert "EVENT_DAYS: must not be below DEDUP_DAYS" in found
    assert "NP_API_KEY: given twice, also as NP_API_KEY_FILE" in found
    assert "canary" not in "\n".join(found).lower()


@pytest.mark.parametrize("name", ["CLIENT_STATE", "NP_API_KEY", "REDIS_URL", "OPS_TOKEN", "NP_COMPANY_ID"])
def test_a_value_may_come_from_a_file(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Container platforms mount secrets as files, with or without a newline at the end."""
    value = GOOD.get(name, "canary-ops-token")
    (tmp_path / "secret").write_text(f"{value}\n")

    found = load(monkeypatch, {name: None, f"{name}_FILE": str(tmp_path / "secret")})

    company = found.companies[0]
    held = getattr(found if hasattr(found, name.lower()) else company, name.lower())
    assert (held if isinstance(held, str) else held.get_secret_value()) == value


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"", b"\n"], ids=["absent", "binary", "empty", "blank"])
def test_a_file_without_a_usable_secret_is_refused(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "secret").write_bytes(content)

    found = problems(monkeypatch, {"CLIENT_STATE": None, "CLIENT_STATE_FILE": str(tmp_path / "secret")})

    assert {line.partition(":")[0] for line in found} >= {"CLIENT_STATE"}


def test_the_environment_overrides_dotenv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-the-file-named-in-dotenv")
    lines = {**GOOD, "NP_TENANT": "from-dotenv", "WORKERS": "3", "NP_API_KEY_FILE": str(tmp_path / "secret")}
    del lines["NP_API_KEY"]
    (tmp_path / ".env").write_text("".join(f'{name}="{value}"\n' for name, value in lines.items()))

    found = load(monkeypatch, {**dict.fromkeys(GOOD, None), "WORKERS": "4"})

    (company,) = found.companies
    assert company.np_tenant == "from-dotenv"
    assert company.np_api_key.get_secret_value() == "from-the-file-named-in-dotenv"
    assert found.workers == 4


def test_printing_settings_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(monkeypatch, {"OPS_TOKEN": "canary-ops-token", "CLIENT_STATE_PREVIOUS": "canary-former"})

    assert "canary" not in f"{found!r} {found} {found.companies!r} {found.model_dump()}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NP_BASE_URL", "http://api.npretail.app"),
        ("NP_BASE_URL", "http://127.0.0.1@evil.example"),
        ("NP_BASE_URL", "http://127.0.0.1.evil.example"),
        ("NP_BASE_URL", "ftp://127.0.0.1"),
        ("NP_BASE_URL", "api.npretail.app"),
        ("NP_BASE_URL", "https://"),
        ("NP_BASE_URL", "https://host/?key=1"),
        ("NP_BASE_URL", "https://[canary]"),
        ("NP_BASE_URL", "https://host:99999"),
        ("REDIS_URL", "127.0.0.1:6379"),
        ("REDIS_URL", "http://127.0.0.1"),
        ("REDIS_URL", "redis://:can/ary@host"),
        ("REDIS_URL", "redis://h:99999"),
        ("RECONCILE_EVERY", "15 minutes"),
        ("RECONCILE_EVERY", "-1"),
        ("RECONCILE_EVERY", "1.5h"),
        ("RECONCILE_EVERY", "h"),
        ("RECONCILE_EVERY", "59"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain http would send the API key readable; redis-py would quote a wrong address in its error."""
    (line,) = problems(monkeypatch, {name: value})

    assert line.startswith(f"{name}: ")
    assert "canary" not in line


@pytest.mark.parametrize("address", ["http://127.0.0.1:8081", "http://localhost/", "http://[::1]:1", "https://host/"])
def test_plain_http_is_allowed_to_this_machine(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, {"NP_BASE_URL": address}).np_base_url == address.rstrip("/")


@pytest.mark.parametrize(
    ("days", "named"),
    [
        (("8", "7", "9"), "EVENT_DAYS: must not be below DEDUP_DAYS"),
        (("7", "90", "89"), "ORDER_DAYS: must not be below EVENT_DAYS"),
        (("91", None, None), "EVENT_DAYS: must not be below DEDUP_DAYS"),
    ],
)
def test_events_are_kept_as_long_as_deduplication_and_orders_as_long_as_events(
    days: tuple[str | None, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forgotten event would be fetched again. An order forgotten before its events could not be replayed."""
    names = ("DEDUP_DAYS", "EVENT_DAYS", "ORDER_DAYS")

    assert problems(monkeypatch, dict(zip(names, days, strict=True))) == [named]


@pytest.mark.parametrize(("given", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("2h", 7200), ("1d", 86400)])
def test_durations_have_units(given: str, seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, {"RECONCILE_EVERY": given}).reconcile_every == seconds


def test_sinks_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, {"SINKS": " python:a:b, ,python:c:d,"}).sinks == ("python:a:b", "python:c:d")


def test_several_companies_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "zoo-state").write_text("canary-zoo-state\n")
    zoo = (
        TABLE.replace("museum]", "zoo]")
        .replace(COMPANY_ID.upper(), OTHER_ID)
        .replace('client_state = "canary-museum-state"', f'client_state_file = "{tmp_path}/zoo-state"')
    )

    found = load(monkeypatch, companies_file(tmp_path / "companies.toml", TABLE + zoo))

    assert [company.slug for company in found.companies] == ["museum", "zoo"]
    assert [company.np_company_id for company in found.companies] == [COMPANY_ID, OTHER_ID]
    assert [company.client_state.get_secret_value() for company in found.companies] == [
        "canary-museum-state",
        "canary-zoo-state",
    ]


def test_problems_of_companies_name_the_table_and_come_with_all_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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

    found = problems(monkeypatch, {**companies_file(tmp_path / "companies.toml", text), "PORT": "canary"})

    assert sorted(line.rpartition(": ")[0] for line in found) == sorted(
        [
            "PORT",
            "COMPANIES_FILE [companies.museum] colour",
            "COMPANIES_FILE [companies.museum] NP_API_KEY",
            "COMPANIES_FILE [companies.museum] CLIENT_STATE",
            "COMPANIES_FILE [companies.Zoo] SLUG",
            "COMPANIES_FILE [companies.Zoo] NP_COMPANY_ID",
            "COMPANIES_FILE [companies.Zoo] NP_COMPANY",
            "COMPANIES_FILE [companies.Zoo] NP_TENANT",
            "COMPANIES_FILE [companies.Zoo] NP_ENVIRONMENT",
            "COMPANIES_FILE [companies.Zoo] CLIENT_STATE",
            "COMPANIES_FILE [companies.Zoo] NP_API_KEY",
        ]
    )
    assert "canary" not in "\n".join(found)


def test_two_tables_cannot_name_the_same_company(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    again = TABLE.replace("museum]", "zoo]").replace(COMPANY_ID.upper(), COMPANY_ID)

    found = problems(monkeypatch, companies_file(tmp_path / "companies.toml", TABLE + again))

    assert found == ["COMPANIES_FILE [companies.zoo] NP_COMPANY_ID: same as in [companies.museum]"]


@pytest.mark.parametrize("text", ["", "companies = 5", "[companies]", "not toml", "[companies]\nzoo = 5"])
def test_a_companies_file_without_companies_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (found,) = problems(monkeypatch, companies_file(tmp_path / "companies.toml", text))

    assert found.startswith("COMPANIES_FILE")


def test_serve_without_settings_names_what_is_missing_and_exits_2(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in GOOD}

    ended = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (2, "")
    assert [name for name in GOOD if f"  {name}: missing\n" not in ended.stderr] == []
    assert "Traceback" not in ended.stderr
