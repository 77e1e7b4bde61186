"""History entries are read as the scripts pack them, and an unreadable entry hides no other."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from app import ledger
from app.explain.order_history import describe
from app.ledger.history import (
    UNREAD,
    DeadLettered,
    DeliveryEnded,
    DeliveryRetried,
    Discarded,
    DuplicateReceived,
    Entry,
    Erased,
    EventReceived,
    FetchFailed,
    FetchRefused,
    FetchRequested,
    FetchStarted,
    FetchStored,
    Redelivered,
    Unread,
    WorkerCrashed,
    parse_entry,
)
from app.ledger.work import DeliveryOutcome, Failure

MS = 1780301702417
SINK = "python:shop:take"

ENTRIES: list[Entry] = [
    EventReceived(MS, "1780301702417-0", "Issued", "queued", "current", "4f2a"),
    DuplicateReceived(MS, "Draft", "previous", "4f2b"),
    FetchRequested(MS, "replay", "backfill"),
    FetchStarted(MS, 2, 3, "pool-live-1"),
    FetchStored(MS, 3, "Put on Hold", 2, 200, 84),
    FetchRefused(MS, 3),
    FetchFailed(MS, "retry", 3, "network", 0, 20000),
    FetchFailed(MS, "deferred", 3, "throttled", 429, 12),
    FetchFailed(MS, "not_found", 3, "order_not_found", 404, 12),
    DeadLettered(MS, "unsettled"),
    WorkerCrashed(MS, "pool-live-1", ""),
    WorkerCrashed(MS, "pool-live-1", SINK),
    DeliveryEnded(MS, SINK, 2, "succeeded", "", 7),
    DeliveryEnded(MS, SINK, 2, "retry", "ValueError", 7),
    DeliveryRetried(MS, SINK),
    Discarded(MS, "order_missing", ""),
    Discarded(MS, "KeyError", SINK),
    Redelivered(MS, "k7m2qx", SINK),
    Erased(MS),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: type(entry).__name__)
def test_each_entry_is_packed_as_kind_time_and_values_and_described_in_words(entry: Entry) -> None:
    """Packed as append_history of prelude.lua does; the tests of `explain` show that the scripts write these."""
    packed = msgspec.msgpack.encode(entry)

    assert msgspec.msgpack.decode(packed)[1] == MS
    assert parse_entry(packed) == entry
    assert entry.at == datetime(2026, 6, 1, 8, 15, 2, 417000, tzinfo=UTC)
    assert len(describe(entry)) > 5


@pytest.mark.parametrize(
    ("packed", "at"),
    [
        (b"", 0),
        (b"reject 1 unreadable_answer 200 2", 0),
        (msgspec.msgpack.encode(["teleported", MS, 3]), MS),
        (msgspec.msgpack.encode(["teleported", 10**18]), 0),
        (msgspec.msgpack.encode(["started", MS, "one", "two", "three"]), MS),
        (msgspec.msgpack.encode(["stored", MS]), MS),
        (b"\x94\xa6failed\xcf\x00\x00\x01\x9e\x82\xff\xfe\x91\xa1\xff", 0),
    ],
)
def test_an_unreadable_entry_is_a_plain_sentence_and_none_of_its_bytes(packed: bytes, at: int) -> None:
    found = parse_entry(packed)

    assert found == Unread(at, UNREAD)
    assert describe(found) == UNREAD


def test_every_kind_that_a_script_writes_and_every_outcome_has_words() -> None:
    scripts = Path(ledger.__file__).with_name("lua").glob("*.lua")
    written = {kind for path in scripts for kind in re.findall(r"append_history\(o, '(\w+)'", path.read_text())}

    assert written == {str(kind.__struct_config__.tag) for kind in get_args(Entry)} - {"unread"}
    for outcome in get_args(Failure):
        assert not describe(FetchFailed(MS, outcome, 3, "code", 500, 12)).endswith(f", {outcome}")
    for outcome in get_args(DeliveryOutcome):
        assert not describe(DeliveryEnded(MS, SINK, 2, outcome, "", 7)).endswith(f", {outcome}")
