"""What the tests of the ledger, of the web process and of the commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from tests.integration.desk import Desk, open_desk
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


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    """Commands on an empty Redis, with the settings of two companies; no upstream answers."""
    return open_desk(redis_client, redis_url, tmp_path)
