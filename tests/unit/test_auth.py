"""An item is good only with a live clientState of its own company, whatever else it holds."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from app.intake.auth import Authenticator, Batch
from app.intake.envelope import Envelope, Item
from tests.samples import ORDER_ID as ORDER
from tests.samples import company

A = "aaaaaaaa-0000-4000-8000-000000000000"
B = "bbbbbbbb-0000-4000-8000-000000000000"
STRANGER = "cccccccc-0000-4000-8000-000000000000"

AUTHENTICATOR = Authenticator(
    [company(A, "state of A", client_state_previous=SecretStr("former of A")), company(B, "stäte of B ☃")]
)


def item(company_id: object = A, client_state: object = "state of A", **changes: Any) -> Item:
    whole = {
        "event_name": "ota_cm_order_processed",
        "payload": {"orderId": ORDER, "status": "Issued", "buyFromOrderReference": "CM-1"},
        "timestamp": "2026-05-15T09:30:05Z",
    }
    return Item(client_state=client_state, company_id=company_id, **(whole | changes))


def authenticate(*items: Item, broken: int = 0) -> Batch:
    return AUTHENTICATOR.authenticate(Envelope(list(items), broken))


@pytest.mark.parametrize(
    ("company_id", "client_state", "name"),
    [
        (A, "state of A", "current"),
        (A, "former of A", "previous"),
        (B, "stäte of B ☃", "current"),
        (f"{{{A.upper()}}}", "state of A", "current"),
        (f" {A}\t", "state of A", "current"),
        (A.replace("-", ""), "state of A", "current"),
        (f"{{ {A.replace('-', '').upper()} }}", "state of A", "current"),
    ],
)
def test_a_secret_of_its_own_company_proves_an_item(company_id: str, client_state: str, name: str) -> None:
    batch = authenticate(item(company_id, client_state))

    (event,) = batch.events
    assert (event.order_id, event.secret) == (ORDER, name)
    assert event.company_id == (B if company_id == B else A)
    assert (batch.proven, batch.invalid_items, batch.rejected) == (1, {}, {})


@pytest.mark.parametrize(
    ("company_id", "client_state"),
    [
        (A, "state of a"),
        (A, "state of A "),
        (A, ""),
        (A, "stäte of B ☃"),
        (B, "state of A"),
        (B, "former of A"),
        (B, "None"),
        (B, ""),
        (B, "stäte of B"),
        (STRANGER, "state of A"),
    ],
)
def test_any_other_secret_proves_nothing(company_id: str, client_state: str) -> None:
    batch = authenticate(item(company_id, client_state))

    assert (batch.events, batch.proven, batch.invalid_items) == ((), 0, {"unauthenticated": 1})


@pytest.mark.parametrize("company_id", [None, ""])
def test_an_item_without_company_is_of_the_only_company_with_its_secret(company_id: object) -> None:
    assert [one.company_id for one in authenticate(item(company_id, "former of A")).events] == [A]
    assert [one.company_id for one in authenticate(item(company_id, "stäte of B ☃")).events] == [B]
    assert authenticate(item(company_id, "state of C")).rejected == {"unknown": 1}

    shared = Authenticator([company(A, "same"), company(B, "same")])
    batch = shared.authenticate(Envelope([item(company_id, "same"), item(A, "same"), item([], "same")]))
    assert ([one.company_id for one in batch.events], batch.invalid_items) == ([A], {"unauthenticated": 2})


@pytest.mark.parametrize(
    "client_state",
    [None, True, 5, 10**400, 1.5, [], ["state of A"], {}, {"state of A": 1}, "x" * 1_000_000, "\ud800", "\0", "☃" * 50],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:8]!a}",
)
def test_a_client_state_of_any_type_is_refused_without_an_error(client_state: object) -> None:
    assert authenticate(item(A, client_state)).invalid_items == {"unauthenticated": 1}


def test_an_unknown_company_and_a_wrong_secret_give_the_same_reason() -> None:
    wrong, unknown = authenticate(item(A, "guess")), authenticate(item(STRANGER, "guess"))

    assert (wrong.events, wrong.proven, wrong.invalid_items) == (unknown.events, unknown.proven, unknown.invalid_items)
    assert (wrong.rejected, unknown.rejected) == ({A: 1}, {"unknown": 1})


NO_GUIDS: list[Any] = [None, 5, [], "CM-1", ORDER + "/../x", A[:-1]]
NO_IDS: list[tuple[dict[str, Any], int]] = [
    *(({"payload": {"orderId": value}}, 1) for value in NO_GUIDS),
    *(({"payload": value}, 1) for value in NO_GUIDS),
    *(({"company_id": value}, 0) for value in NO_GUIDS if value is not None),
]


@pytest.mark.parametrize(("change", "proven"), NO_IDS, ids=repr)
def test_an_item_without_valid_ids_is_invalid(change: dict[str, Any], proven: int) -> None:
    batch = authenticate(item(**change))

    reason = "bad_order_id" if proven else "unauthenticated"
    assert (batch.events, batch.proven, batch.invalid_items) == ((), proven, {reason: 1})


@pytest.mark.parametrize("event_name", ["pos_sale_completed", "ota_cm_order_processed_2", "ota cm order processed"])
def test_events_of_other_names_are_ignored(event_name: object) -> None:
    batch = authenticate(item(event_name=event_name))

    assert (batch.events, batch.proven, batch.ignored, batch.invalid_items) == ((), 1, 1, {})


@pytest.mark.parametrize("event_name", ["OTA_CM_Order_Processed", " ota_cm_order_processed\n", "", None, 5, []])
def test_an_item_with_an_order_id_is_an_event_whatever_spoils_its_name(event_name: object) -> None:
    """Only the name of another event tells that it is none: an order is rather fetched once too often than lost."""
    assert len(authenticate(item(event_name=event_name)).events) == 1
    assert authenticate(item(event_name=event_name, payload={})).invalid_items == {"bad_order_id": 1}


def test_valid_items_between_invalid_ones_are_accepted() -> None:
    batch = authenticate(
        item(A, "guess"),
        item(A, "state of A"),
        item(B, "state of A"),
        item(B, "stäte of B ☃"),
        item(payload={"orderId": "x"}),
        item(event_name="other"),
        Item(),
        broken=3,
    )

    assert [event.company_id for event in batch.events] == [A, B]
    assert (batch.proven, batch.ignored) == (4, 1)
    assert batch.invalid_items == {"unauthenticated": 3, "bad_order_id": 1, "bad_item": 3}


def test_fields_of_other_types_are_empty() -> None:
    odd = {"orderId": f"{{{ORDER.upper()}}}", "status": 5, "buyFromOrderReference": 7}
    (event,) = authenticate(item(payload=odd, timestamp=["t"])).events

    assert (event.order_id, event.status, event.timestamp, event.digest) == (ORDER, "", "", "")
    assert event.reference == ""


def test_a_batch_contains_no_secret() -> None:
    batch = authenticate(item(A, "state of A"), item(A, "former of A"), item(A, "canary guess"))

    assert not any(secret in repr(batch) for secret in ("state of A", "former of A", "canary"))
    assert "state of A" not in repr(vars(AUTHENTICATOR))
