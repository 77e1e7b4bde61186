"""Milliseconds since 1970, as the scripts keep them, and the aware times that people are shown."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MS: Final = timedelta(milliseconds=1)


def from_ms(milliseconds: int) -> datetime:
    """Return the aware time (UTC) of `milliseconds` since 1970."""
    return _EPOCH + milliseconds * _MS


def to_ms(moment: datetime) -> int:
    """Return the milliseconds since 1970 of an aware time; a naive one raises TypeError."""
    return (moment - _EPOCH) // _MS
