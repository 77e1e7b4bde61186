"""What is read from the body of an order: all that can be, whatever else is odd in it, and nothing shown in print."""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.pretty import pretty_repr

from app.errors import UnreadableAnswer
from app.intake.envelope import parse
from app.upstream.decode import digest
from app.upstream.models import Order, parse_order, parse_page, parse_subscriptions
from tests.samples import ORDER_ID, sample

ISSUED = sample("order-issued")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def order_with(**fields: object) -> Order:
    return parse_order(json.dumps({"orderId": ORDER_ID, "status": "Issued", **fields}).encode())


def test_an_issued_order_has_its_wallets_tickets_coupons_and_manifest() -> None:
    """Times are aware; visits are in local time."""
    order = parse_order(ISSUED)
    item = order.items[1]

    assert (order.order_id, order.status, order.extra) == (ORDER_ID, "Issued", {})
    assert order.manifest_url == "https://assets.npretail.app/manifest/6b2e0f7a-1c3d-4e5f-8a9b-0c1d2e3f4a5b"
    assert [one.wallet_reference_number for one in order.wallets] == ["141234529930210327", "141234529930210328"]
    assert [one.reference_number for one in order.tickets] == ["TK-000123456", "TK-000123457"]
    assert [one.reference_number for one in order.coupons] == ["CP-0009981"]
    assert order.wallets[1].coupons == order.coupons
    assert item.wallets[0].issued_at == datetime(2026, 6, 1, 8, 15, 41, 900_000, UTC)
    assert (item.visit_date, item.visit_time) == (date(2026, 6, 10), time(11, 0))
    assert item.component_schedule[0].visit_time == time(13, 0)


def test_a_failed_order_has_shells_of_wallets_without_an_id() -> None:
    order = parse_order(sample("order-error"))

    assert order.status_message == "Item 31001 has no capacity left on 2026-06-10 10:30."
    assert [(wallet.wallet_id, wallet.issued_at, wallet.assets) for wallet in order.wallets] == [(None, None, ())] * 2
    assert order.wallets[0].external_reference_number == "JD-2026-001"
    assert order.manifest_url is None


def test_an_empty_text_is_the_same_as_an_absent_one_and_a_guid_is_made_canonical() -> None:
    assert order_with(sellToName="", manifestUrl="", items=None) == order_with()
    assert order_with(orderId=f"{{{ORDER_ID.upper()}}}") == order_with()


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ("200.0", Decimal("200.0")),
        ("200", Decimal(200)),
        ('"199.95"', Decimal("199.95")),
        ("0.1", Decimal("0.1")),
        ("12345678901234567890.123456789", Decimal("12345678901234567890.123456789")),
        ("true", None),
        ('"a lot"', None),
        ('"NaN"', None),
        ("1E+999999999", None),
        ("1e99999999999999999999", None),
    ],
)
def test_money_is_exactly_the_digits_that_were_sent(sent: str, read: Decimal | None) -> None:
    order = json.dumps({"orderId": ORDER_ID, "status": "Issued", "items": [{"wallets": [{"unitPriceInclVat": "#"}]}]})
    price = parse_order(order.replace('"#"', sent).encode()).wallets[0].unit_price_incl_vat

    assert price == read
    assert str(price) == str(read)


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ("2026-06-01T08:15:02Z", datetime(2026, 6, 1, 8, 15, 2, 0, UTC)),
        ("2026-06-01T08:15:02.4Z", datetime(2026, 6, 1, 8, 15, 2, 400_000, UTC)),
        ("2026-06-01T08:15:02.4171239Z", datetime(2026, 6, 1, 8, 15, 2, 417_123, UTC)),
        ("2026-06-01T10:15:02+02:00", datetime(2026, 6, 1, 8, 15, 2, 0, UTC)),
        ("2026-06-01T08:15:02", datetime(2026, 6, 1, 8, 15, 2, 0, UTC)),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00+02:00", None),
        ("2026-06-01", None),
        ("yesterday", None),
        ("", None),
        (20260601, None),
    ],
)
def test_a_time_is_read_with_any_fraction_and_is_none_when_it_cannot_be(sent: object, read: datetime | None) -> None:
    assert order_with(receivedAt=sent).received_at == read


@pytest.mark.parametrize(
    "sent",
    [
        {"visitDate": "10/06/2026", "visitTime": "half past ten"},
        {"visitDate": "0001-01-01", "visitTime": ""},
        {"visitDate": 20260610, "visitTime": 10},
        {},
    ],
)
def test_a_visit_that_cannot_be_read_is_none(sent: object) -> None:
    item = order_with(items=[sent]).items[0]

    assert (item.visit_date, item.visit_time) == (None, None)


def test_a_number_sent_as_text_and_a_text_sent_as_number_are_both_read() -> None:
    item = order_with(items=[{"quantity": "2", "lineNo": 100000.0, "itemNumber": 31001}]).items[0]

    assert (item.quantity, item.line_no, item.item_number) == (2, 100000, "31001")


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (2**63 - 1, 2**63 - 1),
        (2**63, None),
        (-(2**63), -(2**63)),
        (-(2**63) - 1, None),
        ("9E29", None),
        (1.5, None),
    ],
)
def test_a_whole_number_is_one_that_a_database_can_hold(sent: object, read: int | None) -> None:
    item = order_with(items=[{"quantity": sent, "lineNo": sent}]).items[0]

    assert (item.quantity, item.line_no) == (read, read)


def test_unknown_fields_are_kept_at_every_level() -> None:
    order = order_with(loyalty={"points": 7}, items=[{"seat": "A1", "wallets": [{"colour": "red"}]}])

    assert order.extra == {"loyalty": {"points": 7}}
    assert order.items[0].extra == {"seat": "A1"}
    assert order.wallets[0].extra == {"colour": "red"}


@pytest.mark.parametrize("status", ["Issued", "Draft", "Error", "Cancelled", "Refunded"])
def test_an_order_is_settled_unless_upstream_is_known_to_work_on_it(status: str) -> None:
    assert order_with(status=status).settled
    assert not any(order_with(status=one).settled for one in ("Submitted", "Scheduled", "Processing"))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"<html>Bad gateway</html>",
        b"null",
        b"[]",
        b'"order"',
        b"{}",
        b'{"status": "Issued"}',
        b'{"orderId": "42", "status": "Issued"}',
        b'{"orderId": "00000000-0000-0000-0000-000000000000", "status": "Issued"}',
        b'{"orderId": "%s"}' % ORDER_ID.encode(),
        b'{"orderId": "%s", "status": ""}' % ORDER_ID.encode(),
        b'{"orderId": "%s", "status": 3}' % ORDER_ID.encode(),
        b'{"orderId": "%s", "status": "%s"}' % (ORDER_ID.encode(), b"x" * 51),
        b'{"orderId": "%s", "status": "\xff"}' % ORDER_ID.encode(),
        b'{"orderId": "%s", "status": "Issued", "n": %s' % (ORDER_ID.encode(), b"[" * 100_000),
        ISSUED[:-20],
    ],
)
def test_an_answer_without_an_order_is_unreadable(raw: bytes) -> None:
    with pytest.raises(UnreadableAnswer) as refused:
        parse_order(raw)

    assert refused.value.reason == "unreadable_answer"


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, b"{}", b'{"data": {}}', b"7", b'"page"'])
def test_an_answer_without_a_page_is_unreadable(raw: bytes) -> None:
    with pytest.raises(UnreadableAnswer):
        parse_page(raw)


@given(st.data())
def test_no_single_odd_value_costs_a_paid_order(data: st.DataObject) -> None:
    tree = json.loads(ISSUED)
    holder = data.draw(st.sampled_from(list(_objects(tree))))
    key = data.draw(st.sampled_from([key for key in holder if key not in ("orderId", "status")]))
    holder[key] = data.draw(json_values)

    assert parse_order(json.dumps(tree).encode()).order_id == ORDER_ID


def _objects(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, list):
        return [found for one in tree for found in _objects(one)]
    return [tree, *_objects(list(tree.values()))] if isinstance(tree, dict) else []


def test_the_repr_of_an_order_shows_no_person_no_ticket_number_and_no_link() -> None:
    order = parse_order(ISSUED)
    secrets = ["Jane", "guest@", "TK-0", "CP-0", "1412345", "JD-2026", "manifest/", "a2cbd5bc", "Museum"]

    for part in (order, *order.items, *order.wallets, *order.tickets):
        printed = f"{part!r} {part} {pretty_repr(part)}"
        assert [secret for secret in secrets if secret in printed] == []
    assert {ORDER_ID, "Issued"} <= set(re.findall(r"[\w-]+", repr(order)))


def test_the_digest_does_not_depend_on_the_notation_and_needs_json() -> None:
    one = b'{"price": 200.0, "small": 0.50, "none": 0.0, "list": [1, {"a": 2e2, "b": "x"}]}'
    same = b'{"list":[1,{"b":"x","a":200}],"none":0,"price":200,"small":0.5}'

    assert digest(one) == digest(same)
    assert len(digest(one)) == 64
    for broken in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(UnreadableAnswer):
            digest(broken)


@pytest.mark.parametrize(
    "other",
    [
        b'{"a": 1, "b": [1, 3]}',
        b'{"a": 1, "b": [2, 1]}',
        b'{"a": "1", "b": [1, 2]}',
        b'{"a": 1.00000000000000000000000000000000001, "b": [1, 2]}',
        b'{"a": 1E+999999999, "b": [1, 2]}',
        b'{"a": 1}',
    ],
)
def test_other_content_has_another_digest(other: bytes) -> None:
    assert digest(other) != digest(b'{"a": 1, "b": [1, 2]}')


@pytest.mark.parametrize("odd", ["NaN", "-Infinity", "9" * 5000, "1e999", '"\\ud83d"', "9223372036854775808"])
def test_one_odd_value_costs_no_order_no_row_and_no_subscription(odd: str) -> None:
    """What the webhook forgives, the answers of the API are forgiven too; a byte order mark as well."""
    order = b"\xef\xbb\xbf" + sample("order-issued").replace(b"{", b'{"x": ' + odd.encode() + b",", 1)
    row = f'{{"orderId": "{ORDER_ID}", "status": "Draft", "externalId": {odd}}}'.encode()

    assert parse_order(order).order_id == ORDER_ID
    assert len(digest(order)) == 64
    assert [one.status for one in parse_page(b"\xef\xbb\xbf[" + row + b"]").rows] == ["Draft"]
    assert len(parse_subscriptions(b'\xef\xbb\xbf{"value": [{"id": "s", "x": ' + odd.encode() + b"}]}")) == 1
    assert len(parse(b'{"values": [{"x": ' + odd.encode() + b'}, {"y": 1}]}', 100).items) == 2


def test_a_page_is_read_with_its_rows_and_their_row_versions() -> None:
    page = parse_page(sample("list-page"))

    assert [(row.order_id, row.status, row.manifest_url) for row in page.rows] == [(ORDER_ID, "Issued", None)]
    assert (page.next_key, page.row_versions, page.unreadable) == (None, {ORDER_ID: 123456}, 0)


def test_a_plain_list_is_one_page_and_row_versions_are_compared_as_numbers() -> None:
    rows = [{"orderId": ORDER_ID, "status": "Draft", "rowVersion": version} for version in ("99", "100", None)]
    page = parse_page(json.dumps(rows).encode())

    assert [row.status for row in page.rows] == ["Draft"] * 3
    assert (page.next_key, page.row_versions) == (None, {ORDER_ID: 100})


def test_a_row_version_that_no_database_gives_counts_as_none() -> None:
    """`lastRowVersion` must be one that upstream reads."""
    versions = [str(2**63 - 1), str(2**63), "-7", "0", "1.5", "NaN", "rubbish", None, True, "1e400"]
    rows = [
        {"orderId": f"00000000-0000-4000-8000-{number:012}", "status": "Draft", "rowVersion": version}
        for number, version in enumerate(versions)
    ]

    page = parse_page(json.dumps(rows).encode())

    assert (list(page.row_versions.values()), len(page.rows)) == ([2**63 - 1], len(versions))


def test_an_unreadable_row_is_counted_and_hides_no_other() -> None:
    rows: list[object] = [{"orderId": "no"}, 7, {"orderId": ORDER_ID, "status": "Draft"}]
    page = parse_page(json.dumps({"data": rows, "morePages": True, "nextPageKey": "K"}).encode())

    assert [row.order_id for row in page.rows] == [ORDER_ID]
    assert (page.unreadable, page.next_key) == (2, "K")


def test_the_client_state_of_a_subscription_is_a_secret() -> None:
    raw = json.dumps({"value": [{"id": "s1", "clientState": "hush-hush", "subscriptionState": "Active"}]})

    (subscription,) = parse_subscriptions(raw.encode())

    assert subscription.client_state is not None
    assert subscription.client_state.get_secret_value() == "hush-hush"
    assert subscription.active
    assert "hush-hush" not in f"{subscription!r} {pretty_repr(subscription)}"
