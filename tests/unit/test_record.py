"""The state of an order is one word, the one that matters most to an operator; its content is what upstream sent."""

from __future__ import annotations

import zlib
from datetime import UTC, datetime, timedelta

import pytest

from app.errors import UnreadableAnswer
from app.ids import OrderKey
from app.ledger.content import pack, unpack
from app.ledger.record import SinkRecord, State, parse_record
from app.times import from_ms, to_ms
from tests.samples import sample

ORDER = OrderKey("11111111-1111-4111-8111-111111111111", "9c6b2f4e-2b71-4d23-9d6a-a3b4c5d6e7f8")
NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
SOON = str(to_ms(NOW + timedelta(seconds=1)))
JUST_NOW = str(to_ms(NOW - timedelta(seconds=1)))
DAYS_AHEAD = str(to_ms(NOW + timedelta(days=3)))
BEFORE = str(to_ms(NOW - timedelta(hours=1)))
FETCHED = {"generation": "1", "fetched_generation": "1"}


def fields(**values: str) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in values.items()}


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ({"generation": "1"}, "pending"),
        ({"generation": "2", "fetched_generation": "1", "attempts": "3"}, "pending"),
        ({"generation": "1", "started_generation": "1", "lease": SOON}, "fetching"),
        ({"generation": "1", "started_generation": "1", "lease": JUST_NOW}, "pending"),
        ({"generation": "1", "started_generation": "1", "lease": DAYS_AHEAD}, "pending"),
        ({"generation": "1", "deferrals": "2"}, "deferred"),
        (FETCHED | {"status": "Issued"}, "fetched"),
        (FETCHED | {"status": "DeletedUpstream"}, "deleted_upstream"),
        ({"generation": "2", "fetched_generation": "1", "status": "DeletedUpstream"}, "pending"),
        ({"generation": "1", "dead": "order_missing"}, "dead"),
        (FETCHED | {"deferrals": "1", "lease": SOON}, "fetched"),
        (FETCHED | {"discarded_at": BEFORE}, "discarded"),
        ({"generation": "2", "fetched_generation": "1", "discarded_at": BEFORE}, "pending"),
        (FETCHED | {"discarded_at": BEFORE, "fetched_at": JUST_NOW, "status": "Issued"}, "fetched"),
        (FETCHED | {"discarded_at": JUST_NOW, "fetched_at": BEFORE, "status": "Draft"}, "discarded"),
        (FETCHED | {"discarded_at": BEFORE, "status": "DeletedUpstream"}, "deleted_upstream"),
    ],
)
def test_the_state_of_an_order(values: dict[str, str], state: State) -> None:
    assert parse_record(ORDER, fields(**values)).state(NOW) == state


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"last_event_status": "Draft", "last_event_at": BEFORE}, "Draft"),
        ({"last_event_status": "Draft", "last_event_at": BEFORE, "status": "Issued", "fetched_at": JUST_NOW}, "Issued"),
        ({"last_event_status": "Error", "last_event_at": JUST_NOW, "status": "Issued", "fetched_at": BEFORE}, "Error"),
        ({"last_event_status": "Draft", "last_event_at": BEFORE, "fetched_at": JUST_NOW}, "Draft"),
        ({"status": "Issued", "fetched_at": BEFORE}, "Issued"),
        ({}, ""),
    ],
)
def test_the_known_status_is_that_of_the_latest_event_or_fetch(values: dict[str, str], status: str) -> None:
    assert parse_record(ORDER, fields(**values)).known_status == status


def test_a_field_of_a_sink_is_the_sinks_name_and_one_more_part() -> None:
    values = {
        b"python:shop:take:revision": b"2",
        b"python:shop:take:attempts": b"1",
        b"python:shop:take:next_at": BEFORE.encode(),
        b"python:till:book:dead": b"ValueError",
    }

    record = parse_record(ORDER, values)

    assert record.sinks == (
        SinkRecord("python:shop:take", 2, 1, from_ms(int(BEFORE)), ""),
        SinkRecord("python:till:book", 0, 0, None, "ValueError"),
    )
    assert [sink.name for sink in record.dead_sinks] == ["python:till:book"]


def test_a_time_converted_from_milliseconds_and_back_is_the_same() -> None:
    assert [to_ms(from_ms(ms)) for ms in (0, 1, 1780301702417, 4102444799999)] == [0, 1, 1780301702417, 4102444799999]


@pytest.mark.parametrize("raw", [sample("order-issued"), sample("order-error"), b"", b"\x00\xff" * 100_000])
def test_a_content_is_read_as_upstream_sent_it(raw: bytes) -> None:
    assert unpack(pack(raw)) == raw


def test_a_content_that_an_earlier_process_stored_is_readable() -> None:
    """With another dictionary no stored order could be read any more: that would be another VERSION of the layout."""
    assert unpack(bytes.fromhex("78bb710c2d36abc69f3b6b01ab6e0a83")) == b'{"orderId":"","status":"Issued"}'


@pytest.mark.parametrize(
    "packed",
    [None, b"", b"not zlib", pack(sample("order-issued"))[:-1], zlib.compressobj(zdict=b"another").flush(), OSError()],
)
def test_what_is_no_content_is_unreadable(packed: object) -> None:
    with pytest.raises(UnreadableAnswer):
        unpack(packed)
