"""One word says where an order stands, and it is the one that tells ops what to do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from app.ids import OrderKey
from app.ledger.orders import SinkRecord, State, parse_record
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
        ({"wanted": "1"}, "owed"),
        ({"wanted": "2", "done": "1", "tries": "3"}, "owed"),
        ({"wanted": "1", "begun": "1", "lease": SOON}, "fetching"),
        ({"wanted": "1", "begun": "1", "lease": JUST_NOW}, "owed"),
        ({"wanted": "1", "parks": "2"}, "parked"),
        ({"wanted": "1", "done": "1", "status": "Issued"}, "home"),
        ({"wanted": "1", "done": "1", "status": "Gone"}, "gone"),
        ({"wanted": "2", "done": "1", "status": "Gone"}, "owed"),
        ({"wanted": "1", "dead": "order_missing"}, "dead"),
        ({"wanted": "1", "done": "1", "parks": "1", "lease": SOON}, "home"),
        ({"wanted": "1", "done": "1", "dropped": BEFORE}, "dropped"),
        ({"wanted": "2", "done": "1", "dropped": BEFORE}, "owed"),
        ({"wanted": "2", "done": "2", "dropped": BEFORE, "fetched": JUST_NOW, "status": "Issued"}, "home"),
        ({"wanted": "2", "done": "2", "dropped": JUST_NOW, "fetched": BEFORE, "status": "Draft"}, "dropped"),
        ({"wanted": "2", "done": "2", "dropped": BEFORE, "status": "Gone"}, "gone"),
    ],
)
def test_the_state_is_one_word(values: dict[str, str], state: State) -> None:
    assert parse_record(ORDER, fields(**values)).state(NOW) == state


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"said": "Draft", "heard": BEFORE}, "Draft"),
        ({"said": "Draft", "heard": BEFORE, "status": "Issued", "fetched": JUST_NOW}, "Issued"),
        ({"said": "Error", "heard": JUST_NOW, "status": "Issued", "fetched": BEFORE}, "Error"),
        ({"status": "Issued", "fetched": BEFORE}, "Issued"),
        ({}, ""),
    ],
)
def test_the_known_status_is_the_one_told_last(values: dict[str, str], status: str) -> None:
    assert parse_record(ORDER, fields(**values)).known_status == status


def test_sinks_are_told_apart_by_all_but_the_last_part_of_a_field() -> None:
    values = {
        b"python:shop:take:at": b"2",
        b"python:shop:take:tries": b"1",
        b"python:shop:take:next": BEFORE.encode(),
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
