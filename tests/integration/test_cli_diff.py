"""`orders show --diff`: which wallets, tickets and coupons came, changed or went between two revisions of an order."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Final

import pytest

from app.erasure import Erasure
from app.ledger.ledger import Ledger
from tests.lab import KEYS, LEASE, ONE, Lab
from tests.samples import sample

ITEMS: Final[list[dict[str, Any]]] = json.loads(sample("order-issued"))["items"]
ANOTHER_TICKET: Final = ITEMS[0]["wallets"][0]["assets"][0] | {"assetId": "x", "referenceNumber": "TK-000777888"}
DIFF: Final = ("orders", "show", ONE.order_id, "--diff")
ISSUED, SHELLS = "order-issued", "order-submitted"


def edited(edit: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    """Return the lines of the issued order, edited: a ticket in 100000/1, a ticket and a coupon in 200000/1."""
    items = deepcopy(ITEMS)
    edit(items)
    return items


def wallet(items: list[dict[str, Any]], line: int) -> dict[str, Any]:
    found: dict[str, Any] = items[line]["wallets"][0]
    return found


def fetch(lab: Lab, items: list[dict[str, Any]] | None = None, **changed: Any) -> None:
    lab.accept()
    if items is not None:
        changed["items"] = items
    lab.fetch_and_store(ONE, ISSUED, **changed)


def diff(lab: Lab, *more: str) -> Any:
    ended = lab.run_command(*DIFF, *more, "--json")
    assert ended.code == 0, ended.err
    (found,) = ended.objects
    return found


def changes(lab: Lab, *more: str) -> list[tuple[str, ...]]:
    """Return of each change what, kind and place, then field, old and new value of each field that changed."""
    return [
        (one["what"], one["kind"], one["place"], *(text for field in one["fields"] for text in field.values()))
        for one in diff(lab, *more)["changes"]
    ]


def test_a_wallet_a_ticket_and_a_coupon_come(lab: Lab) -> None:
    fetch(lab, ITEMS[:1])
    fetch(lab)

    assert changes(lab) == [
        ("came", "wallet", "200000/1"),
        ("came", "ticket", "200000/1"),
        ("came", "coupon", "200000/1"),
    ]
    out = lab.run_command(*DIFF).out
    assert "Revision 2 against 1, fetched " in out
    assert "1 wallet, 1 ticket, 1 coupon came." in out


def test_a_coupon_goes_and_another_ticket_takes_the_place_of_one(lab: Lab) -> None:
    def edit(items: list[dict[str, Any]]) -> None:
        wallet(items, 0)["assets"] = [ANOTHER_TICKET]
        wallet(items, 1)["assets"].pop()

    fetch(lab)
    fetch(lab, edited(edit))

    assert changes(lab) == [
        ("came", "ticket", "100000/1"),
        ("went", "ticket", "100000/1"),
        ("went", "coupon", "200000/1"),
    ]
    assert "1 ticket came; 1 ticket, 1 coupon went." in lab.run_command(*DIFF).out


def test_what_changed_is_named_field_by_field(lab: Lab) -> None:
    def edit(items: list[dict[str, Any]]) -> None:
        wallet(items, 0)["unitPriceInclVat"] = 220
        wallet(items, 1)["assets"][0] |= {"itemNumber": "31099", "description": None}

    fetch(lab)
    fetch(lab, edited(edit))

    assert changes(lab) == [
        ("changed", "wallet", "100000/1", "unit_price_incl_vat", "200.0", "220"),
        ("changed", "ticket", "200000/1", "item_number", "31010", "31099", "description", "Museum entry", None),
    ]
    assert "item_number 31010 → 31099, description Museum entry → –" in lab.run_command(*DIFF).out


def test_a_ticket_that_moves_to_another_wallet_is_found_there(lab: Lab) -> None:
    def edit(items: list[dict[str, Any]]) -> None:
        wallet(items, 0)["assets"].append(wallet(items, 1)["assets"].pop(0))

    fetch(lab)
    fetch(lab, edited(edit))

    assert changes(lab) == [("changed", "ticket", "100000/1", "place", "200000/1", "100000/1")]


def test_a_wallet_that_moves_to_another_line_takes_its_tickets_along(lab: Lab) -> None:
    def edit(items: list[dict[str, Any]]) -> None:
        items[0]["wallets"] = [items[1]["wallets"].pop() | {"seqNo": 2}, *items[0]["wallets"]]

    fetch(lab)
    fetch(lab, edited(edit))

    assert changes(lab) == [("changed", "wallet", "100000/2", "place", "200000/1", "100000/2")]


def test_a_shell_that_is_issued_is_the_same_wallet(lab: Lab) -> None:
    lab.accept()
    lab.fetch_and_store(ONE, SHELLS)
    fetch(lab)

    found = changes(lab)

    assert {(what, kind) for what, kind, *_ in found} == {("changed", "wallet"), ("came", "ticket"), ("came", "coupon")}
    assert "Status Submitted is now Issued." in lab.run_command(*DIFF).out


def test_tickets_with_the_same_number_are_counted(lab: Lab) -> None:
    def edit(items: list[dict[str, Any]]) -> None:
        wallet(items, 0)["assets"] *= 3

    fetch(lab)
    fetch(lab, edited(edit))

    assert changes(lab) == [("came", "ticket", "100000/1")] * 2


def test_names_and_numbers_are_masked_without_reveal(lab: Lab) -> None:
    def edit(items: list[dict[str, Any]]) -> None:
        wallet(items, 0).update(name="Ann Lee", walletReferenceNumber="999994529930210999", guestPassport="P1234567")

    fetch(lab)
    fetch(lab, edited(edit))
    secrets = ("Jane", "Doe", "Ann", "Lee", "141234529930210327", "999994529930210999", "P1234567", "TK-0001")

    masked, line = lab.run_command(*DIFF), lab.run_command(*DIFF, "--json")
    assert [secret for secret in secrets if secret in masked.out + masked.err + line.out] == []
    assert "wallet_reference_number …327 → …999, name (hidden), extra (hidden)" in masked.out
    assert "name Jane Doe → Ann Lee" in lab.run_command(*DIFF, "--reveal").out


def test_that_only_other_fields_changed_is_said(lab: Lab) -> None:
    fetch(lab)
    fetch(lab, paymentReference="PAY-2")

    ended = lab.run_command(*DIFF)

    assert "No wallet, ticket or coupon came, changed or went" in ended.out
    assert (ended.code, changes(lab)) == (0, [])


def test_an_order_with_one_revision_has_nothing_to_compare(lab: Lab) -> None:
    """A refetch that found nothing new makes no revision, and keeps nothing."""
    fetch(lab)
    fetch(lab)

    ended = lab.run_command(*DIFF)

    assert (ended.code, "one revision, 1: there is nothing to compare" in ended.out) == (0, True)
    assert (diff(lab)["against"], diff(lab)["changes"]) == (None, [])
    assert not lab.redis.exists(KEYS.revisions(ONE))


def test_an_earlier_revision_may_be_named(lab: Lab) -> None:
    for items in (ITEMS[:1], ITEMS, ITEMS[1:]):
        fetch(lab, items)

    assert [one[0] for one in changes(lab, "2")] == ["came"] * 3
    assert changes(lab) == changes(lab, "3") == [("went", "wallet", "100000/1"), ("went", "ticket", "100000/1")]


def test_of_older_revisions_number_time_digest_and_counts_are_known(lab: Lab) -> None:
    for number in range(7):
        fetch(lab, ITEMS[: 1 + number % 2])

    known = diff(lab)["revisions"]
    older = lab.run_command(*DIFF, "3")

    assert [(one["revision"], one["kept"]) for one in known] == [
        *((number, False) for number in (1, 2)),
        *((number, True) for number in (3, 4, 5, 6, 7)),
    ]
    assert {(len(one["digest"]), one["status"], one["at"] is None) for one in known} == {(64, "Issued", False)}
    assert [(one["wallets"], one["tickets"], one["coupons"]) for one in known[:2]] == [(1, 1, 0), (2, 2, 1)]
    assert older.code == 1
    assert "Of revision 2 only the digest is kept" in older.err
    assert known[0]["digest"][:12] in older.out, "what is known is shown all the same"
    assert "came" not in older.out


@pytest.mark.parametrize(("kept", "with_content"), [(1, [4]), (2, [3, 4]), (20, [1, 2, 3, 4])])
def test_revisions_kept_says_how_many_and_a_lower_number_drops_the_rest(
    lab: Lab, kept: int, with_content: list[int]
) -> None:
    for items in (ITEMS[:1], ITEMS, ITEMS[1:]):
        fetch(lab, items)
    lab.ledger = Ledger(lab.redis, order_days=400, revisions_kept=kept, fetch_lease=LEASE, clock=lab.clock)
    fetch(lab)

    (found,) = lab.run_command(*DIFF, "--json").objects

    assert [one["revision"] for one in found["revisions"] if one["kept"]] == with_content
    redis: Any = lab.redis
    assert sum(b":content" in name for name in redis.hkeys(KEYS.revisions(ONE))) == len(with_content) - 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("9",), "Revision 9 is not known. Known: 1, 2."),
        (("1",), "Revision 1 is the first one known: it has none before it. Known: 1, 2."),
    ],
)
def test_an_unknown_revision_is_refused_with_those_that_exist(lab: Lab, words: tuple[str, ...], text: str) -> None:
    fetch(lab, ITEMS[:1])
    fetch(lab)

    ended = lab.run_command(*DIFF, *words)

    assert (ended.code, ended.out, text in ended.err) == (1, "", True)


def test_an_order_never_fetched_and_a_revision_without_diff_are_refused(lab: Lab) -> None:
    lab.accept()

    never, unused = lab.run_command(*DIFF), lab.run_command("orders", "show", ONE.order_id, "2")

    assert (never.code, "was never fetched" in never.err) == (1, True)
    assert (unused.code, "REVISION needs --diff" in unused.err) == (2, True)


def test_erasure_removes_all_revisions_and_finds_an_address_of_an_older_one(lab: Lab) -> None:
    fetch(lab, sellToEmail="first@example.com")
    fetch(lab, edited(lambda items: wallet(items, 0).update(name="Ann Lee")))
    erasure = Erasure(lab.redis, order_days=400)

    assert erasure.orders_of("FIRST@example.com", None, lambda _: None) == [ONE]
    traces = erasure.traces(ONE)
    assert traces is not None
    assert "first@example.com" in traces.words
    assert erasure.erase(traces) is not None

    assert not lab.redis.exists(KEYS.revisions(ONE))
    ended = lab.run_command(*DIFF)
    assert (ended.code, "was erased: no revision is kept" in ended.err) == (1, True)


def test_after_a_flush_revisions_start_again(lab: Lab) -> None:
    fetch(lab, ITEMS[:1])
    fetch(lab)
    lab.redis.flushdb()
    fetch(lab, ITEMS[1:])

    assert [one["revision"] for one in diff(lab)["revisions"]] == [1]
    fetch(lab)
    assert [one[1] for one in changes(lab)] == ["wallet", "ticket"]


def test_contents_of_a_record_that_was_lost_are_not_taken_for_those_of_the_new_one(lab: Lab) -> None:
    fetch(lab, ITEMS[:1])
    fetch(lab)
    lab.redis.delete(KEYS.record(ONE))
    fetch(lab, ITEMS[1:])
    fetch(lab)

    ended = lab.run_command(*DIFF)

    assert (ended.code, "Of revision 1 only the digest is kept" in ended.err) == (1, True)


@pytest.mark.parametrize("broken", [b"another program", None])
def test_a_broken_key_hides_older_revisions_and_stops_nothing(lab: Lab, broken: bytes | None) -> None:
    fetch(lab, ITEMS[:1])
    lab.overwrite(KEYS.revisions(ONE), broken)
    fetch(lab)

    assert (lab.field("revision"), lab.field("fetched_generation")) == ("2", "2")
    assert [one["revision"] for one in diff(lab)["revisions"]] == [2]


def test_older_revisions_end_with_the_record(lab: Lab) -> None:
    fetch(lab, ITEMS[:1])
    fetch(lab)
    assert lab.days_kept() == {None}
    lab.deliver()
    assert lab.acquire_delivery() is None

    assert lab.days_kept() == {400}
    assert lab.redis.pttl(KEYS.revisions(ONE)) > 0


def test_it_fits_in_80_columns(lab: Lab) -> None:
    def edit(items: list[dict[str, Any]]) -> None:
        wallet(items, 0).update(
            name="Ann Lee", externalReferenceNumber="JD-2026-999", walletReferenceNumber="9" * 18, currencyCode="EUR"
        )
        wallet(items, 1)["assets"][0]["description"] = "A museum entry with a long description " * 3

    fetch(lab, ITEMS[:1])
    fetch(lab)
    fetch(lab, edited(edit))

    ended = lab.on_terminal(80, *DIFF)

    assert ended.code == 0
    assert max(map(len, ended.out.splitlines())) <= 80
