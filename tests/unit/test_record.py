"""One word says where an order stands, and it is the one that tells ops what to do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from app.ids import OrderKey
from app.ledger.record import SinkRecord, State, parse_record
from app.times import from_ms, to_ms

ORDER = OrderKey("11111111-1111-4111-8111-111111111111", "9c6b2f4e-2b71-4d23-9d6a-a3b4c5d6e7f8")
NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
SOON = str(to_ms(NOW + timedelta(seconds=1)))
JUST_NOW = str(to_ms(NOW - timedelta(seconds=1)))
BEFORE = str(to_ms(NOW - timedelta(hours=1)))


def fields(**values: str) -> dict[bytes, bytes]:
    return {name.replace("__", ":").encode(): value.encode() for name, value in values.items()}


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ({"generation": "1"}, "pending"),
        ({"generation": "2", "fetched_generation": "1", "attempts": "3"}, "pending"),
        ({"generation": "1", "started_generation": "1", "lease": SOON}, "fetching"),
        ({"generation": "1", "started_generation": "1", "lease": JUST_NOW}, "pending"),
        ({"generation": "1", "deferrals": "2"}, "deferred"),
        ({"generation": "1", "fetched_generation": "1", "status": "Issued"}, "fetched"),
        ({"generation": "1", "fetched_generation": "1", "status": "DeletedUpstream"}, "deleted_upstream"),
        ({"generation": "2", "fetched_generation": "1", "status": "DeletedUpstream"}, "pending"),
        ({"generation": "1", "dead": "order_missing"}, "dead"),
        ({"generation": "1", "fetched_generation": "1", "deferrals": "1", "lease": SOON}, "fetched"),
        ({"generation": "1", "fetched_generation": "1", "discarded_at": BEFORE}, "discarded"),
        ({"generation": "2", "fetched_generation": "1", "discarded_at": BEFORE}, "pending"),
        (
            {
                "generation": "2",
                "fetched_generation": "2",
                "discarded_at": BEFORE,
                "fetched_at": JUST_NOW,
                "status": "Issued",
            },
            "fetched",
        ),
        (
            {
                "generation": "2",
                "fetched_generation": "2",
                "discarded_at": JUST_NOW,
                "fetched_at": BEFORE,
                "status": "Draft",
            },
            "discarded",
        ),
        (
            {"generation": "2", "fetched_generation": "2", "discarded_at": BEFORE, "status": "DeletedUpstream"},
            "deleted_upstream",
        ),
    ],
)
def test_the_state_is_one_word(values: dict[str, str], state: State) -> None:
    assert parse_record(ORDER, fields(**values)).state(NOW) == state


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"last_event_status": "Draft", "last_event_at": BEFORE}, "Draft"),
        ({"last_event_status": "Draft", "last_event_at": BEFORE, "status": "Issued", "fetched_at": JUST_NOW}, "Issued"),
        ({"last_event_status": "Error", "last_event_at": JUST_NOW, "status": "Issued", "fetched_at": BEFORE}, "Error"),
        ({"status": "Issued", "fetched_at": BEFORE}, "Issued"),
        ({}, ""),
    ],
)
def test_the_known_status_is_the_one_named_last(values: dict[str, str], status: str) -> None:
    assert parse_record(ORDER, fields(**values)).known_status == status


def test_sinks_are_told_apart_by_all_but_the_last_part_of_a_field() -> None:
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


def test_milliseconds_survive_the_way_to_a_time_and_back() -> None:
    assert [to_ms(from_ms(ms)) for ms in (0, 1, 1780301702417, 4102444799999)] == [0, 1, 1780301702417, 4102444799999]
