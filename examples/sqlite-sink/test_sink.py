"""The sink as a worker finds and calls it: by its entry point, with an answer of getOrder."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import pytest

from app.upstream.models import Order, parse_order
from workers.sinks import Context, Reject, Retry

ORDER_ID = "00000000-0000-4000-8000-000000000001"
ORDERS = "select status, tickets from ota_order"
EVENTS = "select idempotency_key from ota_order_event"


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORDERS_DB", str(tmp_path / "orders.db"))
    return tmp_path / "orders.db"


@pytest.fixture
def on_order(database: Path) -> Callable[[Order, Context], None]:
    (found,) = entry_points(group="ota_receiver.sinks", name="sqlite")
    return cast("Callable[[Order, Context], None]", found.load())


def order(status: str = "Issued", *tickets: str) -> Order:
    assets = [{"type": "ticket", "referenceNumber": one} for one in tickets]
    items = [{"lineNo": 1, "wallets": [{"walletId": "w", "assets": assets}]}] if tickets else []
    return parse_order(json.dumps({"orderId": ORDER_ID, "status": status, "items": items}).encode())


def context(revision: int, fetched_at: int) -> Context:
    return Context(
        idempotency_key=f"company/order/{revision}/digest",
        company_id="company",
        order_id=ORDER_ID,
        revision=revision,
        attempt=1,
        request_id="request",
        fetched_at=fetched_at,
    )


def rows(database: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def test_a_repeated_delivery_changes_nothing(on_order: Callable[[Order, Context], None], database: Path) -> None:
    for _ in range(2):
        on_order(order("Issued", "T1"), context(1, 1000))

    assert rows(database, ORDERS) == [("Issued", '["T1"]')]
    assert rows(database, EVENTS) == [("company/order/1/digest",)]


def test_newer_content_replaces_older_content_whatever_the_revision(
    on_order: Callable[[Order, Context], None], database: Path
) -> None:
    """Revisions start again after Redis was emptied; the time of the fetch does not."""
    on_order(order("Issued", "T1"), context(5, 2000))
    on_order(order("Issued", "T2"), context(1, 3000))
    assert rows(database, ORDERS) == [("Issued", '["T2"]')]

    on_order(order("Issued", "T1"), context(5, 2000))
    assert rows(database, ORDERS) == [("Issued", '["T2"]')]


def test_an_order_without_a_wallet_is_rejected(on_order: Callable[[Order, Context], None], database: Path) -> None:
    with pytest.raises(Reject, match="issued without a wallet"):
        on_order(order(), context(1, 1000))

    assert not database.exists()


def test_a_locked_database_is_tried_again(
    on_order: Callable[[Order, Context], None], database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_order(order("Draft"), context(1, 1000))
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, timeout: connect(name, timeout=0))
    with closing(connect(database)) as other:
        other.execute("begin exclusive")
        with pytest.raises(Retry):
            on_order(order("Cancelled"), context(2, 2000))
