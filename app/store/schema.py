"""The version of what stands in Redis: data that a newer version of ours wrote is refused, never misread.

Every script that writes orders compares it first, so an old process cannot write between the check and the write:
during a rolling upgrade the first writer of the new version raises it, and the old ones stop.
"""

from __future__ import annotations

from typing import Any, Final

from redis import Redis

from app.store import keys
from app.store.outage import StoreUnavailable
from app.store.scripts import source

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
