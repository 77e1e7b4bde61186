"""The kind sql: orders as rows, on SQLite and on a real PostgreSQL, whatever the database does meanwhile."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import msgspec
import psycopg
import pytest
from pydantic import SecretStr

from app.dev.sandbox.process import Sandbox
from app.order_document import OrderDocument
from app.sink_settings import SqlSink
from app.upstream.models import Asset, Item, Order, Wallet
from tests.lab_upstream import WorkerLab, exit_code, forked, worker_lab
from tests.postgres import PASSWORD, Postgres, postgres
from tests.samples import COMPANY_ID, ORDER_ID, document
from workers.sinks import sql, sql_schema
from workers.sinks.contract import Failed, Unavailable
from workers.sinks.sql import Tables

ROOT = Path(__file__).parents[2]
FETCHED = 1_780_000_000_000
TABLES = ("ota_order", "ota_item", "ota_wallet", "ota_asset", "ota_order_event")
MISSING = "tables are missing or old (`sinks migrate warehouse` makes them)"


@dataclass
class Database:
    """One empty database: its address, and what runs SQL there for a person."""

    url: str
    run: Callable[..., list[Any]]

    @property
    def is_sqlite(self) -> bool:
        return self.url.startswith("sqlite")

    def counts(self) -> list[int]:
        return [self.run(f"select count(*) from {table}")[0][0] for table in TABLES]

    def column(self, query: str) -> list[Any]:
        return [row[0] for row in self.run(query)]

    def refuse(self, order_id: str, code: str = "23514") -> None:
        """Let the database refuse an order, with an error of this SQLSTATE whose text holds people's data."""
        if self.is_sqlite:
            action = "BEGIN SELECT RAISE(ABORT, 'canary Jane Doe'); END"
            self.run(f"CREATE TRIGGER refuse BEFORE INSERT ON ota_order WHEN NEW.order_id = '{order_id}' {action}")
            return
        body = f"BEGIN RAISE EXCEPTION 'canary %', NEW.sell_to_name USING ERRCODE = '{code}'; END"
        self.run(
            f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$",
            f"CREATE TRIGGER refuse BEFORE INSERT ON ota_order FOR EACH ROW WHEN (NEW.order_id = '{order_id}')"
            " EXECUTE FUNCTION refuse()",
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as one:
        yield one


def in_sqlite(folder: Path) -> Database:
    path = folder / "orders.db"

    def run(*statements: str) -> list[Any]:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            return [connection.execute(statement).fetchall() for statement in statements][-1]

    return Database(f"sqlite:///{path}", run)


def in_postgres(server: Postgres) -> Database:
    name = server.new_schema()
    return Database(server.url(name), lambda *statements: server.run_sql(name, *statements))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    return in_sqlite(tmp_path) if request.param == "sqlite" else in_postgres(request.getfixturevalue("server"))


@pytest.fixture
def in_server(server: Postgres) -> Database:
    return in_postgres(server)


def tables_of(url: str) -> Tables:
    """Return the sink `warehouse` of this address, whose connection ends with the test."""
    found = Tables(SqlSink(name="warehouse", url=SecretStr(url)))
    _open.append(found)
    return found


_open: list[Tables] = []


@pytest.fixture(autouse=True)
def connections_end_with_the_test() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


@pytest.fixture
def tables(database: Database) -> Tables:
    """The sink of the database, which has its tables."""
    return migrated(database)


def migrated(database: Database) -> Tables:
    found = tables_of(database.url)
    found.migrate()
    return found


def deliver(tables: Tables, *documents: OrderDocument) -> None:
    for one in documents:
        tables.deliver(one, cast("Any", None))


def revision(number: int, *, at: int = 0, content: str = "", name: str = "order-issued") -> OrderDocument:
    """Return a revision that was fetched `at` so many ms after FETCHED; its content is that of its number, or named."""
    content = content or f"{number:x}"
    key = f"{COMPANY_ID}/{ORDER_ID}/{number}/{content}"
    return document(name, revision=number, digest=content, idempotency_key=key, fetched_at=FETCHED + (at or number))


def test_an_order_is_rows_of_its_parts_with_exact_money_and_times(database: Database, tables: Tables) -> None:
    deliver(tables, document("order-issued"))

    assert database.counts() == [1, 2, 2, 3, 1]
    assert database.column("select type || ' ' || reference_number from ota_asset order by asset_position") == [
        "ticket TK-000123456",
        "ticket TK-000123457",
        "coupon CP-0009981",
    ]
    ((fetched_at, received_at, day, hour),) = database.run(
        "select o.fetched_at, received_at, visit_date, visit_time from ota_order o join ota_item"
        " using (company_id, order_id) where item_position = 2"
    )
    prices = database.column("select unit_price_incl_vat from ota_wallet order by wallet_position")
    schedule = database.column("select component_schedule from ota_item where item_position = 2")[0]
    if database.is_sqlite:
        assert (fetched_at, received_at) == ("2026-05-28 20:26:40.000000", "2026-06-01 08:15:02.417000")
        assert (day, hour, prices) == ("2026-06-10", "11:00:00.000000", ["200.0", "300.0"])
        schedule = json.loads(schedule)
    else:
        assert fetched_at == datetime(2026, 5, 28, 20, 26, 40, tzinfo=UTC)
        assert received_at == datetime(2026, 6, 1, 8, 15, 2, 417000, tzinfo=UTC)
        assert (day, hour, prices) == (date(2026, 6, 10), time(11), [Decimal("200.0"), Decimal("300.0")])
    assert [one["itemNumber"] for one in schedule] == ["31010"]
    assert database.column("select extra from ota_order") == [None]


def test_the_outbox_has_the_document_under_the_names_that_debezium_reads(database: Database, tables: Tables) -> None:
    one = document("order-issued")
    deliver(tables, one)

    ((*names, payload),) = database.run("select id, aggregatetype, aggregateid, type, payload from ota_order_event")

    assert names == [one.idempotency_key, "order", f"{COMPANY_ID}/{ORDER_ID}", "Issued"]
    assert (json.loads(payload) if database.is_sqlite else payload) == json.loads(one.encode())


@pytest.mark.parametrize(
    ("part", "table", "elsewhere"),
    [
        (Order, sql_schema.ORDER, {"items", "row_version"}),  # the list alone has row versions
        (Item, sql_schema.ITEM, {"wallets"}),
        (Wallet, sql_schema.WALLET, {"assets"}),
        (Asset, sql_schema.ASSET, set()),
    ],
)
def test_each_field_of_an_order_has_a_column(part: type[msgspec.Struct], table: Any, elsewhere: set[str]) -> None:
    assert set(part.__struct_fields__) - set(table.c.keys()) == elsewhere


def test_odd_values_are_kept_as_they_were_sent(database: Database, tables: Tables) -> None:
    """Unknown fields, money beyond any float, no wallets at all."""
    wallet = Wallet(name="ø\N{PILE OF POO}'\"%s", unit_price_incl_vat=Decimal("12345678901234567.10"), extra={"a": [1]})
    items = (Item(wallets=(wallet,), extra={"fee": Decimal("1.50")}), Item())
    order = msgspec.structs.replace(document("order-draft").order, items=items)

    deliver(tables, document("order-draft", order=order))

    ((name, price, extra),) = database.run("select name, unit_price_incl_vat, extra from ota_wallet")
    assert (name, str(price)) == (wallet.name, "12345678901234567.10")
    assert (json.loads(extra) if database.is_sqlite else extra) == {"a": [1]}
    assert database.counts() == [1, 2, 1, 0, 1]


def test_a_repeat_changes_nothing(database: Database, tables: Tables) -> None:
    """Also one that was fetched again meanwhile, with the same content."""
    deliver(tables, revision(1), revision(1), revision(1, at=500))

    assert database.counts() == [1, 2, 2, 3, 1]


def test_a_newer_revision_replaces_all_parts(database: Database, tables: Tables) -> None:
    deliver(tables, revision(1), revision(2, name="order-draft"))

    counts, draft = database.counts(), document("order-draft").order
    parts = (draft.items, draft.wallets, [one for wallet in draft.wallets for one in wallet.assets])
    assert counts == [1, *map(len, parts), 2]
    assert database.column("select status from ota_order") == ["Draft"]


@pytest.mark.parametrize("order", [*permutations([1, 2, 3])], ids=str)
def test_an_older_content_is_never_written_over_a_newer_one(
    database: Database, tables: Tables, order: tuple[int, ...]
) -> None:
    """The last row of the outbox is what the tables have."""
    deliver(tables, *map(revision, order))

    assert database.column("select revision from ota_order") == [3]
    seen = [order[0], *(new for at, new in enumerate(order) if at and new > max(order[:at]))]
    assert database.column("select id from ota_order_event order by fetched_at") == [
        f"{COMPANY_ID}/{ORDER_ID}/{number}/{number}" for number in seen
    ]


def test_after_redis_was_emptied_the_time_of_the_fetch_decides_and_not_the_revision(
    database: Database, tables: Tables
) -> None:
    """An earlier content that is there again is a new event, though its idempotency key is known."""
    deliver(tables, revision(1, content="a"), revision(2, content="b"))

    again = revision(1, at=1000, content="a")
    deliver(tables, again, again, revision(1, at=2000, content="a"))

    assert database.run("select revision, digest from ota_order") == [(1, "a")]
    events = database.column("select id from ota_order_event order by fetched_at")
    assert [one.removeprefix(f"{COMPANY_ID}/{ORDER_ID}/") for one in events] == ["1/a", "2/b", f"1/a/{FETCHED + 1000}"]


def test_processes_that_deliver_the_same_order_at_once_leave_its_latest_content(database: Database) -> None:
    migrated(database)

    def deliver_some(start: int) -> None:
        deliver(tables_of(database.url), *map(revision, range(start, 25, 3)))
        os._exit(7)  # not reached after an error

    processes = [forked(partial(deliver_some, start)) for start in (1, 2, 3, 1)]

    assert [exit_code(pid) for pid in processes] == [7] * 4
    assert database.run("select revision, fetched_at from ota_order")[0][0] == 24
    assert database.counts()[:4] == [1, 2, 2, 3]
    events = database.column("select id from ota_order_event order by fetched_at")
    assert events == sorted(set(events), key=lambda one: int(one.split("/")[2]))
    assert events[-1] == revision(24).idempotency_key


def test_the_clock_of_the_database_does_not_matter(in_server: Database, server: Postgres) -> None:
    """It is seven hours late, then right: what was fetched later wins all the same."""
    tables = tables_of(in_server.url)
    server.stop()
    try:
        server.launch(clock="-7h")
        assert (datetime.now(UTC) - in_server.column("select now()")[0]).total_seconds() > 6 * 3600
        tables.migrate()
        deliver(tables, revision(2))
    finally:
        server.stop()
        server.launch()

    deliver(tables, revision(1), revision(3))

    assert in_server.run("select revision, fetched_at from ota_order") == [
        (3, datetime.fromtimestamp((FETCHED + 3) / 1000, UTC))
    ]


def test_a_database_that_goes_away_and_comes_back_is_used_again(in_server: Database, server: Postgres) -> None:
    tables = migrated(in_server)
    deliver(tables, revision(1))

    for end in (server.stop, server.kill):
        end()
        with pytest.raises(Unavailable, match=r"^cannot connect: OperationalError$"):
            deliver(tables, revision(2))
        server.launch()
        deliver(tables, revision(2))

    assert in_server.counts() == [1, 2, 2, 3, 2]


@pytest.mark.parametrize("code", ["53100", "53300", "40001", "40P01", "55P03", "57014", "25006", "42501", "58030"])
def test_an_error_that_is_not_of_the_order_says_that_the_database_is_unavailable(
    in_server: Database, code: str
) -> None:
    """Disk full, too many connections, serialization, deadlock, locked, time-out, read-only, no rights, I/O."""
    tables = migrated(in_server)
    in_server.refuse(ORDER_ID, code)

    with pytest.raises(Unavailable) as raised:
        deliver(tables, revision(1))

    assert raised.value.reason.endswith(f"({code})")
    assert not {"canary", "Jane"} & set(raised.value.reason.split())


@pytest.mark.parametrize("code", ["23514", "22003", "23502", "P0001", "XX000"])
def test_an_error_of_the_order_is_a_failure_whose_text_quotes_nothing(in_server: Database, code: str) -> None:
    tables = migrated(in_server)
    in_server.refuse(ORDER_ID, code)

    with pytest.raises(Failed, match=rf"^\w+ \({code}\)$") as raised:
        deliver(tables, revision(1))

    assert not isinstance(raised.value, Unavailable)


def test_text_that_postgresql_cannot_hold_is_a_failure_of_its_order(in_server: Database) -> None:
    tables = migrated(in_server)
    odd = msgspec.structs.replace(document("order-issued").order, sell_to_name="a\0b")

    with pytest.raises(Failed, match=r"^DataError$") as raised:
        deliver(tables, document("order-issued", order=odd))
    assert not isinstance(raised.value, Unavailable)
    deliver(tables, revision(1))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("{path}?timeout=0.05", r"OperationalError \(SQLITE_BUSY\)"),
        ("file:{path}?mode=ro&uri=true", r"OperationalError \(SQLITE_READONLY\)"),
        ("{path}/none/orders.db", r"cannot connect: OperationalError \(SQLITE_CANTOPEN\)"),
        ("{garbage}", r"cannot connect: DatabaseError \(SQLITE_NOTADB\)|DatabaseError \(SQLITE_NOTADB\)"),
    ],
    ids=["locked", "read-only", "no folder", "no database"],
)
def test_a_file_of_sqlite_that_takes_no_order_is_unavailable(tmp_path: Path, address: str, reason: str) -> None:
    database, garbage = in_sqlite(tmp_path), tmp_path / "garbage"
    garbage.write_bytes(b"no database" * 1000)
    path = tmp_path / "orders.db"
    migrated(database)
    tables = tables_of(f"sqlite:///{address.format(path=path, garbage=garbage)}")

    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        if "timeout" in address:
            other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable, match=f"^({reason})$"):
            deliver(tables, revision(1))


def test_a_disk_that_is_full_is_unavailable_until_it_has_room(tmp_path: Path) -> None:
    """The largest size of a file stands for it, in a process that alone has this limit."""
    database = in_sqlite(tmp_path)
    tables = migrated(database)

    def deliver_without_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        with pytest.raises(Unavailable, match=r"^OperationalError \(SQLITE_(IOERR_WRITE|FULL)\)$"):
            deliver(tables, revision(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        deliver(tables, revision(1))
        os._exit(7)

    assert exit_code(forked(deliver_without_room)) == 7
    assert database.counts() == [1, 2, 2, 3, 1]


def test_a_lock_that_somebody_holds_ends_the_delivery_in_time(
    in_server: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sql._POSTGRESQL_LIMITS, "lock_timeout", "50ms")
    tables = migrated(in_server)
    deliver(tables, revision(1))

    with psycopg.connect(in_server.url.replace("+psycopg", "")) as person:
        person.execute("select * from ota_order for update")
        with pytest.raises(Unavailable, match=r"^LockNotAvailable \(55P03\)$"):
            deliver(tables, revision(2))
    deliver(tables, revision(2))

    assert in_server.column("select revision from ota_order") == [2]


def test_without_tables_nothing_is_written_and_the_reason_names_the_command(database: Database) -> None:
    """Also when they vanish while the process runs."""
    tables = tables_of(database.url)
    with pytest.raises(Unavailable) as raised:
        deliver(tables, revision(1))
    assert raised.value.reason == MISSING
    tables.migrate()
    deliver(tables, revision(1))

    database.run(*(f"drop table {table}" for table in (*reversed(TABLES), "ota_schema")))
    # SQLite has no code of its own for a missing table: the second attempt looks whether they are there.
    for kind in (Failed if database.is_sqlite else Unavailable, Unavailable):
        with pytest.raises(kind) as again:
            deliver(tables, revision(2))
    assert again.value.reason == MISSING
    tables.migrate()
    deliver(tables, revision(2))


def on_the_page(section: str, **values: str) -> list[str]:
    """Return the SQL of a section of docs/sinks.md, with these values in place of its variables."""
    text = (ROOT / "docs" / "sinks.md").read_text().partition(f"\n### {section}\n")[2]
    (found,) = re.findall(r"```sql\n(.*?)```", text.partition("\n##")[0], re.DOTALL)
    for name, value in values.items():
        found = found.replace(f":'{name}'", f"'{value}'")
    return list(filter(None, map(str.strip, found.split(";"))))


def test_the_rights_of_the_page_are_enough_and_its_outbox_reader_takes_each_row_once(
    in_server: Database, server: Postgres
) -> None:
    migrated(in_server)
    in_server.run(
        f"create role ota_receiver login password '{PASSWORD}'", *on_the_page("The rights that its user needs")
    )

    deliver(tables_of(in_server.url.replace("//ota:", "//ota_receiver:")), *map(revision, (1, 2, 3)))

    assert in_server.counts() == [1, 2, 2, 3, 3]
    (reader,) = on_the_page("The outbox")
    assert len(in_server.run(reader)) == 3
    assert in_server.run(reader) == []


def test_the_upsert_of_the_page_keeps_the_latest_content(database: Database) -> None:
    database.run(
        "create table shop_order (company_id text, order_id text, fetched_at bigint, status text,"
        " document text, primary key (company_id, order_id))"
    )
    (upsert,) = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "consumer.md").read_text(), re.DOTALL)
    of_order = {"companyId": COMPANY_ID, "orderId": ORDER_ID, "document": "{}"}
    for at, status in ((2, "Draft"), (1, "Error"), (3, "Issued"), (3, "Issued")):
        statement = upsert
        for name, value in (of_order | {"fetchedAt": str(at), "status": status}).items():
            statement = statement.replace(f":{name}", f"'{value}'")
        database.run(statement)

    assert database.run("select fetched_at, status from shop_order") == [(3, "Issued")]


@pytest.fixture
def lab(redis_url: str, sandbox: Sandbox, database: Database, tables: Tables) -> Iterator[WorkerLab]:
    """A lab with the sink `warehouse`, whose database has its tables."""
    with worker_lab(redis_url, sandbox, {"warehouse": tables}) as one:
        yield one


def test_an_order_that_the_database_refuses_for_ever_is_a_dead_letter_and_the_others_go_on(
    lab: WorkerLab, database: Database
) -> None:
    refused, *others = lab.issue(3)
    database.refuse(refused.order_id)

    lab.run_for(100 * 3600)

    reason = "IntegrityError (SQLITE_CONSTRAINT_TRIGGER)" if database.is_sqlite else "CheckViolation (23514)"
    assert lab.field("warehouse:dead", refused) == reason
    assert [lab.field("warehouse:revision", one) for one in others] == ["1", "1"]
    assert {str(one) for one in database.column("select order_id from ota_order")} == {one.order_id for one in others}
    assert "canary" not in str(lab.record(refused)) + str(lab.history(refused))

    database.run("drop trigger refuse" if database.is_sqlite else "drop trigger refuse on ota_order")
    assert lab.ledger.retry_delivery(refused, "warehouse")
    lab.run_for(1)
    assert database.counts()[0] == 3


def test_a_process_that_dies_after_its_commit_leaves_one_event(
    lab: WorkerLab, database: Database, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    (order,) = lab.issue()
    keys: list[str] = []
    written = Tables.deliver

    def deliver_and_die(*arguments: Any) -> None:
        written(*arguments)
        os._exit(9)

    def noted(self: Tables, document: OrderDocument, context: Any) -> None:
        keys.append(document.idempotency_key)
        written(self, document, context)

    monkeypatch.setattr(Tables, "deliver", deliver_and_die)
    assert exit_code(forked(lab.work)) == 9
    assert (database.counts()[0], lab.field("warehouse:revision", order)) == (1, "0")

    monkeypatch.setattr(Tables, "deliver", noted)
    lab.run_for(600)

    assert database.column("select id from ota_order_event") == keys
    assert lab.field("warehouse:revision", order) == "1"


def test_what_the_page_says_deletes_every_trace_of_an_erased_order(
    lab: WorkerLab, database: Database, tables: Tables
) -> None:
    erased, kept = lab.issue(2)
    lab.run_for(1)
    assert database.counts()[0] == 2

    traces = lab.erasure.traces(erased)
    assert traces is not None
    assert [one.sink for one in traces.copies] == ["warehouse"]
    assert lab.erasure.erase(traces)
    lab.run_for(600)
    database.run(*on_the_page("Erase an order", company_id=erased.company_id, order_id=erased.order_id))

    left = [str(row) for table in TABLES for row in database.run(f"select * from {table}")]
    assert not [row for row in left if erased.order_id in row]
    assert [row for row in left if kept.order_id in row]
