"""What the tests of the ledger, and those of the web process, share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from tests.integration.ledger_scenario import Scenario, open_scenario
from tests.integration.webserver import Kept


@pytest.fixture
def scenario(redis_client: Redis) -> Iterator[Scenario]:
    """An empty ledger without sinks."""
    with open_scenario(redis_client) as opened:
        yield opened


@pytest.fixture
def shop(redis_client: Redis) -> Iterator[Scenario]:
    """An empty ledger with the sink `shop`."""
    with open_scenario(redis_client, "shop") as opened:
        yield opened


@pytest.fixture
def kept(redis_client: Redis) -> Kept:
    """What a test leaves in a Redis that was empty when it began."""
    return Kept(redis_client)
