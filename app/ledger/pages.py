"""Pages of lists for people: a number of rows, and a cursor from which the next page goes on.

A page looks at a bounded number of entries, however many the list has and however few match. A cursor names the last
entry by time and name and not by its place, so entries that come or vanish before it move nothing: no row comes twice,
and none is left out, unless its own time changes meanwhile.
"""

from __future__ import annotations

import math
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Final, Generic, TypeVar, cast

import msgspec

from app.errors import UnknownCursor
from app.ledger.redis import Redis, Scored
from app.times import from_ms, to_ms

MOST_LOOKED_AT: Final = 2_000
"""Entries of one page of which nothing but name and time is read for those that do not match."""

MOST_READ: Final = 500
"""Entries of one page whose records must be read to see whether they match: Redis serves others in between."""

_CURSOR: Final = re.compile(r"[\w-]{2,600}", re.ASCII)
_SCORED: Final = re.compile(r"(0|[1-9][0-9]{0,15}) ([ -~]+)")
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
    since: datetime | None = None,
    until: datetime | None = None,
    newest_first: bool = False,
    most: int = MOST_LOOKED_AT,
) -> Page[R]:
    """Return a page of zsets whose scores are ms since 1970, merged by score, then by member; raises UnknownCursor.

    `rows_of` returns a row for each entry, None where it does not match. `since` and `until` are aware, inclusive.
    """
    low, high = -math.inf if since is None else to_ms(since), math.inf if until is None else to_ms(until)

    def read(last: Scored | None, count: int) -> list[Scored]:
        return _read_behind(redis, zsets, last, low, high, count, newest_first=newest_first)

    return _page(read, rows_of, _last_of(after), limit, most, _place)


def page_of(
    entries: Sequence[Scored], rows_of: Callable[[Sequence[Scored]], Iterable[R | None]], after: str | None, limit: int
) -> Page[R]:
    """Return a page of these entries, lowest score first, as `scored_page` does of zsets; raises UnknownCursor."""
    ordered = sorted(entries, key=_order_of)

    def read(last: Scored | None, count: int) -> list[Scored]:
        return [one for one in ordered if last is None or _order_of(one) > _order_of(last)][:count]

    return _page(read, rows_of, _last_of(after), limit, len(entries) + 1, _place)


def stream_page(
    redis: Redis,
    stream: str,
    rows_of: Callable[[Sequence[StreamEntry]], Iterable[R | None]],
    after: str | None,
    limit: int,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Page[R]:
    """Return a page of a stream, newest first; the rest as for `scored_page`; raises UnknownCursor."""
    start = None if after is None else text_of(after)
    if start is not None and not _ID.fullmatch(start):
        raise UnknownCursor
    low, high = ids_between(since, until)
    first: StreamEntry | None = None if start is None else (start.encode(), {})

    def read(last: StreamEntry | None, count: int) -> list[StreamEntry]:
        end = high if last is None else f"({last[0].decode()}"
        return cast("list[StreamEntry]", redis.xrevrange(stream, end, low, count=count))

    def place(entry: StreamEntry) -> tuple[str, int]:
        return entry[0].decode(), int(entry[0].partition(b"-")[0])

    return _page(read, rows_of, first, limit, MOST_LOOKED_AT, place)


def ids_between(since: datetime | None, until: datetime | None) -> tuple[str, str]:
    """Return the bounds of the ids of a stream's entries between two times, both inclusive."""
    # An id is the ms of its entry; without its second half it means the first, or as an end the last, of that ms.
    return "-" if since is None else str(max(0, to_ms(since))), "+" if until is None else str(max(0, to_ms(until)))


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
    left, count = most, limit + 1
    while left:
        count = min(count, left)
        entries = read(last, count)
        for entry, row in zip(entries, rows_of(entries), strict=True):
            if row is not None:
                if len(rows) == limit and last is not None:
                    return Page(rows, cursor_of(place(last)[0]))
                rows.append(row)
            last = entry
        if len(entries) < count or last is None:
            return Page(rows)
        # Where few match, fewer and larger reads.
        left, count = left - count, 2 * count
    text, ms = place(last) if last is not None else ("", 0)
    return Page(rows, cursor_of(text), from_ms(ms) if len(rows) < limit else None)


def _read_behind(
    redis: Redis,
    zsets: Sequence[str],
    last: Scored | None,
    low: float,
    high: float,
    count: int,
    *,
    newest_first: bool,
) -> list[Scored]:
    """Return the first `count` entries of all zsets behind the entry `last`, which need not be there any more."""
    if last is not None:
        low, high = (low, min(high, last[1])) if newest_first else (max(low, last[1]), high)
    start, end = (high, low) if newest_first else (low, high)

    def is_behind(entry: Scored) -> bool:
        if last is None:
            return True
        return _order_of(entry) < _order_of(last) if newest_first else _order_of(entry) > _order_of(last)

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
    return sorted(found, key=_order_of, reverse=newest_first)[:count]


def _order_of(entry: Scored) -> tuple[int, str]:
    return entry[1], entry[0]


def _place(entry: Scored) -> tuple[str, int]:
    return f"{entry[1]} {entry[0]}", entry[1]


def _last_of(cursor: str | None) -> Scored | None:
    """Return the entry that a cursor names; raises UnknownCursor."""
    if cursor is None:
        return None
    found = _SCORED.fullmatch(text_of(cursor))
    if found is None:
        raise UnknownCursor
    return found[2], int(found[1])
