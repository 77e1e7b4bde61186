"""The API as a process: keys, orders, histories, and what is answered when something is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from app.api.keys import ApiKeys, Scope
from app.dev.valkey import Valkey
from tests.lab import ONE, Lab
from tests.service import API, Web, serving, settings_of_one_company


@pytest.fixture(scope="module")
def api(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = settings_of_one_company(valkey.url) | {"API_REQUESTS_PER_MIN": "50"}
    with serving(tmp_path_factory.mktemp("api"), settings, API) as one:
        yield one


def bearer(lab: Lab, *scopes: Scope, name: str = "desk") -> dict[str, str]:
    """Return the headers of a caller with a new key."""
    return {"authorization": f"Bearer {ApiKeys(lab.redis).create(name, scopes)[1]}"}


@pytest.fixture
def reader(lab: Lab) -> dict[str, str]:
    lab.declare()
    return bearer(lab, "orders:read")


def reason(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == answer.status_code
    assert body["requestId"] == answer.headers["x-request-id"]
    return answer.status_code, body["reason"]


def test_an_order_is_the_document_that_sinks_get(api: Web, lab: Lab, reader: dict[str, str]) -> None:
    lab.accept_and_fetch(ONE)
    answer = api.http.get(f"/orders/{ONE.order_id}", headers=reader)

    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["idempotencyKey"] == lab.start_delivery().idempotency_key(ONE)
    assert (body["company"], body["companyId"], body["orderId"], body["revision"]) == ("venue", *ONE, 1)
    assert body["order"]["items"][0]["wallets"]
    assert answer.headers["cache-control"] == "private, no-cache"
