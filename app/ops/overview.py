"""The first screen: how the whole receiver is, in one sentence, and each number with the list that it counts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from threading import Lock
from time import monotonic
from typing import Final, NamedTuple

from starlette.responses import Response

from app.explain import overview
from app.explain.overview import Overview
from app.explain.stores import Stores
from app.ledger.dead_letters import DeadCount
from app.ops.app import Screen, Visit
from app.ops.pages import Pages

FRESH_SECONDS: Final = 1.0
"""What was read so lately is shown again: fifty viewers cost Redis as much as one."""


class Figures(NamedTuple):
    """What the screen shows; `target_s` as of FETCH_TARGET."""

    now: Overview
    dead: list[tuple[str, list[DeadCount]]]
    target_s: int


class FirstScreen:
    """The screen `/`. Of several readers at once one reads Redis, and the others wait for it."""

    def __init__(self, pages: Pages, clock: Callable[[], float] = monotonic) -> None:
        self._pages = pages
        self._clock = clock
        self._lock = Lock()
        self._read: tuple[Figures, float] | None = None

    def screens(self) -> list[Screen]:
        return [Screen("/", self.show)]

    def show(self, visit: Visit) -> Response:
        """Return the page; raises what redis-py raises."""
        with self._lock:
            if self._read is None or self._clock() - self._read[1] >= FRESH_SECONDS:
                self._read = _figures(visit.stores), self._clock()
            figures = self._read[0]
        return self._pages.page("overview.html", visit.user, visit.here, **figures._asdict())


def _figures(stores: Stores) -> Figures:
    now = overview.read(stores)
    by_reason = groupby(sorted(now.dead, key=lambda one: (one.reason, one.sink)), key=lambda one: one.reason)
    dead = [(reason, [*counts]) for reason, counts in by_reason]
    dead.sort(key=lambda one: -sum(count.count for count in one[1]))
    return Figures(now, dead, stores.settings.fetch_target)
