"""Walks through a zset or a stream in pages: what is listed may be larger than memory, and changes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from redis import Redis

PAGE: Final = 200
"""Members or entries a call: Redis serves others in between."""

Scored = tuple[str, int]
"""A member and its score, here always ms since 1970."""


def newest_first(redis: Redis, zset: str, since: int | None = None, until: int | None = None) -> Iterator[list[Scored]]:
    """Return pages from the highest score down; `since` and `until` are ms and inclusive.

    A member that changes meanwhile moves to the front, which is behind us: nothing is shown twice or skipped.
    """
    low = "-inf" if since is None else since

    def page(edge: int | str, size: int) -> Any:
        return redis.zrevrangebyscore(zset, edge, low, start=0, num=size, withscores=True)

    return _pages(page, "+inf" if until is None else until)


def oldest_first(redis: Redis, zset: str, since: int | None = None, until: int | None = None) -> Iterator[list[Scored]]:
    """Return pages from the lowest score up; without `until` a member that changes meanwhile comes again."""
    high = "+inf" if until is None else until

    def page(edge: int | str, size: int) -> Any:
        return redis.zrangebyscore(zset, edge, high, start=0, num=size, withscores=True)

    return _pages(page, "-inf" if since is None else since)


def _pages(page: Callable[[int | str, int], Any], start: int | str) -> Iterator[list[Scored]]:
    """Go on from the last score, not by an offset: an offset skips members once some before it are removed."""
    edge: int | str = start
    at_edge: set[str] = set()
    while True:
        size = PAGE + len(at_edge)
        found = [(member.decode(), int(score)) for member, score in page(edge, size)]
        fresh = [one for one in found if one[0] not in at_edge]
        if fresh:
            yield fresh
        if len(found) < size:
            return
        last = found[-1][1]
        at_edge = {member for member, score in found if score == last}
        edge = last
