"""Events on the disk of this machine while Redis is unavailable: one SQLite file in SPOOL_DIR for all web processes.

A rollback journal with `synchronous=FULL`: a transaction that has ended is in the file itself and survives a power
failure (sqlite.org/pragma.html). With a write-ahead log it would be in a second file, whose deletion SQLite does not
notice. Any process drains the file; two at once are harmless, since accept.lua drops the repeated event. SPOOL_DIR must
be on a local disk: locks of a network file system are not reliable.
"""

from __future__ import annotations

import asyncio
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar, cast

from app import log
from app.errors import NotRecorded, SettingsError
from app.intake.envelope import OrderProcessed
from app.intake.recorder import GroupCommit
from app.intake.spool_file import (
    DISK_ERRORS,
    DISK_FULL,
    EVENT_BYTES,
    NAME,
    ROOM,
    NotReplaced,
    SpoolFile,
    SpoolFull,
    free_bytes,
    own_files,
    reason_of,
    refuse_log,
)

PUT_SECONDS: Final = 0.9
"""Beyond it the sender gets 503: with ACCEPT_SECONDS of Redis the answer comes within 2.5 s."""

LONGEST_BREAK: Final = 0.03
"""Between two writes of one process, so that another gets its turn: SQLite looks for it every 25 ms at first."""

CLOSE_SECONDS: Final = 2.0
"""For the file to be closed when the process ends; a disk that hangs must not hold it."""

T = TypeVar("T")
_log = log.get()


class Backlog(NamedTuple):
    """Events to be drained together: rows of one file, by their ids."""

    file: SpoolFile
    rows: list[tuple[int, OrderProcessed]]


class SpoolState(NamedTuple):
    """`problem`: why the spool could not take an event now, "" if it can. `waiting` events, None if it is unknown."""

    problem: str
    waiting: int | None


class Spool:
    """The async side; a daemon thread does what may block, and the process can end without it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Make the folder if it is not there.

        Raises SettingsError if it cannot be used, or if it or a file in it is open to others.
        """
        _make_private(folder)
        self._folder = folder
        self._max_bytes = max_bytes
        self._thread = DiskThread()
        # One call at a time beside `put`: many requests for /readyz do not delay an event.
        self._turn = asyncio.Lock()
        self._file: SpoolFile | None = None
        # The file was deleted and could not be replaced yet.
        self._is_gone = False
        self._refused = 0
        self._next_put = 0.0
        self._group = GroupCommit(self._put_group, calls=1)

    async def put(self, events: Sequence[OrderProcessed]) -> None:
        """Store the events of one POST; when this returns they are on the disk.

        Raises NotRecorded `spool_failed`, whose cause says why.
        """
        try:
            async with asyncio.timeout(PUT_SECONDS):
                await self._group.put(events, None)  # a disk that hangs is asked once
        except (TimeoutError, *DISK_ERRORS) as error:
            raise NotRecorded("spool_failed", type(error).__name__, reason_of(error)) from None

    async def backlog(self, count: int) -> Backlog | None:
        """Return up to `count` of the oldest events, None when there is none; raises OSError, sqlite3.Error."""
        return await self._in_turn(self._backlog, count)

    async def drop(self, backlog: Backlog, ids: Sequence[int]) -> int:
        """Delete those of the backlog that Redis has recorded; return how many this process was the first to delete.

        The others of the backlog stay, and are left out until `retry_refused`. Raises OSError, sqlite3.Error.
        """
        try:
            return await self._in_turn(backlog.file.drop, ids)
        finally:
            if backlog.file is self._file:
                self._refused = backlog.rows[-1][0]

    async def state(self) -> SpoolState:
        """Return what the spool can do and holds, after an attempt to store an event; never raises."""
        try:
            async with asyncio.timeout(PUT_SECONDS):
                return await self._in_turn(self._state)
        except TimeoutError:
            return SpoolState(reason_of(TimeoutError()), None)

    @property
    def ends_with_the_process(self) -> bool:
        """Whether events wait in a deleted file that only this process can read."""
        return self._is_gone

    async def retry_refused(self) -> None:
        """Let `backlog` begin at the oldest event again, and delete what could not be deleted.

        Raises OSError, sqlite3.Error.
        """
        self._refused = 0
        if self._file and not self._is_gone:
            await self._in_turn(self._file.delete_recorded)

    async def close(self) -> None:
        try:
            if self._file:
                await asyncio.wait_for(self._in_turn(self._file.close), CLOSE_SECONDS)
        except (TimeoutError, *DISK_ERRORS) as error:
            _log.error("spool.failed", error=type(error).__name__, cause=reason_of(error), trace=log.trace_of(error))

    async def _in_turn(self, call: Callable[..., T], *arguments: object) -> T:
        async with self._turn:
            return await self._thread.run(call, *arguments)

    async def _put_group(self, events: list[OrderProcessed]) -> tuple[int, ...]:
        await asyncio.sleep(self._next_put - time.monotonic())
        started = time.monotonic()
        await self._thread.run(self._put, events)
        ended = time.monotonic()
        self._next_put = ended + min(ended - started, LONGEST_BREAK)
        return ()

    # The following methods run in the thread.

    def _opened(self) -> SpoolFile:
        path = self._folder / NAME
        refuse_log(path)
        if self._file is None:
            # Its journal stays when only the file is deleted.
            is_gone = not path.exists() and bool(own_files(self._folder))
            self._file = SpoolFile(path)
            if is_gone:
                _log.error("spool.file_gone", events=0, lost=None)
        elif self._is_gone or not self._file.is_there():
            self._replace(self._file, path)
        return self._file

    def _replace(self, deleted: SpoolFile, path: Path) -> None:
        """Write the events of a deleted file to a new one; raises NotReplaced."""
        new = None
        try:
            if self._is_gone:
                self._refuse_if_full(deleted.left() * EVENT_BYTES)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            new = SpoolFile(path)
            with new.locked():
                self._report_gone(deleted)
            new.take_over(deleted)
        except DISK_ERRORS as error:
            self._report_gone(deleted)
            if new:
                new.discard()
            with suppress(OSError):
                if path.exists() and not path.stat().st_size:
                    path.unlink()
                # For the next process, and `waiting`: events are missing here.
                path.with_name(f"{NAME}-journal").touch(0o600)
            raise NotReplaced(f"{NAME} was deleted, and a new one cannot be written: {reason_of(error)}") from error
        self._file, self._refused, self._is_gone = new, 0, False
        deleted.close()

    def _report_gone(self, deleted: SpoolFile) -> None:
        if not self._is_gone:
            self._is_gone = True
            events, lost = deleted.hold()
            _log.error("spool.file_gone", events=events, lost=lost)

    def _put(self, events: Sequence[OrderProcessed]) -> None:
        file = self._opened()
        self._refuse_if_full(len(events) * EVENT_BYTES)
        file.put(events)

    def _backlog(self, count: int) -> Backlog | None:
        try:
            file = self._opened()
        except NotReplaced:
            file = cast("SpoolFile", self._file)
        rows = file.oldest(count, self._refused)
        return Backlog(file, rows) if rows else None

    def _state(self) -> SpoolState:
        try:
            waiting = self._opened().waiting()
        except DISK_ERRORS as error:
            return SpoolState(reason_of(error), None)
        return SpoolState(self._problem(), waiting)

    def _problem(self) -> str:
        try:
            self._refuse_if_full(ROOM)
            self._opened().prove()
        except DISK_ERRORS as error:
            return reason_of(error)
        return ""

    def _refuse_if_full(self, more: int) -> None:
        """Raise SpoolFull if there is no room for so many bytes."""
        if self._used() + more > self._max_bytes:
            raise SpoolFull("SPOOL_MAX_MB is reached")
        if free_bytes(self._folder) < more:
            raise SpoolFull(DISK_FULL)

    def _used(self) -> int:
        sizes = 0
        for file in own_files(self._folder):
            # A journal may be deleted meanwhile.
            with suppress(FileNotFoundError):
                sizes += file.lstat().st_size
        return sizes


class DiskThread:
    """One daemon thread: the process does not wait for it when it ends, as it would for an executor's."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[object], Callable[[], object]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, call: Callable[..., T], *arguments: object) -> T:
        """Return what the call returns, or raise what it raises, after the calls before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="spool", daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((cast("Future[object]", future), partial(call, *arguments)))
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)


def _make_private(folder: Path) -> None:
    """Make the folder; raises SettingsError as `refuse_open` does."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        missing = "is in a folder that is missing: make it first"
        known = {FileExistsError: "is not a folder", FileNotFoundError: missing}
        problem = known.get(type(error), f"cannot be made ({error.strerror})")
        raise SettingsError(f"SPOOL_DIR: {folder} {problem}") from None
    refuse_open(folder, os.geteuid())


def refuse_open(folder: Path, user: int) -> None:
    """Raise SettingsError unless no other than `user` can write to the folder or read the spool's files in it.

    Other files do not matter. A folder with the setgid bit is one that its group shares on purpose, such as the root of
    a volume: Kubernetes opens it, and all files in it, to the group at each start of a pod.
    """
    try:
        is_shared = bool(folder.lstat().st_mode & stat.S_ISGID)
        _check_private(folder, stat.S_ISDIR, owners={user, 0}, closed=0o002 if is_shared else 0o077)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise SettingsError(f"SPOOL_DIR: {folder} cannot be written to")
        for file in own_files(folder):
            # A journal may be deleted meanwhile.
            with suppress(FileNotFoundError):
                _check_private(file, stat.S_ISREG, owners={user}, closed=0 if is_shared else 0o077)
                if is_shared:
                    file.chmod(0o600)
    except OSError as error:
        raise SettingsError(f"SPOOL_DIR: {folder} cannot be used ({error.strerror})") from None


def _check_private(path: Path, is_kind: Callable[[int], bool], *, owners: set[int], closed: int) -> None:
    """Raise SettingsError for another kind or owner, or if a bit of `closed` is set in the mode."""
    found = path.lstat()
    if not is_kind(found.st_mode):
        raise SettingsError(f"SPOOL_DIR: {path} is not a {'folder' if is_kind is stat.S_ISDIR else 'file'}")
    if found.st_uid not in owners:
        raise SettingsError(f"SPOOL_DIR: {path} belongs to another user")
    if stat.S_IMODE(found.st_mode) & closed:
        raise SettingsError(f"SPOOL_DIR: {path} is open to others: chmod go-rwx it")
