"""No command shows a guest, a ticket or a link of an order without --reveal, as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from redis import Redis

from app.dev.sandbox.process import Sandbox, start
from tests.lab import API_KEY, PARTNER, VENUE, Lab, order

CANARY: Final = "canary"
SHOWN: Final = frozenset(
    """
    orderId status partnerId sellToOrderReference buyFromOrderReference sellToLanguage receivedAt jobId itemNumber
    description visitDate visitTime issuedAt currencyCode type
    """.split()  # noqa: SIM905  # as in app/cli/mask.py
)
"""Texts of an order that ops need: its ids and references, and what was sold."""

FETCHED, ERROR, DEAD = order(1), order(2), order(3)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """A Channel Manager whose list has orders that we do not hold; their guest is Jane Doe, guest@example.com."""
    with start(seed=5) as one:
        company = {"id": VENUE, "name": "Venue", "tenant": "tenant", "environment": "Sandbox", "api_keys": [API_KEY]}
        one.admin("POST", "companies", company)
        one.admin("POST", "orders", {"company_id": VENUE, "partner_id": PARTNER, "count": 2, "reference": "WEB"})
        yield one


@pytest.fixture
def lab(sandbox: Sandbox, redis_client: Redis, redis_url: str, tmp_path: Path) -> Lab:
    """Orders in every state, their content full of canaries."""
    lab = Lab(redis_client, redis_url, tmp_path, sandbox.url)
    companies = Path(lab.env["COMPANIES_FILE"])
    companies.write_text(
        companies.read_text().replace("[companies.venue]", f'[companies.venue]\nnp_partner_id="{PARTNER}"')
    )
    lab.accept(FETCHED, ERROR, DEAD)
    for one, status in ((FETCHED, "Issued"), (ERROR, "Error")):
        body = json.loads((Path(__file__).parents[1] / "fixtures" / "order-issued.json").read_bytes())
        message = "No stock; mail canary-guest@example.com about it"
        changed = {"orderId": one.order_id, "status": status, "statusMessage": message, "newField": CANARY}
        lab.fetch_and_store(one, **_marked(body) | changed)
    lab.dead_letter_delivery(ERROR)
    lab.dead_letter(DEAD)
    return lab


def _marked(part: Any, name: str = "") -> Any:
    """Put a canary into every text that must not be shown."""
    if isinstance(part, dict):
        return {key: _marked(value, key) for key, value in part.items()}
    if isinstance(part, list):
        return [_marked(one, name) for one in part]
    return f"{CANARY}-{name}-0123456789" if isinstance(part, str) and part and name not in SHOWN else part


def test_no_command_shows_a_guest_a_ticket_or_a_link(lab: Lab) -> None:
    found: Any = lab.redis.xrange("ota:events")
    event_id = found[0][0].decode()
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
    leaks = [
        text for text in printed if any(word in text.lower() for word in (CANARY, "jane doe", "guest@example.com"))
    ]
    assert leaks == []


def test_reveal_shows_the_whole_order(lab: Lab) -> None:
    """Else the test above would find nothing, whatever was printed."""
    table, line = lab.run_commands(
        [("orders", "show", FETCHED.order_id, "--reveal"), ("orders", "show", FETCHED.order_id, "--reveal", "--json")]
    )

    shown = json.loads(line.out)["order"]
    assert f"{CANARY}-referenceNumber-0123456789" in table.out
    assert f"{CANARY}-sellToName-0123456789" == shown["sellToName"]
    assert f"{CANARY}-sellToEmail-0123456789" == shown["sellToEmail"]
    assert f"{CANARY}-manifestUrl-0123456789" == shown["manifestUrl"]
