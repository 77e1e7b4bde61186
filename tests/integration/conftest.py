"""What the tests of the ledger, of the web process and of the commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from app.dev.sandbox import process
from app.dev.sandbox.process import Sandbox
from app.dev.valkey import Valkey
from app.ledger.redis import Redis
from tests.lab import API_KEY, COMPANIES, START, Lab
from tests.lab_upstream import Upstream, fake_upstream
from tests.ops_site import OpsSite, ops_site

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def lab(redis_client: Redis, redis_url: str, tmp_path: Path) -> Lab:
    """An empty receiver of two companies with the sink SINK, for commands too; no upstream answers."""
    return Lab(redis_client, redis_url, tmp_path)


@pytest.fixture(scope="module")
def ops(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpsSite]:
    """The ops page over the Redis of `lab`, where people may act."""
    with (
        Redis.from_url(valkey.url) as client,
        ops_site(Lab(client, valkey.url, tmp_path_factory.mktemp("ops")).env) as site,
    ):
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium without a tab."""
    from tests.browser import chromium  # here: playwright takes a second to import

    with chromium() as one:
        yield one


@pytest.fixture
def bare(redis_client: Redis) -> Lab:
    """An empty receiver without sinks, under a clock of the test."""
    return Lab(redis_client, sinks=(), now=START)


@pytest.fixture
def shop(redis_client: Redis) -> Lab:
    """An empty receiver with the sink `shop`, under a clock of the test."""
    return Lab(redis_client, sinks=("shop",), now=START)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """A Channel Manager that has every company that is asked for; orders settle at once."""
    with process.start(seed=5, options=("--settle-after", "0")) as one:
        yield one


@pytest.fixture
def connected(lab: Lab, sandbox: Sandbox) -> Lab:
    """A lab whose commands reach the sandbox, which has no faults and only the two companies of the lab."""
    sandbox.admin("DELETE", "faults")
    for slug, company_id in COMPANIES.items():
        found = {"id": company_id, "name": slug.title(), "tenant": "tenant", "environment": "Sandbox"}
        sandbox.admin("POST", "companies", found | {"api_keys": [API_KEY]})
    lab.base_url = sandbox.url
    return lab


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """A Channel Manager whose every answer the test writes."""
    with fake_upstream() as one:
        yield one
