"""The pull feed: the latest revision of each order, by position; consumers acknowledge up to a position.

store_fetch.lua gives an order a new position when its content changes, above all positions ever given. So an order has
one entry, and a reader that has read up to a position misses nothing at or below it. A position is the ms in which the
revision came, or one more than the one before it. Erasure and retention remove the entry with the order.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from app.errors import UnknownCursor
from app.ids import OrderKey
from app.ledger import pages
from app.ledger.orders import read_each
from app.ledger.redis import Redis, server_time

_POSITION: Final = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)


def cursor_of(position: int) -> str:
    """Return the text that names a position to consumers, who know nothing of its form."""
    return pages.cursor_of(str(position))


def position_of(cursor: str) -> int:
    """Return the position that a cursor names; raises UnknownCursor for a text that `cursor_of` never returns."""
    text = pages.text_of(cursor)
    if not _POSITION.fullmatch(text):
        raise UnknownCursor
    return int(text)


class Entry(NamedTuple):
    """The latest revision of an order, and its position."""

    order: OrderKey
    position: int


class Feed:
    """The entries by position, and what each consumer has acknowledged. Every method raises what redis-py raises."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis
        self._names = redis.names

    def after(self, position: int, limit: int) -> list[Entry]:
        """Return the first entries above a position, in order."""
        return self._entries(f"({position}", "+inf", limit)

    def before(self, position: int | None, since: int | None, limit: int) -> list[Entry]:
        """Return the last entries below a position (None: of all), latest first, but none below `since`."""
        start, end = "+inf" if position is None else f"({position}", "-inf" if since is None else since
        return self._entries(start, end, limit, desc=True)

    def positions(self, orders: list[OrderKey]) -> list[Entry]:
        """Return the entries of these orders, latest first; an order without content has none."""
        scores = read_each(self._redis, orders, lambda pipe, order: pipe.zscore(self._names.feed, order.member))
        found = [Entry(one, int(score)) for one, (score,) in zip(orders, scores, strict=True) if score is not None]
        return sorted(found, key=lambda entry: entry.position, reverse=True)

    def acknowledged(self, consumer: str) -> int:
        """Return the position up to which a consumer has acknowledged, 0 for a new one."""
        return int(self._redis.zscore(self._names.feed_cursors, consumer) or 0)

    def acknowledge(self, consumer: str, position: int) -> int:
        """Move a consumer forward to a position, never back; return where it is then.

        Raises UnknownCursor for a position that was never given: the consumer would miss what comes below it.
        """
        # Without the highest position (Redis was flushed) the clock is the limit: the next position is not below it.
        highest = max(int(self._redis.get(self._names.feed_position) or 0), server_time(self._redis) - 1)
        if position > highest:
            raise UnknownCursor
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.zadd(self._names.feed_cursors, {consumer: position}, gt=True)
            pipe.zscore(self._names.feed_cursors, consumer)
            return int(pipe.execute()[1])

    def start_at_end(self, consumer: str) -> bool:
        """Let a new consumer begin behind all entries; return False for one that has a place, which it keeps."""
        last = int(self._redis.get(self._names.feed_position) or 0)
        return bool(self._redis.zadd(self._names.feed_cursors, {consumer: last}, nx=True))

    def _entries(self, start: str | int, end: str | int, limit: int, *, desc: bool = False) -> list[Entry]:
        by_score = {"byscore": True, "desc": desc, "offset": 0, "num": limit, "withscores": True}
        found = self._redis.zrange(self._names.feed, start, end, **by_score)
        return [Entry(OrderKey.of(member.decode()), int(score)) for member, score in found]
