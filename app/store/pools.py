"""What the worker pools say of themselves; what it means is workers.pool's to know."""

from __future__ import annotations

from typing import Any

from redis import Redis

from app.store import keys


class Pools:
    """Reads the heartbeats; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def all(self) -> list[bytes]:
        """Return what each pool wrote last, as JSON."""
        told: list[Any] = self._redis.hvals(keys.POOLS)
        return told
