"""Waiting for another process without a fixed sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL = 0.01


def eventually(condition: Callable[[], T], within: float = 20.0, *, what: str) -> T:
    """Return the first true value of `condition()`; raises AssertionError with `what` after `within` seconds.

    An AssertionError in `condition` means not yet; the last one is shown at the end.
    """
    deadline = time.monotonic() + within
    while True:
        seen: object
        try:
            if value := condition():
                return value
            seen = value
        except AssertionError as error:
            seen = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within:g} s: {what}; seen last: {seen!r}")
        time.sleep(_POLL)
