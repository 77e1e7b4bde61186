"""The stock of the benchmarks is what the receiver itself would have written, key by key."""

from __future__ import annotations

from app.dev.valkey import Valkey
from tests.benchmarks import stock


def test_what_the_stock_writes_is_what_inbox_and_ledger_write(own_valkey: Valkey) -> None:
    """Orders that are home, owed, parked, dead and told of twice; the scripts may change, and this with them."""
    assert stock.assert_same(own_valkey.url) > 20
