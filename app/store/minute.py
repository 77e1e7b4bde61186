"""What a pool does once a minute and not at every tick: a little housekeeping at a time."""

from __future__ import annotations

from typing import Final

from app.store import clockwork

EVERY: Final = clockwork.MINUTE


class EachMinute:
    """Remembers when it is time again; a clock that is set back does not make it wait."""

    def __init__(self) -> None:
        self._next = 0

    def is_over(self, now: int) -> bool:
        """Return True once a minute; `now` is ms since 1970."""
        if now < self._next <= now + EVERY:
            return False
        self._next = now + EVERY
        return True
