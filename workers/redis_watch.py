"""What a pool says while Redis is away: one line when it goes and one when it comes back, however long it takes."""

from __future__ import annotations

import time

from redis import Redis

from app import log

_log = log.get()


class RedisWatch:
    """Remembers since when Redis has been away."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._away_since: float | None = None

    def lost(self, error: Exception) -> None:
        """Note that Redis did not answer; the next question is asked on a fresh connection."""
        # After a failover an old connection may lead to what is a replica now.
        self._redis.connection_pool.disconnect()
        if self._away_since is None:
            self._away_since = time.monotonic()
            _log.warning("pool.redis_away", error=type(error).__name__)

    def found(self) -> None:
        """Note that Redis answered."""
        if self._away_since is not None:
            _log.warning("pool.redis_back", away_s=round(time.monotonic() - self._away_since, 1))
            self._away_since = None
