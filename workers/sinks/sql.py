"""The kind sql: the latest content of each order in tables of a database, and an outbox with each revision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
    StatementError,
)

from app.errors import SettingsError
from app.order_document import OrderDocument
from app.sink_settings import SqlSink
from app.upstream.decode import Part
from app.upstream.models import Order
from workers.sinks import sql_schema
from workers.sinks.contract import Context, Failed, Unavailable
from workers.sinks.sql_schema import ASSET, EVENT, ITEM, ORDER, WALLET

CONNECT_TIMEOUT: Final = 5
"""Seconds for a connection, and for a lock in SQLite."""

_POSTGRESQL_LIMITS: Final = {
    "statement_timeout": "10s",
    "lock_timeout": "5s",
    # A process that is stopped in the middle of a delivery must not keep the order locked.
    "idle_in_transaction_session_timeout": "30s",
}
"""Set in each transaction: PgBouncer refuses them as parameters of a connection."""

_PSYCOPG: Final[dict[str, Any]] = {
    "connect_timeout": CONNECT_TIMEOUT,
    # A server that vanishes without a word is noticed after 15 s.
    "tcp_user_timeout": 15_000,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    # PgBouncer may give each transaction another connection of its own, which has not prepared the statement.
    "prepare_threshold": None,
}

_UNAVAILABLE_CLASSES: Final = frozenset({"08", "25", "28", "3D", "40", "42501", "53", "55", "57", "58"})
"""SQLSTATEs, and the first two characters of others, that say nothing about one order: no connection, read-only, no
rights, deadlock, out of resources, locked, shut down or timed out, system error."""

_UNAVAILABLE_SQLITE: Final = (
    "SQLITE_BUSY",
    "SQLITE_CANTOPEN",
    "SQLITE_CORRUPT",
    "SQLITE_FULL",
    "SQLITE_IOERR",
    "SQLITE_LOCKED",
    "SQLITE_NOMEM",
    "SQLITE_NOTADB",
    "SQLITE_PERM",
    "SQLITE_PROTOCOL",
    "SQLITE_READONLY",
)

_SQLSTATE: Final = 5
"""Characters of a SQLSTATE; other codes are numbers of the driver."""

_UNDEFINED: Final = frozenset({"42P01", "42703"})
"""SQLSTATEs of a table and of a column that is not there."""

_ENCODER: Final = msgspec.json.Encoder()


class Tables:
    """The tables of one sink, on one connection."""

    package = "workers"

    def __init__(self, declared: SqlSink) -> None:
        """Find the driver and open nothing; raises SettingsError."""
        self._name = declared.name
        self._engine = _engine(declared.url.get_secret_value())
        self._are_current = False

    def deliver(self, document: OrderDocument, context: Context) -> None:
        """Write a revision in one transaction; nothing if the tables have a later content.

        Raises Unavailable, and Failed if the database refuses this order.
        """
        with self._translated():
            try:
                self._write(document)
            except IntegrityError:
                # Another process may have inserted the order meanwhile: now its row is found.
                self._write(document)

    def version(self) -> tuple[int, int]:
        """Return the version of the tables (0 without tables) and the one needed; raises Failed."""
        with self._translated(), self._transaction() as connection:
            return sql_schema.version(connection), sql_schema.newest()

    def statements(self) -> list[str]:
        """Return the SQL that `migrate` would run, none if there is nothing to do; raises Failed."""
        with self._translated(), self._transaction() as connection:
            return sql_schema.statements(connection, sql_schema.version(connection))

    def migrate(self) -> tuple[int, int]:
        """Create or upgrade the tables in one transaction; return the version before (0 without tables) and after.

        Raises Failed, also if they are newer than this program.
        """
        with self._translated(), self._transaction() as connection:
            sql_schema.lock(connection)
            held = sql_schema.version(connection)
            for statement in sql_schema.statements(connection, held):
                connection.exec_driver_sql(statement)
            return held, sql_schema.newest()

    def close(self) -> None:
        """Close the connection; the next use opens another one."""
        self._engine.dispose()

    def _write(self, document: OrderDocument) -> None:
        with self._transaction() as connection:
            if not self._are_current and sql_schema.version(connection) < sql_schema.newest():
                raise self._missing()
            _write(connection, document)
        self._are_current = True

    def _missing(self) -> Unavailable:
        return Unavailable(f"tables are missing or old (`sinks migrate {self._name}` makes them)")

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            connection = self._engine.connect()
        except DBAPIError as error:
            raise Unavailable(f"cannot connect: {_described(error)[0]}") from error
        with connection, connection.begin():
            if connection.dialect.name == "postgresql":
                limits = (func.set_config(name, value, True) for name, value in _POSTGRESQL_LIMITS.items())
                connection.execute(select(*limits))
            yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise Unavailable or Failed for what SQLAlchemy raises, without its text, which quotes values."""
        try:
            yield
        except SQLAlchemyError as error:
            self._are_current = False
            text, code = _described(error)
            if code in _UNDEFINED:
                raise self._missing() from error
            raise (Unavailable(text) if _is_away(error, code) else Failed(text)) from error


def _engine(address: str) -> Engine:
    """Return an engine of one connection, which is opened with its first use; raises SettingsError."""
    try:
        url = make_url(address)
        backend = url.get_backend_name()
        if backend == "sqlite" and url.database in {None, "", ":memory:"}:
            raise SettingsError("URL names no file, for example sqlite:////var/lib/ota-receiver/orders.db")
        engine = create_engine(
            url,
            pool_size=1,
            max_overflow=0,
            pool_pre_ping=True,
            hide_parameters=True,
            json_serializer=lambda value: _ENCODER.encode(value).decode(),
            connect_args=_connect_args(url),
        )
    except ImportError as error:
        extra = "; install ota-receiver[postgres]" if backend == "postgresql" else ""
        raise SettingsError(f"URL: its driver cannot be imported (no module {error.name}){extra}") from error
    except (ArgumentError, TypeError, ValueError):
        example = "postgresql+psycopg://user:password@host/database"
        raise SettingsError(f"URL is no address of a database that SQLAlchemy knows, for example {example}") from None
    if engine.dialect.is_async:
        raise SettingsError("URL names a driver for asyncio; use another, such as postgresql+psycopg")
    if backend == "sqlite":
        # The driver itself would begin with the first change, when another process may have changed what was read.
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _connect_args(url: URL) -> dict[str, Any]:
    """Return our limits for a connection, but those that stand in the address."""
    driver = url.get_dialect().driver
    ours = _PSYCOPG if driver == "psycopg" else {"timeout": CONNECT_TIMEOUT} if driver == "pysqlite" else {}
    return {name: value for name, value in ours.items() if name not in url.query}


def _write(connection: Connection, document: OrderDocument) -> None:
    """Replace the order unless a later content is there, and append the revision to the outbox."""
    key = {"company_id": document.company_id, "order_id": document.order_id}
    fetched_at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=document.fetched_at)
    row = select(ORDER.c.fetched_at, ORDER.c.digest).filter_by(**key).with_for_update()
    held = connection.execute(row).one_or_none()
    if held and held.fetched_at.replace(tzinfo=held.fetched_at.tzinfo or UTC) > fetched_at:
        return
    ours = {"company": document.company, "revision": document.revision, "digest": document.digest}
    values = _values(ORDER, document.order) | key | ours | {"fetched_at": fetched_at}
    connection.execute(update(ORDER).filter_by(**key).values(values) if held else insert(ORDER).values(values))
    for table, rows in _parts(document.order, key):
        connection.execute(delete(table).filter_by(**key))
        if rows:
            connection.execute(insert(table), rows)
    ids = [document.idempotency_key]
    if not held or held.digest != document.digest:
        # After Redis was emptied the revisions are counted anew: this may be an earlier content that is there again.
        ids.append(f"{document.idempotency_key}/{document.fetched_at}")
    known = set(connection.scalars(select(EVENT.c.id).where(EVENT.c.id.in_(ids))))
    for new in [one for one in ids if one not in known][:1]:
        event = {
            "id": new,
            "aggregatetype": "order",
            "aggregateid": f"{document.company_id}/{document.order_id}",
            "type": document.status,
            "payload": document,
            "fetched_at": fetched_at,
        }
        connection.execute(insert(EVENT).values(event))


def _parts(order: Order, key: dict[str, str]) -> Iterator[tuple[Table, list[dict[str, Any]]]]:
    """Yield each table of parts, with its rows."""
    items: list[dict[str, Any]] = []
    wallets: list[dict[str, Any]] = []
    assets: list[dict[str, Any]] = []
    for item in order.items:
        items.append(key | {"item_position": len(items) + 1} | _values(ITEM, item))
        for wallet in item.wallets:
            of_item = {"wallet_position": len(wallets) + 1, "item_position": len(items)}
            wallets.append(key | of_item | _values(WALLET, wallet))
            for asset in wallet.assets:
                of_wallet = {"asset_position": len(assets) + 1, "wallet_position": len(wallets)}
                assets.append(key | of_wallet | _values(ASSET, asset))
    yield from ((ITEM, items), (WALLET, wallets), (ASSET, assets))


def _values(table: Table, part: Part) -> dict[str, Any]:
    """Return the fields that have a column of their name; an empty list or dict is none."""
    found = {name: getattr(part, name) for name in part.__struct_fields__ if name in table.c}
    return {name: None if value in ((), {}) else value for name, value in found.items()}


def _described(error: SQLAlchemyError) -> tuple[str, str]:
    """Return the name of an error with its code, and the code alone: a SQLSTATE, a name of SQLite, or ""."""
    cause = (error.orig if isinstance(error, StatementError) else None) or error
    found = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
    number = next((one for one in cause.args if isinstance(one, int)), None)
    code = str(found or number or "")
    return f"{type(cause).__name__} ({code})" if code else type(cause).__name__, code


def _is_away(error: SQLAlchemyError, code: str) -> bool:
    """Return whether the database could take no order at all."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if code.startswith("SQLITE_"):
        return code.startswith(_UNAVAILABLE_SQLITE)
    if len(code) == _SQLSTATE:
        return bool({code, code[:2]} & _UNAVAILABLE_CLASSES)
    return isinstance(error, OperationalError | InterfaceError)
