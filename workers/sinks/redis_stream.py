"""The kind redis-stream: an entry of a stream for each revision, on a Redis server of its own."""

from __future__ import annotations

from typing import Any, Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.ledger.redis import code, is_unavailable
from app.order_document import OrderDocument
from app.sink_settings import RedisStreamSink
from workers.sinks.contract import Context, Failed, Unavailable

CONNECT_TIMEOUT: Final = 5.0
TIMEOUT: Final = 10.0
"""Seconds of one call; connecting comes on top."""


class RedisStream:
    """Adds entries with the idempotency key as `id`; a repeat is a second entry, and its reader drops it."""

    package = "workers"

    def __init__(self, declared: RedisStreamSink) -> None:
        self._redis = Redis.from_url(
            declared.url.get_secret_value(),
            socket_timeout=TIMEOUT,
            socket_connect_timeout=CONNECT_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
        self._stream = declared.stream
        self._max_length = declared.max_length

    def deliver(self, document: OrderDocument, context: Context) -> None:
        """Add an entry; raises Unavailable if the server takes none now, and Failed if it refuses the command."""
        entry: dict[Any, Any] = {
            "id": document.idempotency_key,
            "company": document.company,
            "company_id": document.company_id,
            "order_id": document.order_id,
            "revision": document.revision,
            "digest": document.digest,
            "fetched_at": document.fetched_at,
            "status": document.status,
            "document": document.encode(),
        }
        try:
            self._redis.xadd(self._stream, entry, maxlen=self._max_length, approximate=True)
        except BaseException as error:
            # After a failover an old connection may lead to what is a replica now. After RQ's time limit it may still
            # bring the answer to this entry, which must not be taken for that to the next one.
            self._redis.connection_pool.disconnect()
            if not isinstance(error, RedisError):
                raise
            kind = Unavailable if is_unavailable(error) else Failed
            raise kind(f"Redis {code(error)}") from error
