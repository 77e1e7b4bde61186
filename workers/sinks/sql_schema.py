"""The tables of the sql sink, and the SQL that creates and upgrades them.

They only grow: a column that somebody reads is never renamed or removed, so an older process goes on writing beside a
newer one.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Date,
    DateTime,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    Time,
    TypeDecorator,
    Unicode,
    UnicodeText,
    func,
    inspect,
    select,
)
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateIndex, CreateTable, DDLElement, SetColumnComment, SetTableComment

from workers.sinks.contract import Failed

UPGRADES: Final[tuple[tuple[str, ...], ...]] = ()
"""The SQL of each upgrade: the first makes version 2 of version 1. What stands here is never changed; the tables below
have what all upgrades together bring, and are created at once in an empty database."""

_LOCK: Final = 7_026_001_511
"""Advisory lock of PostgreSQL for one upgrade at a time."""


class _Digits(TypeDecorator[Any]):
    """Money in SQLite, whose own numbers are binary fractions: its digits as text."""

    impl = UnicodeText
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else f"{value:f}"


_TEXT: Final = UnicodeText()
_INDEXED: Final = Unicode(250).with_variant(UnicodeText(), "postgresql", "sqlite")
"""Text in an index: several databases have no index over texts of any length."""
_GUID: Final = String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
_MONEY: Final = Numeric(28, 8).with_variant(Numeric(), "postgresql").with_variant(_Digits(), "sqlite")
_MOMENT: Final = DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
_JSON: Final = JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")

_TABLES: Final = MetaData()


def _order_key() -> tuple[Column[Any], Column[Any]]:
    return Column("company_id", _GUID, primary_key=True), Column("order_id", _GUID, primary_key=True)


def _position(name: str) -> Column[Any]:
    return Column(name, Integer, primary_key=True, autoincrement=False, comment="Place in the order, from 1")


def _extra() -> Column[Any]:
    return Column("extra", _JSON, comment="Fields without a column, as they were sent")


def _of_order() -> ForeignKeyConstraint:
    """Return the reference of a part to its order: who deletes the order deletes all of it.

    Wallets do not refer to their item, nor assets to their wallet: a delete would search the parts of each one.
    """
    return ForeignKeyConstraint(
        ("company_id", "order_id"), ("ota_order.company_id", "ota_order.order_id"), ondelete="CASCADE"
    )


ORDER: Final = Table(
    "ota_order",
    _TABLES,
    *_order_key(),
    Column("company", _TEXT, nullable=False, comment="Name of the company in the settings of the receiver"),
    Column("revision", BigInteger, nullable=False, comment="Starts again after Redis was emptied: never compare it"),
    Column("digest", String(64), nullable=False, comment="The same as long as the content is"),
    Column("fetched_at", _MOMENT, nullable=False, comment="When the Channel Manager last answered with this content"),
    Column("status", _INDEXED, nullable=False),
    Column("status_message", _TEXT),
    Column("partner_id", _TEXT),
    Column("job_id", _TEXT),
    Column("sell_to_order_reference", _INDEXED),
    Column("buy_from_order_reference", _INDEXED),
    Column("payment_reference", _TEXT),
    Column("sell_to_name", _TEXT),
    Column("sell_to_email", _TEXT),
    Column("sell_to_language", _TEXT),
    Column("received_at", _MOMENT),
    Column("manifest_url", _TEXT, comment="Page or file with all tickets"),
    _extra(),
    Index("ota_order_fetched_at", "fetched_at"),
    Index("ota_order_status", "status"),
    Index("ota_order_sell_to_order_reference", "sell_to_order_reference"),
    Index("ota_order_buy_from_order_reference", "buy_from_order_reference"),
    comment="The latest content of each order",
)

ITEM: Final = Table(
    "ota_item",
    _TABLES,
    *_order_key(),
    _position("item_position"),
    Column("line_no", BigInteger),
    Column("item_number", _TEXT),
    Column("description", _TEXT),
    Column("is_package", Boolean, nullable=False),
    Column("quantity", BigInteger),
    Column("visit_date", Date, comment="In the time of the venue"),
    Column("visit_time", Time, comment="In the time of the venue"),
    Column("sell_to_name", _TEXT),
    Column("sell_to_email", _TEXT),
    Column("sell_to_language", _TEXT),
    Column("component_schedule", _JSON, comment="When each component of a package is visited"),
    _extra(),
    _of_order(),
    Index("ota_item_visit_date", "visit_date"),
    comment="The lines of the orders",
)

WALLET: Final = Table(
    "ota_wallet",
    _TABLES,
    *_order_key(),
    _position("wallet_position"),
    Column("item_position", Integer, nullable=False),
    Column("seq_no", BigInteger),
    Column("wallet_id", _TEXT, comment="Null until the order is issued"),
    Column("wallet_reference_number", _INDEXED),
    Column("external_reference_number", _TEXT),
    Column("name", _TEXT),
    Column("issued_at", _MOMENT),
    Column("unit_price_excl_vat", _MONEY),
    Column("unit_price_incl_vat", _MONEY),
    Column("currency_code", _TEXT),
    Column("manifest_url", _TEXT),
    _extra(),
    _of_order(),
    Index("ota_wallet_wallet_reference_number", "wallet_reference_number"),
    comment="What each guest carries",
)

ASSET: Final = Table(
    "ota_asset",
    _TABLES,
    *_order_key(),
    _position("asset_position"),
    Column("wallet_position", Integer, nullable=False),
    Column("type", _TEXT, comment="ticket or coupon"),
    Column("id", _TEXT),
    Column("asset_id", _TEXT),
    Column("reference_number", _INDEXED),
    Column("item_number", _TEXT),
    Column("description", _TEXT),
    _extra(),
    _of_order(),
    Index("ota_asset_reference_number", "reference_number"),
    comment="Tickets and coupons in the wallets",
)

EVENT: Final = Table(
    "ota_order_event",
    _TABLES,
    Column("id", Unicode(250), primary_key=True, comment="Idempotency key of the revision"),
    Column("aggregatetype", Unicode(50), nullable=False, comment="order"),
    Column("aggregateid", Unicode(100), nullable=False, comment="company_id/order_id"),
    Column("type", Unicode(50), nullable=False, comment="Status of the order"),
    Column("payload", _JSON, nullable=False, comment="The whole order"),
    Column("fetched_at", _MOMENT, nullable=False, comment="Rises with each row of one order"),
    Index("ota_order_event_aggregateid", "aggregateid", "fetched_at"),
    comment="One row for each revision, appended in one transaction with its order; columns as Debezium names them",
)

_SCHEMA: Final = Table(
    "ota_schema",
    _TABLES,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("at", _MOMENT, nullable=False),
    comment="Versions of these tables, by ota-receiver sinks migrate",
)


def newest() -> int:
    """Return the version of the tables that this program creates, and needs at least."""
    return 1 + len(UPGRADES)


def version(connection: Connection) -> int:
    """Return the version of the tables in this database, 0 if there are none."""
    if not inspect(connection).has_table(_SCHEMA.name):
        return 0
    return connection.scalar(select(func.max(_SCHEMA.c.version))) or 0


def statements(connection: Connection, held: int) -> list[str]:
    """Return the SQL that makes `newest()` of the version `held`; none is left for it.

    Raises Failed if the database is newer than this program.
    """
    if held > newest():
        raise Failed(f"the tables are of version {held}, newer than this program knows ({newest()})")
    if not held:
        return [*_creation(connection), _noted(newest())]
    upgrades = enumerate(UPGRADES[held - 1 :], start=held + 1)
    return [sql for number, upgrade in upgrades for sql in (*upgrade, _noted(number))]


def lock(connection: Connection) -> None:
    """Let one upgrade at a time run in this transaction, without PostgreSQL's limit for one statement."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.set_config("statement_timeout", "0", True)))
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))


def _noted(number: int) -> str:
    return f"INSERT INTO {_SCHEMA.name} (version, at) VALUES ({number}, CURRENT_TIMESTAMP)"  # noqa: S608  # our number


def _creation(connection: Connection) -> list[str]:
    dialect = connection.dialect
    found: list[DDLElement] = []
    for table in _TABLES.sorted_tables:
        found.append(CreateTable(table))
        found += [CreateIndex(one) for one in sorted(table.indexes, key=lambda one: str(one.name))]
        if dialect.supports_comments and not dialect.inline_comments:
            found.append(SetTableComment(table))
            found += [SetColumnComment(column) for column in table.columns if column.comment]
    return [str(one.compile(dialect=dialect)).replace("\t", "    ").replace(", \n", ",\n").strip() for one in found]
