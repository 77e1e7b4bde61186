"""Clients of Redis with time-outs that fit who asks."""

from __future__ import annotations

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

WEB_TIMEOUT = 1.0
"""Seconds. A sender waits for the answer; redis-py 8 would else retry by itself for 15 s."""

WORKER_TIMEOUT = 10.0
"""Seconds. Nobody waits for a worker, but a hanging Redis must not hold one for ever."""


def for_web(url: str) -> AsyncRedis:
    """Return the client of the web process; one try, then the caller decides."""
    return AsyncRedis.from_url(
        url,
        socket_timeout=WEB_TIMEOUT,
        socket_connect_timeout=WEB_TIMEOUT,
        retry=AsyncRetry(NoBackoff(), 0),
        health_check_interval=0,
    )


def for_worker(url: str) -> Redis:
    """Return the client of the ledger and the budget in workers, the pool and the CLI; one try."""
    return Redis.from_url(
        url,
        socket_timeout=WORKER_TIMEOUT,
        socket_connect_timeout=WEB_TIMEOUT,
        retry=Retry(NoBackoff(), 0),
    )


def for_rq(url: str) -> Redis:
    """Return the client that RQ's worker blocks on; RQ sets its own socket_timeout, so nobody shares it."""
    return Redis.from_url(url, socket_connect_timeout=WORKER_TIMEOUT)
