"""Keeps each order, and each revision that came, in the SQLite file that ORDERS_DB names."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing

from app.upstream.models import Order
from workers.sinks import Context, Reject, Retry

SCHEMA = """
create table if not exists ota_order (
    company_id text, order_id text, fetched_at integer, status text, manifest_url text, tickets text,
    primary key (company_id, order_id)
);
create table if not exists ota_order_event (idempotency_key text primary key, order_id text, status text);
"""
UPSERT = """
insert into ota_order values (?, ?, ?, ?, ?, ?)
on conflict do update set fetched_at = excluded.fetched_at, status = excluded.status,
    manifest_url = excluded.manifest_url, tickets = excluded.tickets
where excluded.fetched_at >= ota_order.fetched_at
"""


def on_order(order: Order, context: Context) -> None:
    """Store a revision in one transaction; older content never replaces newer."""
    if order.status == "Issued" and not order.wallets:
        raise Reject("issued without a wallet")
    event = (context.idempotency_key, context.order_id, order.status)
    tickets = json.dumps([ticket.reference_number for ticket in order.tickets])
    row = (context.company_id, context.order_id, context.fetched_at, order.status, order.manifest_url, tickets)
    with closing(sqlite3.connect(os.environ.get("ORDERS_DB", "orders.db"), timeout=5)) as database:
        try:
            database.executescript(SCHEMA)
            with database:
                # A repeat has the same key: it changes nothing here.
                database.execute("insert into ota_order_event values (?, ?, ?) on conflict do nothing", event)
                database.execute(UPSERT, row)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise Retry(after=30) from error
            raise
