"""Who asked for what, when and why: a stream beside the events, kept as long as they are."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

import msgspec
from redis import Redis
from redis.client import Pipeline

from app.ledger import keys, policy
from app.ledger.redis import stream_pages
from app.times import from_ms

LONGEST_TEXT: Final = 200
"""Characters of `who` and `why`; the selection is cut to as many."""


class Deed(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody did: `what`, on which plan ("" for none), and how many orders it was about.

    `what`: replay, resume, cancel, erase, requeue, drop, refetch, reconcile, order-confirm, order-cancel. `selected`:
    an order's company and id, or a selection in words. `who` and `why` are as given: a person's own words. They are
    shown to people, and to no log.
    """

    what: str
    plan: str
    who: str
    why: str
    selected: str
    orders: int


class Noted(msgspec.Struct, frozen=True, kw_only=True):
    """A deed, and when it was done by Redis's clock."""

    at: datetime
    deed: Deed


class Audit:
    """The stream of deeds."""

    def __init__(self, redis: Redis, *, event_days: int) -> None:
        self._redis = redis
        self._keep = event_days * policy.DAY

    def oldest_kept(self, now: int) -> int:
        """Return the ms before which deeds are dropped; old by both clocks, so that one ahead empties nothing."""
        seconds: Any = self._redis.time()
        return max(0, min(now, int(seconds[0]) * policy.SECOND) - self._keep)

    def note(self, deed: Deed, oldest: int, pipe: Pipeline) -> None:
        """Add the deed in the transaction of what it tells of; drop what is older than `oldest` ms."""
        fields: Any = msgspec.to_builtins(deed)
        pipe.xadd(keys.AUDIT, fields, minid=oldest, approximate=True)

    def add(self, deed: Deed, now: int) -> None:
        """Add a deed that is about to be done: what dies half way is told of too. `now`: ms."""
        oldest = self.oldest_kept(now)
        with self._redis.pipeline(transaction=True) as pipe:
            self.note(deed, oldest, pipe)
            pipe.execute()

    def newest_first(self) -> Iterator[Noted]:
        """Return what is kept."""
        for page in stream_pages(self._redis, keys.AUDIT, newest_first=True):
            for noted_id, fields in page:
                texts = {name.decode(): value.decode() for name, value in fields.items()}
                at = from_ms(int(noted_id.partition(b"-")[0]))
                yield Noted(at=at, deed=msgspec.convert(texts, Deed, strict=False))
