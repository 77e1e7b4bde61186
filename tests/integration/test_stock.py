"""The orders that benchmarks write are equal to those of the receiver, key by key."""

from __future__ import annotations

from app.dev.valkey import Valkey
from tests.benchmarks import stock


def test_the_stock_writes_the_same_keys_as_inbox_and_ledger(own_valkey: Valkey) -> None:
    assert stock.assert_same(own_valkey.url) > 20
