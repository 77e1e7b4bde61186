"""Where a proven event goes: to Redis, or to the spool while Redis is away, and from there to Redis by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

from app import log
from app.errors import NotRecorded
from app.intake.envelope import OrderProcessed
from app.intake.recorder import GROUP, Entry, Inbox, Recorded
from app.intake.spool import Backlog, Kept, Spool

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 8.0
"""Seconds between two questions to a Redis that failed; doubled each time it fails again soon after it was back."""

SOON: Final = 10.0
"""Seconds after its return in which a failure of Redis counts as the same trouble."""

RETRY_REFUSED_EVERY: Final = 600.0
"""Seconds between two tries of events that Redis refuses while it takes others."""

LOOK_EVERY: Final = 2.0
"""Seconds between two looks for files of processes that have died."""

_log = log.get()


class Recorder:
    """Takes events whatever state Redis is in, and raises NotRecorded only when the disk fails as well.

    After the first failure nobody but `run` asks Redis, so a sender never waits for it twice. A call that timed out
    may have recorded its events: they are spooled all the same, and dropped as duplicates when they are drained.
    """

    def __init__(
        self, inbox: Inbox, spool: Spool, clock: Callable[[], int], tally: Callable[[str, str, int], None]
    ) -> None:
        self._inbox = inbox
        self._spool = spool
        self._clock = clock
        self._tally = tally
        self._away = asyncio.Event()
        self._pause = FIRST_PAUSE
        self._back_since = -SOON

    async def accept(self, events: Sequence[OrderProcessed], request_id: str) -> Recorded:
        """Record the events of one POST, in Redis or on disk; raises NotRecorded when neither took them."""
        received = self._clock()
        entries = [Entry.of(event, request_id, received) for event in events]
        if not self._away.is_set():
            try:
                return await self._inbox.record(entries)
            except NotRecorded as refusal:
                if refusal.reason != "record_refused":
                    self._lost(refusal)
        await self._spool.put(entries)
        self._tally("spool", "kept", len(entries))
        return Recorded(0, 0, 0, spooled=len(entries))

    async def run(self) -> None:
        """Ask Redis while it is away, and drain the spool while it is there, until cancelled."""
        looked, retried = -LOOK_EVERY, time.monotonic()
        while True:
            try:
                if self._away.is_set():
                    await asyncio.sleep(self._pause)
                    await self._ask()
                    continue
                if time.monotonic() - looked >= LOOK_EVERY:
                    looked = time.monotonic()
                    await self._adopt()
                if time.monotonic() - retried >= RETRY_REFUSED_EVERY:
                    retried = time.monotonic()
                    await self._spool.retry_refused()
                if backlog := await self._spool.backlog(GROUP):
                    await self._drain(backlog)
                    continue
            except Exception as error:
                # Whatever it is: if this task ended, nothing would ever be drained.
                _log.error("spool.failed", error=type(error).__name__, trace=log.trace_of(error))
                await asyncio.sleep(FIRST_PAUSE)
            await self._wait()

    async def _wait(self) -> None:
        """Return when Redis is lost, or when it is time to look again."""
        try:
            async with asyncio.timeout(LOOK_EVERY):
                await self._away.wait()
        except TimeoutError:
            return

    async def _ask(self) -> None:
        if await self._inbox.probe():
            self._away.clear()
            self._back_since = time.monotonic()
            await self._spool.retry_refused()
            _log.warning("intake.redis_back", waiting=await self._spool.waiting())

    async def _adopt(self) -> None:
        if events := await self._spool.adopt():
            _log.warning("spool.adopted", events=events)

    async def _drain(self, backlog: Backlog) -> None:
        started = time.monotonic()
        try:
            await self._record(backlog)
        except NotRecorded as refusal:
            self._lost(refusal)
            return
        # Half of the time is left to what comes now.
        await asyncio.sleep(time.monotonic() - started)

    async def _record(self, backlog: Backlog) -> None:
        try:
            await self._inbox.record([one.entry for one in backlog.kept])
        except NotRecorded as refusal:
            if refusal.reason != "record_refused":
                raise
            # Some of them were recorded, and are duplicates now; which were not is found out one by one.
            for one in backlog.kept:
                await self._record_alone(backlog, one)
            return
        await self._done(backlog)

    async def _record_alone(self, backlog: Backlog, kept: Kept) -> None:
        try:
            await self._inbox.record([kept.entry])
        except NotRecorded as refusal:
            if refusal.reason != "record_refused":
                raise
            await self._spool.set_aside(backlog.claim, kept)
            _log.error("spool.event_refused", order_id=kept.entry.order_id, company=kept.entry.company_id)
            return
        await self._done(Backlog(backlog.claim, [kept]))

    async def _done(self, backlog: Backlog) -> None:
        # Killed between Redis and here, the entries are drained again, and dropped as duplicates.
        await self._spool.drop(backlog)
        self._tally("spool", "drained", len(backlog.kept))
        _log.info("spool.drained", events=len(backlog.kept))

    def _lost(self, refusal: NotRecorded) -> None:
        if self._away.is_set():
            return
        self._away.set()
        again = time.monotonic() - self._back_since < SOON
        self._pause = min(self._pause * 2, LONGEST_PAUSE) if again else FIRST_PAUSE
        _log.error("intake.redis_away", error=refusal.cause)
