"""No command shows a guest, a ticket or a link of an order without --reveal, as text or as JSON."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from app.dev.sandbox.process import Sandbox
from tests.lab import FIXTURES, PARTNER, VENUE, Lab, order

CANARY: Final = "canary"
SHOWN: Final = frozenset(
    """
    orderId status partnerId sellToOrderReference buyFromOrderReference sellToLanguage receivedAt jobId itemNumber
    description visitDate visitTime issuedAt currencyCode type
    """.split()  # noqa: SIM905  # as in app/cli/mask.py
)
"""Texts of an order that ops need: its ids and references, and what was sold."""

FETCHED, ERROR, DEAD = order(1), order(2), order(3)


@pytest.fixture
def lab(connected: Lab, sandbox: Sandbox) -> Lab:
    """Orders in every state, their content full of canaries, and two more in the list, of guest@example.com."""
    sandbox.admin("POST", "orders", {"company_id": VENUE, "partner_id": PARTNER, "count": 2, "reference": "WEB"})
    connected.change_companies("[companies.venue]", f'[companies.venue]\nnp_partner_id="{PARTNER}"')
    connected.accept(FETCHED, ERROR, DEAD)
    body = json.loads((FIXTURES / "order-issued.json").read_bytes())
    message = "No stock; mail canary-guest@example.com about it"
    for one, status in ((FETCHED, "Issued"), (ERROR, "Error")):
        changed = {"orderId": one.order_id, "status": status, "statusMessage": message, "newField": CANARY}
        connected.fetch_and_store(one, **_marked(body) | changed)
    connected.dead_letter_delivery(ERROR)
    connected.dead_letter(DEAD)
    return connected


def _marked(part: Any, name: str = "") -> Any:
    """Put a canary into every text that must not be shown."""
    if isinstance(part, dict):
        return {key: _marked(value, key) for key, value in part.items()}
    if isinstance(part, list):
        return [_marked(one, name) for one in part]
    return f"{CANARY}-{name}-0123456789" if isinstance(part, str) and part and name not in SHOWN else part


def test_no_command_shows_a_guest_a_ticket_or_a_link(lab: Lab) -> None:
    (event_id, *_) = [event["id"] for event in lab.run_command("events", "list", "--json").objects]
    commands = [
        *(("orders", command, one.order_id) for command in ("show", "explain") for one in (FETCHED, ERROR, DEAD)),
        ("orders", "list"),
        ("orders", "refetch", FETCHED.order_id),
        ("orders", "erase", FETCHED.order_id, "--dry-run"),
        ("events", "list"),
        ("events", "show", event_id),
        ("events", "replay", "--order", FETCHED.order_id, "--force", "--dry-run"),
        ("replays", "list"),
        ("dead", "list"),
        ("dead", "show", DEAD.order_id),
        ("dead", "show", ERROR.order_id),
        ("dead", "requeue", "--all", "--dry-run"),
        ("reconcile",),
    ]

    ended = lab.run_commands([(*command, *more) for command in commands for more in ((), ("--json",))])

    printed = [one.out + one.err for one in ended]
    assert all(printed)
    assert [one.err for one in ended if one.code > 1] == []
    secrets = (CANARY, "jane doe", "guest@example.com")
    assert [text for text in printed if any(word in text.lower() for word in secrets)] == []


def test_reveal_shows_the_whole_order(lab: Lab) -> None:
    """Else the test above would find nothing, whatever was printed."""
    show = ("orders", "show", FETCHED.order_id, "--reveal")
    table, line = lab.run_commands([show, (*show, "--json")])

    shown = line.objects[0]["order"]
    assert f"{CANARY}-referenceNumber-0123456789" in table.out
    for name in ("sellToName", "sellToEmail", "manifestUrl"):
        assert shown[name] == f"{CANARY}-{name}-0123456789"
