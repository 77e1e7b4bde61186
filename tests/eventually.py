"""Waiting for what another process does, so that no test sleeps and hopes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL = 0.01


def eventually(condition: Callable[[], T], within: float = 5.0, *, what: str) -> T:
    """Return the first true value of `condition()`; raises AssertionError with `what` after `within` seconds.

    An AssertionError inside `condition` counts as not yet, and its text is shown at the end.
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
