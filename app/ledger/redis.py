"""The Lua scripts of this folder, each with the shared parts that its first line names.

Redis failing under a command, as one error of ours: only this package knows redis-py's exceptions.

The version of what stands in Redis: data that a newer version of ours wrote is refused, never misread.

Every script that writes orders compares it first, so an old process cannot write between the check and the write:
during a rolling upgrade the first writer of the new version raises it, and the old ones stop.

What a worker does with a step of the ledger while Redis is away: it tries again, for it has an answer in hand.

Walks through a zset or a stream in pages: what is listed may be larger than memory, and changes meanwhile.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

from redis import Redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from app.errors import ReceiverError, SettingsError
from app.ledger import keys


@cache
def source(name: str) -> str:
    """Return the text of the script `name`: the parts after `--! uses` first, then its own lines."""
    text = _text(name)
    first = text.partition("\n")[0]
    uses = first.removeprefix("--! uses ").split(", ") if first.startswith("--! uses ") else []
    return "\n".join([*map(_text, uses), text])


def _text(name: str) -> str:
    return files("app.ledger").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")


_CODE: Final = re.compile("[A-Z]{2,20}")
_IN_PIPELINE: Final = "of pipeline caused error: "
"""What redis-py puts before the server's words, after the command with all its arguments."""


class StoreUnavailable(ReceiverError):
    """Redis did not do what it was asked; the text is one line for people, without password or foreign words."""


@contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Turn redis-py's errors into StoreUnavailable; `url` gives the address that the text names.

    An OSError is none of them, as redis-py has its own for those of its sockets: it may come from stdout.
    """
    where = address(url)
    try:
        yield
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        what = f"refuses us ({type(error).__name__}): correct user and password in REDIS_URL"
        raise StoreUnavailable(f"Redis at {where} {what}") from None
    except ResponseError as error:
        what = f"refuses this ({_code(error)}): see `ota-receiver check`"
        raise StoreUnavailable(f"Redis at {where} {what}") from None
    except RedisError as error:
        what = f"does not answer ({type(error).__name__}): start it, or correct REDIS_URL"
        raise StoreUnavailable(f"Redis at {where} {what}") from None


def _code(error: ResponseError) -> str:
    """Return the server's word for it, such as OOM or NOREPLICAS; what follows it may hold anything."""
    word = error.status_code or str(error).rpartition(_IN_PIPELINE)[2].partition(" ")[0]
    return word if _CODE.fullmatch(word) else type(error).__name__


@contextmanager
def readable_url() -> Iterator[None]:
    """Turn the ValueError that redis-py raises for an address it cannot read into SettingsError."""
    try:
        yield
    except ValueError:
        raise SettingsError("REDIS_URL: is not an address of the form redis://, rediss:// or unix://") from None


def address(url: str) -> str:
    """Return host and port, or the path of a socket: what of REDIS_URL may be shown."""
    try:
        parts = urlsplit(url)
        return f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path or "an unknown address"
    except ValueError:
        return "an unknown address"


VERSION: Final = 1
"""Raised whenever an older version would misread what this one writes. Data without a version is version 1: the key
came later. A version that cannot read older data must bring it up to date in the step that raises the key."""

_REFUSED: Final = "NEWERDATA "


class NewerData(StoreUnavailable):
    """Redis holds data of a newer version of this service; nothing was read or written."""

    def __init__(self, held: str) -> None:
        super().__init__(
            f"Redis holds data of version {held[:20]}, this is a receiver for version {VERSION}:"
            " upgrade it, or correct REDIS_URL"
        )
        self.held = held[:20]


def guarded(script: str) -> str:
    """Return the script with the comparison before it: it answers an error, and does nothing, on newer data."""
    return f"local schema_version = {VERSION}\n{source('schema')}\n{script}"


def newer_data(error: Exception) -> NewerData | None:
    """Return what a guarded script meant by its error, None if it is another."""
    text = str(error)
    return NewerData(text.removeprefix(_REFUSED)) if text.startswith(_REFUSED) else None


def refuse_newer(redis: Redis) -> None:
    """Raise NewerData if Redis holds data of a newer version; for those who only read, and before a start."""
    held: Any = redis.get(keys.SCHEMA)
    if is_newer(held):
        raise NewerData(held.decode(errors="replace"))


def is_newer(held: bytes | None) -> bool:
    """Tell whether the value of the key names a version that is not ours to read; one that is no number does."""
    if held is None:
        return False
    return not held.isdigit() or int(held) > VERSION


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
