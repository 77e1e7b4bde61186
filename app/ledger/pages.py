"""Pages of lists for people: a number of rows, and a cursor from which the next page goes on.

A page looks at a bounded number of entries, however many the list has and however few match. A cursor names the last
entry by time and name and not by its place, so entries that come or vanish before it move nothing: no row comes twice,
and none is left out, unless its own time changes meanwhile.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Final, Generic, TypeVar, cast

import msgspec

from app.errors import UnknownCursor
from app.ledger.redis import PAGE, Redis, Scored
from app.times import from_ms

MOST_LOOKED_AT: Final = 2_000
"""Entries of one page of which nothing but name and time is read for those that do not match."""

_CURSOR: Final = re.compile(r"[\w-]{2,600}", re.ASCII)
_SCORED: Final = re.compile(r"(0|[1-9][0-9]{0,15}) (.+)")
_ID: Final = re.compile(r"[0-9]{1,15}-[0-9]{1,15}")

E = TypeVar("E")
R = TypeVar("R")

StreamEntry = tuple[bytes, dict[bytes, bytes]]
"""Id and fields."""


class Page(msgspec.Struct, Generic[R], frozen=True):
    """The rows that match. `next` is the cursor of the next page, None where nothing follows.

    `searched_to`, an aware datetime: the page has fewer rows than were asked for since it has looked at as many entries
    as it may, up to one of this time. The next page goes on with the search.
    """

    rows: list[R]
    next: str | None = None
    searched_to: datetime | None = None


def cursor_of(text: str) -> str:
    """Return the cursor for a text, for readers who know nothing of its form."""
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


def text_of(cursor: str) -> str:
    """Return the text of a cursor; raises UnknownCursor for one that `cursor_of` never returns for an ASCII text."""
    if _CURSOR.fullmatch(cursor) and len(cursor) % 4 != 1:
        text = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("latin-1")
        if text.isascii() and cursor_of(text) == cursor:
            return text
    raise UnknownCursor


def scored_page(
    redis: Redis,
    zsets: Sequence[str],
    rows_of: Callable[[Sequence[Scored]], Iterable[R | None]],
    after: str | None,
    limit: int,
    *,
    since: int | None = None,
    until: int | None = None,
    newest_first: bool = False,
    most: int = MOST_LOOKED_AT,
) -> Page[R]:
    """Return a page of zsets whose scores are ms since 1970, merged by score, then by member; raises UnknownCursor.

    `rows_of` returns a row for each entry, None where it does not match. `since` and `until` are ms and inclusive.
    """
    behind = None if after is None else _SCORED.fullmatch(text_of(after))
    if after is not None and behind is None:
        raise UnknownCursor
    start = None if behind is None else (behind[2], int(behind[1]))

    def read(last: Scored | None, count: int) -> list[Scored]:
        return _read_behind(redis, zsets, last, since, until, count, newest_first=newest_first)

    return _page(read, rows_of, start, limit, most, lambda one: (f"{one[1]} {one[0]}", one[1]))


def stream_page(
    redis: Redis,
    stream: str,
    rows_of: Callable[[Sequence[StreamEntry]], Iterable[R | None]],
    after: str | None,
    limit: int,
    *,
    low: str = "-",
    high: str = "+",
    most: int = MOST_LOOKED_AT,
) -> Page[R]:
    """Return a page of a stream, newest first; `rows_of` as above, `low` and `high` are ids; raises UnknownCursor."""
    start = None if after is None else text_of(after)
    if start is not None and not _ID.fullmatch(start):
        raise UnknownCursor
    first: StreamEntry | None = None if start is None else (start.encode(), {})

    def read(last: StreamEntry | None, count: int) -> list[StreamEntry]:
        end = high if last is None else f"({last[0].decode()}"
        return cast("list[StreamEntry]", redis.xrevrange(stream, end, low, count=count))

    def place(entry: StreamEntry) -> tuple[str, int]:
        return entry[0].decode(), int(entry[0].partition(b"-")[0])

    return _page(read, rows_of, first, limit, most, place)


def _page(
    read: Callable[[E | None, int], Sequence[E]],
    rows_of: Callable[[Sequence[E]], Iterable[R | None]],
    last: E | None,
    limit: int,
    most: int,
    place: Callable[[E], tuple[str, int]],
) -> Page[R]:
    """Return the page behind `last`; `read` returns the next entries behind one, `place` text and ms of its cursor."""
    rows: list[R] = []
    left = most
    while left:
        count = min(limit + 1 if left == most else PAGE, left)
        entries = read(last, count)
        for entry, row in zip(entries, rows_of(entries), strict=True):
            if row is not None:
                if len(rows) == limit and last is not None:
                    return Page(rows, cursor_of(place(last)[0]))
                rows.append(row)
            last = entry
        left -= len(entries)
        if len(entries) < count or last is None:
            return Page(rows)
    text, ms = place(last) if last is not None else ("", 0)
    return Page(rows, cursor_of(text), from_ms(ms) if len(rows) < limit else None)


def _read_behind(
    redis: Redis,
    zsets: Sequence[str],
    last: Scored | None,
    since: int | None,
    until: int | None,
    count: int,
    *,
    newest_first: bool,
) -> list[Scored]:
    """Return the first `count` entries of all zsets behind the entry `last`, which need not be there any more."""
    low: float | int = float("-inf") if since is None else since
    high: float | int = float("inf") if until is None else until
    if last is not None:
        low, high = (low, min(high, last[1])) if newest_first else (max(low, last[1]), high)
    start, end = (high, low) if newest_first else (low, high)

    def is_behind(entry: Scored) -> bool:
        if last is None or entry[1] != last[1]:
            return True
        return entry[0] < last[0] if newest_first else entry[0] > last[0]

    found: list[Scored] = []
    left, size = list(zsets), count + 1
    while left:
        with redis.pipeline(transaction=False) as pipe:
            for zset in left:
                pipe.zrange(zset, start, end, byscore=True, desc=newest_first, offset=0, num=size, withscores=True)
            answers = pipe.execute()
        again = []
        for zset, members in zip(left, answers, strict=True):
            entries = [(member.decode(), int(score)) for member, score in members]
            fresh = list(filter(is_behind, entries))
            if len(fresh) < count and len(entries) == size:
                again.append(zset)  # more entries of this ms stand before it
            else:
                found += fresh
        left, size = again, 2 * size
    return sorted(found, key=lambda one: (one[1], one[0]), reverse=newest_first)[:count]
