"""Names of guests, numbers and links of an order are masked; what operations need is shown."""

from __future__ import annotations

import re
import time

import msgspec
import pytest

from app.explain.mask import masked
from app.upstream.models import Order, parse_order
from tests.samples import sample


def order(name: str) -> Order:
    return parse_order(sample(name))


@pytest.mark.parametrize("name", ["order-issued", "order-draft", "order-error", "order-submitted"])
def test_numbers_names_and_links_are_masked(name: str) -> None:
    whole = order(name)
    secrets = {whole.sell_to_email, whole.sell_to_name, whole.payment_reference, whole.manifest_url}
    for wallet in whole.wallets:
        secrets |= {wallet.wallet_id, wallet.wallet_reference_number, wallet.manifest_url}
        secrets |= {wallet.external_reference_number}
        secrets |= {text for asset in wallet.assets for text in (asset.id, asset.asset_id, asset.reference_number)}
    shown = msgspec.json.encode(masked(whole)).decode()

    assert [secret for secret in secrets - {None} if str(secret) in shown] == []
    assert "Doe" not in shown
    # By itself: a package's wallet bears the package's name, which may be seen where it is the item's.
    assert {wallet.name for wallet in masked(whole).wallets} == {"…"}


def test_only_the_end_of_a_long_number_is_shown() -> None:
    whole = order("order-issued")

    assert [ticket.reference_number for ticket in masked(whole).tickets] == ["…456", "…457"]
    assert masked(msgspec.structs.replace(whole, payment_reference="PAY-987")).payment_reference == "…"


def test_an_unknown_field_is_not_shown() -> None:
    raw = sample("order-issued").replace(b'"jobId"', b'"guestPassport": "P1234567", "jobId"')
    whole = parse_order(raw)
    assert whole.extra == {"guestPassport": "P1234567"}

    assert b"P1234567" not in msgspec.json.encode(masked(whole))


def test_ids_references_and_dates_are_shown() -> None:
    def kept(one: Order) -> tuple[object, ...]:
        items = [(len(item.wallets), item.visit_date) for item in one.items]
        return one.order_id, one.status, one.sell_to_order_reference, items

    assert kept(masked(order("order-issued"))) == kept(order("order-issued"))


def test_addresses_and_masked_values_of_other_fields_are_masked_in_the_status_message() -> None:
    """Names and each word of them, and numbers wherever they are; the rest stays."""
    whole = msgspec.structs.replace(order("order-issued"), sell_to_name="Ann Ørsted-Lee")
    wallet = whole.wallets[0]
    number = wallet.assets[0].reference_number
    text = (
        f"Ticket {number} (x{number}x) of ANN  ørsted-lee, Mrs Lee, in wallet {wallet.wallet_reference_number}"
        f" {wallet.external_reference_number}: annulled, item {whole.items[0].item_number} is sold out"
        " for <guest@example.com>."
    )

    shown = masked(msgspec.structs.replace(whole, status_message=text)).status_message

    assert shown == (
        f"Ticket … (x…x) of …, Mrs …, in wallet … …: annulled, item {whole.items[0].item_number} is sold out for <…>."
    )


@pytest.mark.parametrize(
    ("long", "shown"), [("x" * 100_000, "x" * 100_000), ("x." * 50_000 + "@x", "…"), ("@" * 100_000, "…")]
)
def test_a_long_word_in_the_status_message_takes_no_longer_than_its_length(long: str, shown: str) -> None:
    """In the square of its length it would take half a minute."""
    whole = msgspec.structs.replace(order("order-issued"), status_message=long)
    began = time.perf_counter()

    assert masked(whole).status_message == shown
    assert time.perf_counter() - began < 2


def test_a_short_number_is_cut_out_only_where_it_stands_alone() -> None:
    raw = re.sub(rb'("assets": \[\s*\{\s*"id": )"[^"]+"', rb'\1"1"', sample("order-issued"), count=1)
    whole = msgspec.structs.replace(parse_order(raw), status_message="Asset 1 of item 31001 is blocked.")

    assert whole.wallets[0].assets[0].id == "1"
    assert masked(whole).status_message == "Asset … of item 31001 is blocked."
