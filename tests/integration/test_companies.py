"""One service for several companies: each secret is valid only for the orders of its own company."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from app.dev.valkey import Valkey
from app.ids import OrderKey
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.lab import Lab
from tests.service import Web, item, serving

MUSEUM = "aaaaaaaa-0000-4000-8000-000000000000"
ZOO = "bbbbbbbb-0000-4000-8000-000000000000"
MUSEUM_SECRET = "canary-museum"
ZOO_SECRET = "canary-zoo"
ZOO_FORMER_SECRET = "canary-zoo-former"

TABLES = f"""
[companies.museum]
np_company_id = "{MUSEUM}"
np_company = "Museum"
np_tenant = "tenant"
np_environment = "Production"
np_api_key = "canary-museum-key"
client_state = "{MUSEUM_SECRET}"

[companies.zoo]
np_company_id = "{ZOO}"
np_company = "Zoo"
np_tenant = "tenant"
np_environment = "Production"
np_api_key_file = "zoo-key"
client_state_file = "zoo-state"
client_state_previous = "{ZOO_FORMER_SECRET}"
"""


@pytest.fixture(scope="module")
def web(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("companies")
    (folder / "zoo-key").write_text("canary-zoo-key\n")
    (folder / "zoo-state").write_text(f"{ZOO_SECRET}\n")
    (folder / "companies.toml").write_text(TABLES)
    with serving(folder, {"REDIS_URL": valkey.url, "COMPANIES_FILE": "companies.toml"}) as running:
        yield running


@pytest.fixture(autouse=True)
def lab(redis_client: Redis) -> Lab:
    """The data that a test leaves in a Redis that was empty before."""
    return Lab(redis_client)


def of_museum(order_id: str | None = None, **changes: Any) -> dict[str, Any]:
    return item(order_id, **{"companyId": MUSEUM, "clientState": MUSEUM_SECRET, **changes})


def of_zoo(order_id: str | None = None, **changes: Any) -> dict[str, Any]:
    return item(order_id, **{"companyId": ZOO, "clientState": ZOO_SECRET, **changes})


def test_one_post_may_contain_events_of_several_companies_and_names(web: Web, lab: Lab) -> None:
    """Each is recorded with the name of the secret that it carries; no secret is in Redis or in the log."""
    order = str(uuid4())
    receipt = web.deliver(
        of_museum(order),
        of_zoo(order),
        of_zoo(eventName="pos_sale_completed"),
        of_zoo(order, clientState=ZOO_FORMER_SECRET),
        of_zoo(clientState=ZOO_FORMER_SECRET),
        of_museum(clientState=ZOO_SECRET),
    )

    counts = {"events": 6, "queued": 3, "duplicates": 1, "ignored": 1, "coalesced": 0, "spooled": 0, "erased": 0}
    assert receipt == counts | {"request_id": receipt["request_id"], "invalid_items": {"unauthenticated": 1}}
    assert lab.due().keys() >= {OrderKey(MUSEUM, order), OrderKey(ZOO, order)}
    stored = [(event["company"], event.get("secret", "current")) for event in lab.events()]
    assert stored == [(MUSEUM, "current"), (ZOO, "current"), (ZOO, "previous")]
    expected = {f"secrets|{MUSEUM}|current": 1, f"secrets|{ZOO}|previous": 2, f"secrets|{ZOO}|current": 1}
    assert lab.counters("secrets|") == expected
    eventually(lambda: any(line.get("events") == 6 for line in web.lines()), what="the line of the request")
    assert (b"canary" in lab.everything(), "canary" in json.dumps(web.lines())) == (False, False)


def test_an_event_cannot_affect_the_order_of_another_company(web: Web, lab: Lab) -> None:
    """Equal order ids: it neither delays that order, nor shares its fetch, nor counts as its duplicate."""
    theirs = of_zoo()
    order_id = theirs["payload"]["orderId"]
    web.deliver(theirs)
    record, due, jobs = lab.record(OrderKey(ZOO, order_id)), lab.due(), lab.jobs()

    receipt = web.deliver(of_museum(order_id), of_museum(order_id, status="Cancelled"))

    assert (receipt["queued"], receipt["coalesced"], receipt["duplicates"]) == (1, 1, 0)
    assert lab.record(OrderKey(ZOO, order_id)) == record
    assert due.items() <= lab.due().items()
    assert len(lab.jobs()) == len(jobs) + 1
    assert web.deliver(theirs)["duplicates"] == 1
