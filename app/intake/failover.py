"""Events go to Redis; while Redis is unavailable they go to the spool, which is drained into Redis afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from msgspec.structs import replace

from app import log
from app.errors import NotRecorded
from app.intake.envelope import OrderProcessed
from app.intake.recorder import GROUP, Inbox, Recorded
from app.intake.spool import Backlog, Spool
from app.intake.spool_file import reason_of
from app.ledger.redis import log_outage

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 8.0
"""Seconds between two probes of a Redis that failed; doubled each time it fails again soon after its return."""

SOON: Final = 10.0
"""Seconds after its recovery in which a failure of Redis counts as the same outage."""

RETRY_REFUSED_EVERY: Final = 600.0
"""Seconds between two attempts for events that Redis refuses while it accepts others."""

CHECK_EVERY: Final = 2.0
"""Seconds between two checks for events that another process of this machine has left in the spool."""

RESCUE_SECONDS: Final = 5.0
"""For the events of a deleted spool file when the process ends."""

_log = log.get()


class Failover:
    """Takes events whatever state Redis is in, and raises NotRecorded only when the disk fails as well.

    After the first failure only `run` asks Redis, so no sender waits for it twice. A call that timed out may have
    recorded its events: they are spooled all the same, and are duplicates when the spool is drained. The same holds
    for events that two processes drain at once.
    """

    def __init__(self, inbox: Inbox, spool: Spool, count: Callable[[str, str, int], None]) -> None:
        self._inbox = inbox
        self._spool = spool
        self._count = count
        self._unavailable = asyncio.Event()
        self._pause = FIRST_PAUSE
        self._recovered_at = -SOON
        self._error = ""

    async def accept(self, events: Sequence[OrderProcessed]) -> Recorded:
        """Record the events of one POST, in Redis or on disk; raises NotRecorded when neither took them."""
        if not self._unavailable.is_set():
            try:
                return await self._inbox.accept(events)
            except NotRecorded as refusal:
                if refusal.reason != "record_refused":
                    self._lost(refusal)
        # The only use of this machine's clock: Redis, whose clock dates everything else, is unavailable.
        received = time.time_ns() // 1_000_000
        await self._spool.put([replace(event, received=received) for event in events])
        self._count("spool", "kept", len(events))
        return Recorded(0, 0, 0, spooled=len(events))

    async def run(self) -> None:
        """Probe Redis while it is unavailable, and drain the spool while it is there, until cancelled.

        The first probe is at once: a wrong REDIS_URL must not stay unnoticed until the first event.
        """
        try:
            await self._inbox.probe()
        except Exception as error:
            self._lost(self._inbox.refusal(error))
        retried = time.monotonic()
        while True:
            try:
                if self._unavailable.is_set():
                    await asyncio.sleep(self._pause)
                    # A spool file that was deleted is replaced while its events can still be read.
                    await self._spool.state()
                    await self._probe()
                    continue
                if time.monotonic() - retried >= RETRY_REFUSED_EVERY:
                    retried = time.monotonic()
                    await self._spool.retry_refused()
                if backlog := await self._spool.backlog(GROUP):
                    await self._drain(backlog)
                    continue
                self._error = ""
            except Exception as error:
                # This task must not end: nothing would be drained. One line an error: the next attempt follows at once.
                if self._error != type(error).__name__:
                    self._error = type(error).__name__
                    _log.error("spool.failed", error=self._error, cause=reason_of(error), trace=log.trace_of(error))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._unavailable.wait(), CHECK_EVERY)

    async def _probe(self) -> None:
        try:
            await self._inbox.probe()
        except Exception:  # whatever it is, events stay on the disk
            return
        self._unavailable.clear()
        self._recovered_at = time.monotonic()
        _log.warning("redis.recovered", role="web", waiting=(await self._spool.state()).waiting)
        await self._spool.retry_refused()

    async def rescue(self) -> None:
        """At the end of the process: record the events of a deleted spool file, if Redis takes them."""
        with suppress(Exception):
            async with asyncio.timeout(RESCUE_SECONDS):
                while (backlog := await self._spool.backlog(GROUP)) and self._spool.ends_with_the_process:
                    await self._spool.drop(backlog, await self._record(backlog))

    async def _drain(self, backlog: Backlog) -> None:
        started = time.monotonic()
        try:
            recorded = await self._record(backlog)
        except NotRecorded as refusal:
            self._lost(refusal)
            return
        # Killed between Redis and here, the events are drained again, and are duplicates.
        if drained := await self._spool.drop(backlog, recorded):
            self._count("spool", "drained", drained)
            _log.info("spool.drained", events=drained)
        # Half of the time is left to new events.
        await asyncio.sleep(time.monotonic() - started)

    async def _record(self, backlog: Backlog) -> list[int]:
        """Return the ids of the events that Redis took; raises NotRecorded when it is unavailable."""
        try:
            await self._inbox.accept([event for _, event in backlog.rows])
        except NotRecorded as refusal:
            if refusal.reason != "record_refused":
                raise
        else:
            return [row_id for row_id, _ in backlog.rows]
        # Some of them were recorded, and are duplicates now; each is sent alone to find the refused ones.
        recorded = []
        for row_id, event in backlog.rows:
            try:
                await self._inbox.accept([event])
            except NotRecorded as refusal:
                if refusal.reason != "record_refused":
                    raise
                about = {"order_id": event.order_id, "company": event.company_id, "request_id": event.request_id}
                _log.error("spool.event_refused", **about)
            else:
                recorded.append(row_id)
        return recorded

    def _lost(self, refusal: NotRecorded) -> None:
        if self._unavailable.is_set():
            return
        self._unavailable.set()
        again = time.monotonic() - self._recovered_at < SOON
        self._pause = min(self._pause * 2, LONGEST_PAUSE) if again else FIRST_PAUSE
        log_outage("web", refusal.error, refusal.cause)
