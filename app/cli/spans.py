"""How long an order took, read off its trail: its event until it was fetched and handed on, and apart from it a wish.

A fetch covers what was asked for before it began (its `begin`): an event that comes while it runs is the next one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec

from app.store.trail import Begun, Dropped, Entry, Failed, HandedOn, Heard, Rehanded, Stored, Wanted
from app.upstream.order import UNSETTLED

_MS: Final = timedelta(milliseconds=1)


class Asked(msgspec.Struct, frozen=True):
    """What people, a replay or reconciling asked for, `by` whom, and how long that took; None = not (yet)."""

    by: str
    fetched_ms: int | None = None
    handed_ms: int | None = None


class Spans(msgspec.Struct, frozen=True):
    """From the event that was fetched last until it was fetched, and handed on; None = not.

    `asked`: what was asked for since, or to bring that event home after all (a requeue).
    """

    fetched_ms: int | None = None
    handed_ms: int | None = None
    asked: Asked | None = None


def spans(trail: Sequence[Entry]) -> Spans:
    """Return how long it took, as far as the trail, oldest first, reaches."""
    reading = _Reading()
    for entry in trail:
        reading.read(entry)
    return reading.spans


class _Reading:
    """The trail read so far."""

    def __init__(self) -> None:
        self.spans = Spans()
        self._asks: list[Heard | Wanted] = []
        self._dones = 0
        # Fence -> how many had asked, from the first on, when that fetch began. One whose begin the trail has lost
        # covers nothing that it still shows.
        self._begun: dict[int, int] = {}
        self._event = self._wish = datetime.max
        self._revision = 0
        self._rehanded: set[str] = set()

    def read(self, entry: Entry) -> None:
        match entry:
            case Heard() | Wanted():
                self._asks.append(entry)
            case Begun():
                self._begun[entry.fence] = len(self._asks)
            case Stored():
                self._stored(entry)
            case Failed(verdict="gone"):
                self._dones = max(self._dones, self._begun.get(entry.fence, 0))
            case Dropped(sink=""):
                self._dones = len(self._asks)
            case Rehanded():
                if not self._rehanded:
                    self._wish = entry.at
                    self.spans = msgspec.structs.replace(self.spans, asked=Asked(f"replay:{entry.plan}"))
                self._rehanded.add(entry.sink)
            case HandedOn(outcome="done"):
                self._handed(entry)

    def _stored(self, entry: Stored) -> None:
        end = self._begun.get(entry.fence, 0)
        covered = self._asks[self._dones : end]
        event = next((one for one in covered if isinstance(one, Heard)), None)
        wish = next((one for one in covered if isinstance(one, Wanted)), None)
        if event is not None:
            self._event, self._revision = event.at, entry.revision
            self.spans = Spans(_between(event.at, entry.at))
        if wish is not None:
            self._wish = wish.at
            asked = Asked(wish.why, _between(wish.at, entry.at))
            self.spans = msgspec.structs.replace(self.spans, asked=asked)
        self._rehanded.clear()
        # Not settled, it is owed still, and its next fetch counts from the same event.
        if entry.status not in UNSETTLED:
            self._dones = max(self._dones, end)

    def _handed(self, entry: HandedOn) -> None:
        asked = self.spans.asked
        if entry.sink in self._rehanded or (asked is not None and entry.revision > self._revision):
            asked = asked and msgspec.structs.replace(asked, handed_ms=_between(self._wish, entry.at))
            self.spans = msgspec.structs.replace(self.spans, asked=asked)
        elif self.spans.fetched_ms is not None and entry.revision == self._revision:
            self.spans = msgspec.structs.replace(self.spans, handed_ms=_between(self._event, entry.at))


def _between(start: datetime, end: datetime) -> int:
    return round((end - start) / _MS)
