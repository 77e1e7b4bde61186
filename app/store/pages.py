"""Walks through a zset or a stream in pages: what is listed may be larger than memory, and changes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

from redis import Redis

from app.store.scripts import source

PAGE: Final = 200
"""Members or entries a call: Redis serves others in between."""

Scored = tuple[str, int]
"""A member and its score, here always ms since 1970."""


def newest_first(redis: Redis, zset: str, since: int | None = None, until: int | None = None) -> Iterator[list[Scored]]:
    """Return pages from the highest score down; `since` and `until` are ms and inclusive.

    A member that changes meanwhile moves to the front, which is behind us: nothing is shown twice or skipped.
    """
    low: int | str = "-inf" if since is None else since
    return _pages(redis, zset, "down", "+inf" if until is None else until, low)


def oldest_first(redis: Redis, zset: str, since: int | None = None, until: int | None = None) -> Iterator[list[Scored]]:
    """Return pages from the lowest score up; without `until` a member that changes meanwhile comes again."""
    high: int | str = "+inf" if until is None else until
    return _pages(redis, zset, "up", "-inf" if since is None else since, high)


def _pages(
    redis: Redis, zset: str, way: Literal["up", "down"], start: int | str, end: int | str
) -> Iterator[list[Scored]]:
    page = redis.register_script(source("page"))
    edge = start
    # What was read at the score `edge`, a page each; the latest that still stands there is where the next begins.
    behind: list[list[str]] = []
    while True:
        anchors = reversed(behind[-1]) if behind else ()
        answer: Any = page(keys=[zset], args=[way, edge, end, PAGE, *anchors])
        if answer is None:
            behind.pop()
            continue
        read = [(member.decode(), int(score)) for member, score in zip(answer[::2], answer[1::2], strict=True)]
        found = [one for one in read if _is_within(one[1], way, end)]
        if found:
            yield found
        if len(found) < PAGE:
            return
        last = found[-1][1]
        at_edge = [member for member, score in found if score == last]
        behind = [*behind, at_edge] if last == edge else [at_edge]
        edge = last


def _is_within(score: int, way: Literal["up", "down"], end: int | str) -> bool:
    if isinstance(end, str):
        return True
    return score <= end if way == "up" else score >= end
