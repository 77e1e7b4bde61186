"""Any body becomes items or a reason code, and an event has one digest however it is written."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import RequestRefused
from app.ids import guid
from app.intake.envelope import OrderProcessed, canonical_time, parse

FIXTURES = Path(__file__).parents[1] / "fixtures"
COMPANY = "b56a418d-8205-4d3a-bdbb-25d94e42abbd"
ORDER = "9c6b2f4e-2b71-4d23-9d6a-a3b4c5d6e7f8"
OTHER = "0f3f2f5a-6d3b-4b0e-8f55-5a1c9b7d1000"


def event(**changes: str) -> OrderProcessed:
    whole: dict[str, Any] = {
        "company_id": COMPANY,
        "order_id": ORDER,
        "status": "Issued",
        "reference": "CM-20260515093000-A1B2",
        "timestamp": "2026-05-15T09:30:05Z",
        "secret": "current",
    }
    return OrderProcessed(**(whole | changes))


def outcome(body: bytes) -> str:
    try:
        parse(body)
    except RequestRefused as refused:
        return refused.reason
    return "items"


@pytest.mark.parametrize(("shape", "orders"), [("values", 1), ("value", 2), ("bare", 1)])
def test_all_three_documented_shapes_are_accepted(shape: str, orders: int) -> None:
    envelope = parse((FIXTURES / f"webhook-{shape}.json").read_bytes())

    assert (len(envelope.items), envelope.broken) == (orders, 0)
    for item in envelope.items:
        assert item.client_state == "secret_value_from_subscription_creation_mirrored"
        assert item.company_id == COMPANY
        assert item.event_name == "ota_cm_order_processed"
        assert item.payload.keys() == {"orderId", "buyFromOrderReference", "status"}
        assert item.timestamp.startswith("2026-05-15T09:30:05")


@pytest.mark.parametrize("wrapper", ["values", "value"])
def test_elements_that_are_not_objects_are_counted_and_the_others_kept(wrapper: str) -> None:
    elements: list[object] = [5, None, "text", [], True, {"companyId": COMPANY}, {}, {"payload": [1]}]

    envelope = parse(json.dumps({wrapper: elements}).encode())

    assert (len(envelope.items), envelope.broken) == (3, 5)
    assert envelope.items[0].company_id == COMPANY


@pytest.mark.parametrize("body", [b'{"values":[]}', b'{"value":[]}', b'\xef\xbb\xbf{"values":[]}', b' {"values":[]}\n'])
def test_an_empty_envelope_is_an_envelope(body: bytes) -> None:
    envelope = parse(body)

    assert (envelope.items, envelope.broken) == ([], 0)


def test_unknown_fields_are_ignored_at_every_level() -> None:
    body = {"@odata.context": "x", "values": [{"companyId": COMPANY, "new": {"deep": [1]}, "payload": {"new": 1}}]}

    (item,) = parse(json.dumps(body).encode()).items

    assert item.company_id == COMPANY


def test_items_may_have_fields_of_any_type() -> None:
    """Values are checked per item, so that one wrong field cannot fail the other items."""
    names = ("clientState", "companyId", "eventName", "payload", "timestamp")
    values: tuple[Any, ...] = (None, True, 5, 10**400, -1.5, "x" * 100_000, [], [[]], {}, {"a": None})
    items = [dict.fromkeys(names, value) for value in values]

    assert len(parse(json.dumps({"values": items}).encode()).items) == len(values)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"values",
        b'{"values":[',
        b'{"values":[]} trailing',
        b'{"values":[{"x":NaN}]}',
        b"\xff\xfe{\x00}\x00",
        b'{"values":[{"clientState":"\xff"}]}',
        b'{"a":' * 100_000,
        b'{"values":' + b"[" * 100_000,
        b'{"value":[{"payload":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    assert outcome(body) == "not_json"


@pytest.mark.parametrize(
    "body",
    [b"5", b"null", b'"values"', b"[]", b"[{}]", b"{}", b'{"values":null}', b'{"values":{}}', b'{"timestamp":"x"}'],
)
def test_json_that_is_not_an_envelope_is_refused(body: bytes) -> None:
    assert outcome(body) == "no_envelope"


def test_of_duplicate_names_the_last_one_counts() -> None:
    assert len(parse(b'{"values":[{}],"values":[{},{}]}').items) == 2


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_bytes_are_items_or_a_reason(body: bytes) -> None:
    assert outcome(body) in {"items", "not_json", "no_envelope"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["values", "value", "eventName", "payload", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_any_json_is_items_or_no_envelope(value: object) -> None:
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    assert outcome(body) in {"items", "no_envelope"}


@pytest.mark.parametrize("fraction", ["", *("." + "0" * digits for digits in range(1, 8)), ".00000009"])
def test_a_whole_second_is_the_same_event_with_any_number_of_zeros(fraction: str) -> None:
    assert event(timestamp=f"2026-05-15T09:30:05{fraction}Z").digest == event().digest


def test_seven_digits_of_a_fraction_distinguish_events_and_the_eighth_does_not() -> None:
    digits = [f"2026-05-15T09:30:05.{'1' * count}Z" for count in range(1, 10)]
    digests = [event(timestamp=one).digest for one in digits]

    assert len(set(digests[:7])) == 7
    assert all(one == other for one, other in pairwise(digests[6:]))


@pytest.mark.parametrize(
    ("sent", "canonical"),
    [
        ("2026-05-15T09:30:05.1200000Z", "2026-05-15T09:30:05.12Z"),
        ("2026-05-15T09:30:05.1234567890123Z", "2026-05-15T09:30:05.1234567Z"),
        ("2026-05-15T09:30:05.0+02:00", "2026-05-15T09:30:05+02:00"),
        ("2026-05-15T09:30:05.0", "2026-05-15T09:30:05"),
        ("2026-05-15T09:30:05.", "2026-05-15T09:30:05."),
        ("yesterday", "yesterday"),
        (".5", ".5"),
        ("", ""),
    ],
)
def test_a_timestamp_is_compared_as_sent_except_for_its_fraction(sent: str, canonical: str) -> None:
    assert canonical_time(sent) == canonical


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789.:-TZ+", max_size=40))
def test_a_canonical_time_is_its_own_canonical_form(sent: str) -> None:
    assert canonical_time(canonical_time(sent)) == canonical_time(sent)


@pytest.mark.parametrize(
    ("field", "value"),
    [("company_id", OTHER), ("order_id", OTHER), ("status", "Error"), ("timestamp", "2026-05-15T09:30:06Z")],
)
def test_another_company_order_status_or_time_is_another_event(field: str, value: str) -> None:
    assert event(**{field: value}).digest != event().digest


@pytest.mark.parametrize(
    "change", [{"secret": "previous"}, {"reference": "CM-2"}], ids=lambda change: next(iter(change))
)
def test_another_secret_or_reference_is_the_same_event(change: dict[str, str]) -> None:
    """A redelivery after the secret was rotated is still the same event."""
    assert event(**change).digest == event().digest


def test_an_event_without_timestamp_has_no_digest() -> None:
    assert event(timestamp="").digest == ""


@pytest.mark.parametrize("written", [ORDER, ORDER.upper(), f"{{{ORDER}}}", f"{{{ORDER.upper()}}}"])
def test_a_guid_has_one_form(written: str) -> None:
    assert guid(written) == ORDER


@pytest.mark.parametrize(
    "value",
    [None, 5, [], {}, "", "x", ORDER[:-1], ORDER + "0", f" {ORDER}", f"{ORDER}\n", ORDER.replace("-", ""), "٣" * 36],
)
def test_a_value_that_is_not_a_guid_is_refused(value: object) -> None:
    """It would be used in URLs and keys."""
    assert guid(value) is None


@pytest.mark.parametrize(
    ("status", "word"),
    [("Issued", "Issued"), ("Sold_Out-2", "Sold_Out-2"), ("", "Unknown"), ("two words", "Unknown"), ("é", "Unknown")],
)
def test_a_status_is_one_word_or_unknown(status: str, word: str) -> None:
    assert event(status=status).status_word == word
