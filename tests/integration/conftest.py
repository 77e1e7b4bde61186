"""What tests of the web process share."""

from __future__ import annotations

import pytest
from redis import Redis

from tests.integration.webserver import Kept


@pytest.fixture
def kept(redis_client: Redis) -> Kept:
    """What a test leaves in a Redis that was empty when it began."""
    return Kept(redis_client)
