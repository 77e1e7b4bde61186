"""How long a worker has been at its job, in memory that its pool reads: also while Redis is away, or C code hangs."""

from __future__ import annotations

import mmap
import struct
from time import monotonic
from typing import Final

_SECONDS: Final = struct.Struct("d")


class Stopwatch:
    """Made before the fork; the child starts and stops it, the parent reads it."""

    def __init__(self) -> None:
        self._since = mmap.mmap(-1, _SECONDS.size)

    def start(self) -> None:
        """Begin a job now."""
        _SECONDS.pack_into(self._since, 0, monotonic())

    def stop(self) -> None:
        """End the job."""
        _SECONDS.pack_into(self._since, 0, 0.0)

    def seconds(self) -> float:
        """Return how long the present job has taken, 0 without one."""
        (since,) = _SECONDS.unpack_from(self._since)
        return monotonic() - since if since else 0.0

    def close(self) -> None:
        """Give the memory back."""
        self._since.close()
