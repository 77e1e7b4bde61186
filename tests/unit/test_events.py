"""Any body becomes items or a reason code, and an event has one digest however it is written."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from app.errors import RequestRefused
from app.ids import guid
from app.intake.envelope import Envelope, OrderProcessed, parse, shape
from tests.samples import COMPANY_ID, sample
from tests.samples import ORDER_ID as ORDER

OTHER = "0f3f2f5a-6d3b-4b0e-8f55-5a1c9b7d1000"


def event(**changes: str) -> OrderProcessed:
    whole: dict[str, Any] = {
        "company_id": COMPANY_ID,
        "order_id": ORDER,
        "status": "Issued",
        "reference": "CM-20260515093000-A1B2",
        "timestamp": "2026-05-15T09:30:05Z",
        "secret": "current",
    }
    return OrderProcessed(**(whole | changes))


def refusal(body: bytes, max_items: int = 100_000) -> str:
    with pytest.raises(RequestRefused) as refused:
        parse(body, max_items)
    return refused.value.reason


@pytest.mark.parametrize(("shape", "orders"), [("values", 1), ("value", 2), ("bare", 1)])
def test_all_three_documented_shapes_are_accepted(shape: str, orders: int) -> None:
    envelope = parse(sample(f"webhook-{shape}"), 100)

    assert (len(envelope.items), envelope.broken) == (orders, 0)
    for item in envelope.items:
        assert item.client_state == "secret_value_from_subscription_creation_mirrored"
        assert item.company_id == COMPANY_ID
        assert item.event_name == "ota_cm_order_processed"
        assert item.payload.keys() == {"orderId", "buyFromOrderReference", "status"}
        assert item.timestamp.startswith("2026-05-15T09:30:05")


@pytest.mark.parametrize("wrapper", ["values", "value"])
def test_elements_that_are_not_objects_are_counted_and_the_others_kept(wrapper: str) -> None:
    elements: list[object] = [5, None, "text", [], True, {"companyId": COMPANY_ID}, {}, {"payload": [1]}]

    envelope = parse(json.dumps({wrapper: elements}).encode(), 100)

    assert (len(envelope.items), envelope.broken) == (3, 5)
    assert envelope.items[0].company_id == COMPANY_ID


@pytest.mark.parametrize("element", [b"{}", b"1", b"[]", b"[[]]", b'{"a":[{}]}'])
@pytest.mark.parametrize("wrapper", [b"values", b"value"])
def test_more_items_than_the_limit_are_refused_before_their_time_is_spent(wrapper: bytes, element: bytes) -> None:
    def body(count: int) -> bytes:
        return b'{"%b":[%b]}' % (wrapper, b",".join([element] * count))

    envelope = parse(body(100), 100)
    assert len(envelope.items) + envelope.broken == 100
    assert refusal(body(101), 100) == "too_many_items"
    started = time.process_time()
    assert refusal(body(350_000), 100) == "too_many_items"
    assert time.process_time() - started < (0.2 if element == b"1" else 0.05)


@pytest.mark.parametrize(
    ("body", "place", "expected"),
    [
        (
            {"values": [{"clientState": "canary", "payload": {"orderNo": "canary-1", "jane@canary": None, "x1": 5}}]},
            0,
            "{payload: {orderNo: text 8, ?: null, ?: int}}",
        ),
        ({"values": [5, {"companyId": "canary"}, {"data": [{"a": "canary"}, 1]}]}, 1, "{data: list 2 [{a: text 6}]}"),
        ({"values": [], "value": {"payload": {"a": {"b": {"c": "canary"}}}}}, 0, "{payload: {a: {b: dict 1}}}"),
        (
            {"values": [], "payload": "canary", "timestamp": 1.5},
            0,
            "{values: list 0, payload: text 6, timestamp: float}",
        ),
        ({"values": [{"payload": {f"{n * 'a'}": "canary" for n in range(1000)}}]}, 0, None),
    ],
)
def test_the_shape_of_an_item_holds_names_types_and_lengths_and_no_value(
    body: object, place: int, expected: str | None
) -> None:
    found = shape(json.dumps(body).encode(), place)

    assert found == expected if expected else len(found) <= 1000
    assert found
    assert "canary" not in found


@pytest.mark.parametrize("body", [b'{"values":[]}', b'{"value":[]}', b'\xef\xbb\xbf{"values":[]}', b' {"values":[]}\n'])
def test_an_empty_envelope_is_an_envelope(body: bytes) -> None:
    assert parse(body, 100) == Envelope([], 0)


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b'{"values":[],"value":[{"eventName":"a"}]}', ["a"]),
        (b'{"values":[{"eventName":"a"}],"value":[{"eventName":"b"}]}', ["a", "b"]),
        (b'{"values":[],"eventName":"a","payload":{}}', ["a"]),
        (b'{"value":[{"eventName":"b"}],"payload":{}}', ["b", None]),
        (b'{"values":null,"value":[{"eventName":"b"}]}', ["b"]),
        (b'{"values":[],"value":{"eventName":"b"}}', ["b"]),
        (b'{"values":{"eventName":"a"}}', ["a"]),
    ],
)
def test_all_shapes_of_a_body_count_together(body: bytes, events: list[str | None]) -> None:
    """Else a POST is answered 200 and what is in its other half is lost."""
    assert [item.event_name for item in parse(body, 100).items] == events


@pytest.mark.parametrize(
    "body",
    [b'{"values":[{"payload":{"orderId":"1"}}],"values":[]}', b'{"values":[],"items":[{"payload":{"orderId":1}}]}'],
)
def test_a_body_whose_orders_stand_elsewhere_is_no_envelope(body: bytes) -> None:
    assert refusal(body) == "no_envelope"


def test_unknown_fields_are_ignored_at_every_level() -> None:
    body = {"@odata.context": "x", "values": [{"companyId": COMPANY_ID, "new": {"deep": [1]}, "payload": {"new": 1}}]}

    (item,) = parse(json.dumps(body).encode(), 100).items

    assert item.company_id == COMPANY_ID


def test_items_may_have_fields_of_any_type() -> None:
    """Values are checked per item, so that one wrong field cannot fail the other items."""
    names = ("clientState", "companyId", "eventName", "payload", "timestamp")
    values: tuple[Any, ...] = (None, True, 5, 10**400, -1.5, "x" * 100_000, [], [[]], {}, {"a": None})
    items = [dict.fromkeys(names, value) for value in values]

    assert len(parse(json.dumps({"values": items}).encode(), 100).items) == len(values)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"values",
        b'{"values":[',
        b'{"values":[]} trailing',
        b"\xff\xfe{\x00}",
        b'{"values":[{"clientState":"\xff"}]}',
        b'{"a":' * 100_000,
        b'{"values":' + b"[" * 100_000,
        b'{"value":[{"payload":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    assert refusal(body) == "not_json"


@pytest.mark.parametrize(
    "body",
    [b"5", b"null", b'"values"', b"[]", b"[{}]", b"{}", b'{"values":null}', b'{"values":{}}', b'{"timestamp":"x"}'],
)
def test_json_that_is_not_an_envelope_is_refused(body: bytes) -> None:
    assert refusal(body) == "no_envelope"


def test_of_duplicate_names_the_last_one_counts() -> None:
    assert len(parse(b'{"values":[{}],"values":[{},{}]}', 100).items) == 2


@pytest.mark.parametrize(
    "sent",
    [
        *(f"2026-05-15T09:30:05{fraction}Z" for fraction in ("", ".", ".0", ".0000000", ".00000000")),
        *(f"2026-05-15T09:30:05{zone}" for zone in ("", "z", "+00:00", "-00:00")),
        "2026-05-15T11:30:05.0+02:00",
        "2026-05-14t23:30:05-10:00",
    ],
)
def test_two_spellings_of_one_moment_are_the_same_event(sent: str) -> None:
    assert event(timestamp=sent).digest == event().digest


def test_what_differs_in_any_character_that_matters_is_another_event() -> None:
    """An eighth digit, the 251st character, and a NUL on either side of the border between two fields."""
    times = [f"2026-05-15T09:30:05.{'1' * count}Z" for count in range(1, 10)]
    times += [
        "2026-02-30T09:30:05Z",
        "2026-02-30T09:30:05.0Z",
        "yesterday",
        "x" * 250,
        "x" * 251,
        "0001-01-01T00:00:00+14:00",
    ]
    others = [event(status="Issued\0"), event(timestamp="\x002026-05-15T09:30:05Z"), event(status="x" * 250)]
    others += [event(status="x" * 251), event(status="1:x", timestamp="y"), event(status="1", timestamp=":xy")]
    digests = [event(timestamp=one).digest for one in times] + [one.digest for one in others]

    assert len(set(digests)) == len(digests)


def test_long_texts_are_cut_where_they_are_stored() -> None:
    stored = event(reference="x" * 10_000, timestamp="y" * 10_000, status="z" * 10_000).arguments()

    assert all(len(str(one)) <= 250 for one in stored)


@pytest.mark.parametrize(
    ("field", "value"),
    [("company_id", OTHER), ("order_id", OTHER), ("status", "Error"), ("timestamp", "2026-05-15T09:30:06Z")],
)
def test_another_company_order_status_or_time_is_another_event(field: str, value: str) -> None:
    assert event(**{field: value}).digest != event().digest


def test_another_secret_or_reference_is_the_same_event() -> None:
    """A redelivery after the secret was rotated is still the same event."""
    assert event(secret="previous", reference="CM-2").digest == event().digest
    assert event(timestamp="").digest == "", "an event without a timestamp cannot be compared"


def test_a_guid_has_one_form() -> None:
    assert {guid(one) for one in (ORDER, ORDER.upper(), f" {ORDER}\n", f"{{{ORDER}}}", f"{{{ORDER.upper()}}}")} == {
        ORDER
    }
    assert {guid(one) for one in (ORDER.replace("-", ""), f"{{ {ORDER.replace('-', '').upper()} }}")} == {ORDER}


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        [],
        {},
        "",
        "x",
        ORDER[:-1],
        ORDER + "0",
        f"{ORDER[:8]} {ORDER[9:]}",
        f"[{ORDER}]",
        f"{ORDER}\0",
        "٣" * 36,
    ],
)
def test_a_value_that_is_not_a_guid_is_refused(value: object) -> None:
    """It would be used in URLs and keys."""
    assert guid(value) is None


def test_a_status_is_one_word_or_unknown() -> None:
    assert [event(status=one).status_word for one in ("Issued", "Sold_Out-2")] == ["Issued", "Sold_Out-2"]
    assert {event(status=one).status_word for one in ("", "two words", "é")} == {"Unknown"}
