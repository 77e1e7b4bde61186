"""The real processes deliver the orders of the demo into a real PostgreSQL, which is away for a moment.

`uv run pytest -n0 -s tests/acceptance/test_sql_sink.py` prints the rows.
"""

from __future__ import annotations

import subprocess
from typing import Any

from rich.progress import Progress

from app.dev.demo import drive
from app.dev.stack import Stack
from app.settings import parse
from tests.eventually import eventually
from tests.postgres import PASSWORD, postgres
from tests.service import Service

ROWS = """
with part as (
    select company_id, order_id, 1 as item, 0 as wallet, 0 as paid, '' as type from ota_item
    union all select company_id, order_id, 0, 1, unit_price_incl_vat, '' from ota_wallet
    union all select company_id, order_id, 0, 0, 0, type from ota_asset
)
select o.sell_to_order_reference as reference, o.status, o.fetched_at, sum(item) as items, sum(wallet) as wallets,
       sum(paid) as paid, count(*) filter (where type = 'ticket') as tickets,
       count(*) filter (where type = 'coupon') as coupons
from ota_order o left join part using (company_id, order_id)
group by o.company_id, o.order_id order by 1
"""
ASSETS = """
select o.sell_to_order_reference as reference, i.item_number, i.visit_date, w.wallet_reference_number as wallet,
       a.type, a.reference_number as number
from ota_order o
join ota_item i using (company_id, order_id)
join ota_wallet w using (company_id, order_id, item_position)
join ota_asset a using (company_id, order_id, wallet_position)
order by 1, a.asset_position
"""
EVENTS = "select type, left(id, 50) || '…' as id, aggregatetype, fetched_at from ota_order_event order by fetched_at"


def test_the_orders_of_the_demo_are_rows_and_none_is_lost_while_the_database_is_away(bare: Service) -> None:
    with postgres() as server:
        schema = server.new_schema()
        table = f'[sinks.warehouse]\nkind = "sql"\nurl = "{server.url(schema)}"\n'
        (bare.folder / "sinks.toml").write_text(table)
        bare.variables["SINKS_FILE"] = str(bare.folder / "sinks.toml")
        assert bare.cli("sinks", "migrate") == (0, [{"sink": "warehouse", "before": 0, "version": 1}])
        parts = bare.start("web"), bare.start("worker", WORKERS="2", BACKFILL_WORKERS="0")

        def count(table: str) -> int:
            return int(server.run_sql(schema, f"select count(*) from {table}")[0][0])

        def rows() -> list[Any]:
            return server.run_sql(schema, ROWS)

        orders = drive(Stack(parse(bare.variables), bare.variables, bare.sandbox, *parts), Progress(disable=True))
        found = {sample.reference: sample.order for sample in orders if sample.order}
        statuses = {name: order.status for name, order in found.items()}
        eventually(lambda: {row[0]: row[1] for row in rows()} == statuses, 15, what="the tables have all orders")

        psql = [str(server.programs / "psql"), server.url(schema).replace("+psycopg", "")]
        queries = [word for query in (ROWS, ASSETS, EVENTS) for word in ("-c", query)]
        print(subprocess.run([*psql, *queries], capture_output=True, text=True, check=True).stdout)  # noqa: T201
        assert len(found) == 6
        assert {reference: numbers for reference, _, _, *numbers in rows()} == {
            name: [
                len(order.items),
                len(order.wallets),
                sum(one.unit_price_incl_vat or 0 for one in order.wallets),
                len(order.tickets),
                len(order.coupons),
            ]
            for name, order in found.items()
        }

        server.stop()
        later = bare.issue(2)
        assert bare.post(*map(bare.event, later))[0] == 200
        eventually(lambda: bare.log("worker", "delivery.failed"), 15, what="a delivery fails")
        server.launch()
        assert bare.cli("dead", "requeue", "--sink", "warehouse", "--yes")[0] == 0
        eventually(lambda: count("ota_order") == 8, 20, what="all orders are in the tables")

        assert count("ota_order_event") >= 8
        assert {line["event"] for line in bare.log("worker")}.isdisjoint({"pool.worker_ended", "pool.worker_died"})
        assert PASSWORD not in "".join(path.read_text() for path in bare.folder.glob("*.log"))
