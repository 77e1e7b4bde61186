"""The first screen: how the whole receiver is, in one sentence, and each number with the list that it counts."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from time import monotonic
from typing import Final, Generic, TypeVar

from starlette.responses import Response

from app.alerts import runbook
from app.ledger.redis import Redis
from app.ops.app import Screen, Visit
from app.ops.pages import Pages
from app.settings import Settings
from app.snapshot import Snapshot, SnapshotReader

FRESH_SECONDS: Final = 1.0
"""What was read so lately is shown again: fifty viewers cost Redis as much as one."""

T = TypeVar("T")


class Overview:
    """The screen `/`."""

    def __init__(self, redis: Redis, settings: Settings, pages: Pages) -> None:
        reader = SnapshotReader(settings.companies)
        self._pages = pages
        self._snapshot: Latest[Snapshot] = Latest(lambda: reader.read(redis))

    def screens(self) -> list[Screen]:
        return [Screen("/", self.show)]

    def show(self, visit: Visit) -> Response:
        """Return the page; raises what redis-py raises."""
        snapshot = self._snapshot.read()
        alerts = [(key, one) for key, one in snapshot.alert_states().items() if one.firing_at]
        return self._pages.page(
            "overview.html", visit.user, visit.here, snapshot=snapshot, alerts=alerts, runbook=runbook
        )


class Latest(Generic[T]):
    """What `read` returned, for FRESH_SECONDS; of several readers at once one reads, and the others wait for it."""

    def __init__(self, read: Callable[[], T], clock: Callable[[], float] = monotonic) -> None:
        self._read = read
        self._clock = clock
        self._lock = Lock()
        self._found: tuple[T, float] | None = None

    def read(self) -> T:
        with self._lock:
            if self._found is None or self._clock() - self._found[1] >= FRESH_SECONDS:
                self._found = self._read(), self._clock()
            return self._found[0]
