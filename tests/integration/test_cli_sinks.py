"""`sinks migrate`, and what `check` says of the databases of sinks."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import get_context
from typing import Any

import pytest
from pydantic import SecretStr

from app.sink_settings import SqlSink
from tests.command import Ended, without_settings
from tests.lab import Lab
from tests.lab_upstream import exit_code, forked
from tests.postgres import PASSWORD, Postgres, postgres
from workers.sinks import sql_schema
from workers.sinks.sql import Tables

UPGRADE = ("ALTER TABLE ota_order ADD COLUMN note TEXT", "CREATE INDEX ota_order_note ON ota_order (note)")


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as one:
        yield one


def sinks_file(lab: Lab, **urls: str) -> dict[str, str]:
    """Declare a sql sink of each name and address; return the variable that names the file."""
    path = lab.folder / "sinks.toml"
    tables = [f'[sinks.{name}]\nkind = "sql"\nurl = "{url}"\n' for name, url in urls.items()]
    path.write_text("\n".join(tables))
    return {"SINKS_FILE": str(path)}


def migrate(lab: Lab, *arguments: str, **urls: str) -> Ended:
    ended = lab.run_command("sinks", "migrate", *arguments, **sinks_file(lab, **urls))
    assert PASSWORD not in ended.out + ended.err
    return ended


def in_folder(lab: Lab, name: str) -> str:
    return f"sqlite:///{lab.folder / name}"


def columns(lab: Lab, name: str) -> dict[str, Any]:
    """Return the definition of each table and index of a file of SQLite."""
    with closing(sqlite3.connect(lab.folder / name)) as connection:
        return dict(connection.execute("select name, sql from sqlite_master where sql is not null"))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, lab: Lab) -> str:
    if request.param == "sqlite":
        return in_folder(lab, "orders.db")
    server: Postgres = request.getfixturevalue("server")
    return server.url(server.new_schema())


def test_migrate_creates_the_tables_once(lab: Lab, url: str) -> None:
    first, second = (migrate(lab, "--json", warehouse=url) for _ in range(2))

    assert [(one.code, one.err) for one in (first, second)] == [(0, ""), (0, "")]
    assert first.objects == [{"sink": "warehouse", "before": 0, "version": 1}]
    assert second.objects == [{"sink": "warehouse", "before": 1, "version": 1}]
    assert migrate(lab, warehouse=url).out == "warehouse: tables up to date, version 1.\n"


def test_the_sql_of_a_dry_run_creates_the_same_when_a_person_runs_it(lab: Lab, server: Postgres) -> None:
    """psql with the printed text, and the comments of the columns with it."""
    ours, theirs = server.new_schema(), server.new_schema()
    printed = migrate(lab, "--dry-run", warehouse=server.url(ours))
    assert migrate(lab, "--dry-run", warehouse=server.url(ours)).out == printed.out, "it has changed something"
    migrate(lab, warehouse=server.url(ours))

    psql = [str(server.programs / "psql"), "-q", "-v", "ON_ERROR_STOP=1", server.url(theirs).replace("+psycopg", "")]
    subprocess.run(psql, input=printed.out, text=True, check=True, timeout=20)

    described = (
        "select table_name, column_name, data_type, is_nullable, col_description((table_schema || '.' || table_name)"
        "::regclass, ordinal_position) from information_schema.columns where table_schema = '{0}' order by 1, 2"
    )
    indexes = "select replace(indexdef, '{0}.', '') from pg_indexes where schemaname = '{0}' order by indexname"
    for query in (described, indexes):
        found = [server.run_sql("public", query.format(schema)) for schema in (ours, theirs)]
        assert found[0] == found[1] != []
    again = migrate(lab, "--dry-run", warehouse=server.url(theirs))
    assert (again.code, again.out) == (0, "-- warehouse: up to date\n")


def test_an_upgrade_adds_what_is_new_and_keeps_the_rows(lab: Lab, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the version before goes on writing, and refuses to change the newer tables."""
    migrate(lab, warehouse=url)
    monkeypatch.setattr(sql_schema, "UPGRADES", (UPGRADE, ("ALTER TABLE ota_item ADD COLUMN note TEXT",)))

    printed = migrate(lab, "--dry-run", "--json", warehouse=url).objects[0]["statements"]
    done = migrate(lab, warehouse=url)

    assert done.out == "warehouse: tables upgraded from version 1, version 3.\n"
    assert [one for one in printed if "INSERT" not in one] == [*UPGRADE, "ALTER TABLE ota_item ADD COLUMN note TEXT"]
    assert migrate(lab, "--json", warehouse=url).objects == [{"sink": "warehouse", "before": 3, "version": 3}]

    monkeypatch.setattr(sql_schema, "UPGRADES", ())
    older = migrate(lab, warehouse=url)
    assert (older.code, older.out) == (1, "")
    assert older.err == "warehouse: the tables are of version 3, newer than this program knows (1).\n"
    with closing(Tables(SqlSink(name="warehouse", url=SecretStr(url)))) as tables:
        assert tables.version() == (3, 1)


def test_an_upgrade_that_fails_leaves_everything_as_it_was(lab: Lab, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate(lab, warehouse=url)
    monkeypatch.setattr(sql_schema, "UPGRADES", ((*UPGRADE, "ALTER TABLE no_such ADD COLUMN note TEXT"),))
    assert migrate(lab, warehouse=url).code == 1

    monkeypatch.setattr(sql_schema, "UPGRADES", (UPGRADE,))
    assert migrate(lab, warehouse=url).out == "warehouse: tables upgraded from version 1, version 2.\n"


def test_several_runs_at_once_create_the_tables_once(lab: Lab, url: str) -> None:
    together = get_context("fork").Barrier(4)

    def run() -> None:
        with closing(Tables(SqlSink(name="warehouse", url=SecretStr(url)))) as tables:
            tables.version()
            together.wait(10)
            tables.migrate()
        os._exit(7)  # not reached after an error

    assert [exit_code(pid) for pid in [forked(run) for _ in range(4)]] == [7] * 4
    assert migrate(lab, "--json", warehouse=url).objects == [{"sink": "warehouse", "before": 1, "version": 1}]


def test_a_name_chooses_one_sink(lab: Lab) -> None:
    urls = {name: in_folder(lab, f"{name}.db") for name in ("shop", "warehouse")}

    assert migrate(lab, "warehouse", **urls).out == "warehouse: tables created, version 1.\n"
    assert not (lab.folder / "shop.db").exists()
    assert migrate(lab, **urls).out == ("shop: tables created, version 1.\nwarehouse: tables up to date, version 1.\n")
    unknown = migrate(lab, "archive", **urls)
    assert (unknown.code, unknown.err) == (1, "SINKS_FILE has no such sink of kind sql. There are: shop, warehouse.\n")
    assert lab.run_command("sinks", "migrate").code == 1


def test_a_database_that_is_away_or_refuses_ends_the_command_in_one_sentence(lab: Lab, server: Postgres) -> None:
    url = server.url()
    away = migrate(lab, warehouse=url.replace(str(server.port), "1"))
    refused = migrate(lab, warehouse=url.replace("//ota:", "//unknown:"))

    assert [one.code for one in (away, refused)] == [1, 1]
    assert away.err == refused.err == "warehouse: cannot connect: OperationalError.\n"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgres://ota:canary-password@host/orders", "URL is no address of a database that SQLAlchemy knows"),
        ("canary-password", "URL is no address of a database that SQLAlchemy knows"),
        ("postgresql+psycopg://ota:canary-password@host:port/orders", "URL is no address of a database"),
        (
            "postgresql+asyncpg://ota:canary-password@host/orders",
            "URL: its driver cannot be imported (no module asyncpg)",
        ),
        ("mysql+pymysql://ota:canary-password@host/orders", "URL: its driver cannot be imported (no module pymysql)"),
        ("postgresql+psycopg_async://ota:canary-password@host/orders", "URL names a driver for asyncio"),
        ("sqlite://", "URL names no file"),
        ("sqlite:///:memory:", "URL names no file"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_without_showing_it(lab: Lab, url: str, reason: str) -> None:
    ended = migrate(lab, warehouse=url)

    assert (ended.code, ended.out) == (2, "")
    assert f"SINKS_FILE [sinks.warehouse]: {reason}" in ended.err
    assert "host" not in ended.err.replace("@host/database", "")


def test_check_says_whether_the_tables_are_there(lab: Lab, server: Postgres) -> None:
    url = server.url(server.new_schema())

    def found(url: str) -> dict[str, Any]:
        ended = lab.run_command("check", "--json", **sinks_file(lab, warehouse=url))
        assert PASSWORD not in ended.out + ended.err
        return next(one for one in ended.objects if one["what"] == "database" or one["level"] == "wrong")

    missing = found(url)
    assert (missing["level"], missing["detail"]) == ("todo", "the tables are missing")
    assert missing["advice"] == "Run ota-receiver sinks migrate warehouse"
    migrate(lab, warehouse=url)
    assert (found(url)["level"], found(url)["detail"]) == ("good", "answers, and has tables of version 1")
    away = found(url.replace(str(server.port), "1"))
    assert (away["level"], away["detail"]) == ("todo", "cannot connect: OperationalError")
    assert found("sqlite://")["level"] == "wrong"


def test_only_what_uses_a_database_loads_sqlalchemy() -> None:
    """It takes 15 MB of each process."""
    code = """if True:
        import sys
        from app.sink_settings import SqlSink, of_specification
        from workers.sinks.build import build
        import app.bootstrap, app.cli.check, app.cli.sinks, workers.pool
        build([of_specification("python:operator:is_")])
        assert not {"sqlalchemy", "psycopg"} & sys.modules.keys()
        build([SqlSink(name="warehouse", url="sqlite:///orders.db")])
        assert "sqlalchemy" in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], env=without_settings(os.environ), check=True, timeout=30)
