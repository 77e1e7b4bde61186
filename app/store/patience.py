"""What a worker does with a step of the ledger while Redis is away: it tries again, for it has an answer in hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from redis import Redis
from redis.exceptions import ClusterDownError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

PAUSE: Final = 0.5
"""Seconds between two tries: a failover takes seconds, and a worker has nothing else to do."""

_NOT_NOW: Final = ("READONLY", "MISCONF", "NOREPLICAS", "OOM", "BUSY")
"""Refusals that another moment, or another server behind the same address, does not give."""

T = TypeVar("T")


class Patience:
    """Tries a step again while Redis is away, each time on a fresh connection.

    Steps must be harmless when the server did the first one and only the answer was lost.
    """

    def __init__(self, redis: Redis, clock: Callable[[], int], *, pause: float = PAUSE) -> None:
        self._redis = redis
        self._clock = clock
        self._pause = pause

    def run(self, step: Callable[[], T], until: int) -> T:
        """Return what `step` returns; after `until` (ms since 1970) raise what it raises."""
        # From here on by a clock that nobody sets.
        deadline = time.monotonic() + (until - self._clock()) / 1000
        while True:
            try:
                return step()
            except RedisError as error:
                if not is_away(error):
                    raise
                # After a failover an old connection may lead to what is a replica now.
                self._redis.connection_pool.disconnect()
                if time.monotonic() + self._pause > deadline:
                    raise
            time.sleep(self._pause)


def is_away(error: BaseException) -> bool:
    """Tell whether Redis, and not what it was asked, is at fault."""
    if isinstance(error, ResponseError):
        known = isinstance(error, ReadOnlyError | OutOfMemoryError | ClusterDownError)
        return known or any(word in str(error) for word in _NOT_NOW)
    return isinstance(error, RedisError)
