"""The async side of the spool: a thread of its own writes what came in one moment in one transaction."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import msgspec

from app import log
from app.errors import NotRecorded
from app.spool.disk_thread import FIRST, LATER, DiskThread
from app.spool.file import Kept
from app.spool.folder import Claim, SpoolFolder
from app.store.inbox import Entry

PUT_SECONDS: Final = 0.9
"""Beyond it the sender is told 503: with what Redis may take it stays below 2.5 s."""

ENTRY_BYTES: Final = 600
"""What one event may need on disk: about 330 bytes in the table, and the same again in the log before it."""

CLOSE_SECONDS: Final = 2.0
"""For the files to be closed when the process ends; a disk that hangs must not hold it."""

ROOM: Final = 100 * ENTRY_BYTES
"""Less than a batch of so many events is no room: /readyz says so before a sender hears 503."""

_log = log.get()
T = TypeVar("T")
Trouble = (OSError, sqlite3.Error)


class Backlog(msgspec.Struct, frozen=True):
    """Entries of one file, to be drained together."""

    claim: Claim
    kept: list[Kept]


class _Waiting(msgspec.Struct):
    entries: Sequence[Entry]
    answer: asyncio.Future[None]


class Spool:
    """Keeps events on disk until Redis has them; nothing here blocks the event loop."""

    def __init__(self, folder: SpoolFolder) -> None:
        self._folder = folder
        self._thread = DiskThread()
        self._own: Claim | None = None
        self._adopted: list[Claim] = []
        self._told: set[str] = set()
        self._waiting: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None

    async def put(self, entries: Sequence[Entry]) -> None:
        """Keep the events of one POST; when this returns they are on the disk.

        Raises NotRecorded `spool_failed`: the disk or SPOOL_MAX_MB is full, or the disk too slow.
        """
        one = _Waiting(entries, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        try:
            await asyncio.wait_for(one.answer, PUT_SECONDS)
        except TimeoutError:
            raise NotRecorded("spool_failed", "TimeoutError") from None
        finally:
            # Behind a disk that hangs nothing may pile up.
            if one in self._waiting:
                self._waiting.remove(one)

    async def backlog(self, count: int) -> Backlog | None:
        """Return up to `count` of the oldest entries of one file, None when nothing is left."""
        return await self._in_thread(self._backlog, count)

    async def drop(self, backlog: Backlog) -> None:
        """Forget what Redis has recorded."""
        await self._in_thread(backlog.claim.file.drop, backlog.kept)

    async def set_aside(self, claim: Claim, kept: Kept) -> None:
        """Leave an entry that Redis refuses on the disk, out of the way of the others."""
        await self._in_thread(claim.file.set_aside, kept)

    async def adopt(self) -> int:
        """Take over the files of processes that have died; return how many entries they hold."""
        return await self._in_thread(self._adopt)

    async def trouble(self) -> str:
        """Return why the spool could not take an event now, "" if it can."""
        return await self._in_thread(self._look)

    async def waiting(self) -> int:
        """Return how many entries wait in the files that this process holds, those set aside among them."""
        return sum(max(claim.file.waiting, 0) + claim.file.refused for claim in self._claims())

    async def retry_refused(self) -> None:
        """Try again what Redis refused."""
        await self._in_thread(self._retry_refused)

    async def close(self) -> None:
        """End: delete files that are empty, and leave the others, as a disk that hangs does, for the next process."""
        try:
            await asyncio.wait_for(self._in_thread(self._close), CLOSE_SECONDS)
        except (TimeoutError, *Trouble) as error:
            _log.error("spool.failed", error=type(error).__name__, trace=log.trace_of(error))

    async def _write(self) -> None:
        while group := [one for one in self._waiting if not one.answer.done()]:
            self._waiting.clear()
            entries = [entry for one in group for entry in one.entries]
            error: NotRecorded | None = None
            try:
                await self._thread.run(FIRST, self._put, entries)
            except Trouble as trouble:
                error = NotRecorded("spool_failed", type(trouble).__name__)
            for one in group:
                if one.answer.done():
                    continue
                if error is None:
                    one.answer.set_result(None)
                else:
                    one.answer.set_exception(error)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await self._thread.run(LATER, call, *arguments)

    # What follows runs in the thread.

    def _put(self, entries: Sequence[Entry]) -> None:
        if self._folder.used() + len(entries) * ENTRY_BYTES > self._folder.max_bytes:
            raise SpoolFull
        self._mine().file.put(entries)

    def _mine(self) -> Claim:
        if self._own is None:
            self._own = self._folder.create()
        elif not self._own.file.is_there:
            _log.error("spool.file_gone", events=self._own.file.waiting)
            gone, self._own = self._own, self._folder.create()
            # It can still be read, by us alone.
            self._own.file.put([kept.entry for kept in gone.file.oldest(gone.file.waiting)])
            gone.discard()
        return self._own

    def _backlog(self, count: int) -> Backlog | None:
        for claim in self._claims():
            if kept := claim.file.oldest(count):
                return Backlog(claim, kept)
            if claim is not self._own and claim.file.is_empty:
                self._adopted.remove(claim)
                claim.discard()
        return None

    def _adopt(self) -> int:
        claims, troubles = self._folder.adopt()
        self._adopted += claims
        for trouble in set(troubles) - self._told:
            _log.error("spool.refused", problem=trouble)
        self._told = set(troubles)
        return sum(claim.file.waiting for claim in claims)

    def _look(self) -> str:
        try:
            if self._folder.used() + ROOM > self._folder.max_bytes:
                return "SPOOL_MAX_MB is reached"
            self._mine().file.prove()
            free = os.statvfs(self._folder.path)
        except Trouble as trouble:
            return f"the disk fails ({type(trouble).__name__})"
        return "" if free.f_bavail * free.f_frsize > ROOM else "the disk is full"

    def _claims(self) -> list[Claim]:
        return [*self._adopted, *([self._own] if self._own else [])]

    def _retry_refused(self) -> None:
        for claim in self._claims():
            if claim.file.refused:
                claim.file.retry_refused()

    def _close(self) -> None:
        for claim in self._claims():
            # Asked once more: a count in memory must not delete what is on the disk.
            if claim.file.is_empty and not claim.file.oldest(1):
                claim.discard()
            else:
                claim.release()


class SpoolFull(OSError):
    """SPOOL_MAX_MB is reached."""
