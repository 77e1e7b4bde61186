"""Events on the disk of this machine while Redis is unavailable: one SQLite file in SPOOL_DIR for all web processes.

WAL with `synchronous=FULL`: a transaction that has ended survives a power failure (sqlite.org/pragma.html). Any
process drains the file; two at once are harmless, since accept.lua drops the repeated event. SPOOL_DIR must be on a
local disk: SQLite's WAL does not work over a network file system.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import stat
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar, cast

from msgspec.structs import astuple, fields

from app import log
from app.errors import NotRecorded, SettingsError
from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import GroupCommit

NAME: Final = "spool.sqlite"

PUT_SECONDS: Final = 0.9
"""Beyond it the sender gets 503: with ACCEPT_SECONDS of Redis the answer comes within 2.5 s."""

BUSY_SECONDS: Final = 0.5
"""A write waits so long for one of another process; it is part of PUT_SECONDS."""

ERASE_BUSY_SECONDS: Final = 5.0
"""For `orders erase`, which no sender waits for."""

CLOSE_SECONDS: Final = 2.0
"""For the file to be closed when the process ends; a disk that hangs must not hold it."""

EVENT_BYTES: Final = 600
"""One event on disk, at most: about 330 bytes in the table, and the same again in the log before it."""

ROOM: Final = 100 * EVENT_BYTES
"""With less room than this /readyz reports the spool as full before a sender gets 503."""

_NAMES = [field.name for field in fields(OrderProcessed)]
_COLUMNS = ", ".join(_NAMES)
_PUT = f"INSERT INTO events ({_COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))})"  # noqa: S608  # names of our own
_AFTER = f"SELECT id, {_COLUMNS} FROM events WHERE id > ? ORDER BY id LIMIT ?"  # noqa: S608  # the same
_COUNT = "SELECT events FROM waiting"

# AUTOINCREMENT: an id is never used again. A process that deletes what another has drained already must not meet a
# new event under the old id. The count is kept in a table: counting many rows takes long, and /readyz is open to all.
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY AUTOINCREMENT, {_COLUMNS});
CREATE TABLE IF NOT EXISTS waiting (id INTEGER PRIMARY KEY, events INTEGER);
INSERT OR IGNORE INTO waiting VALUES (1, 0);
CREATE TRIGGER IF NOT EXISTS put AFTER INSERT ON events BEGIN UPDATE waiting SET events = events + 1; END;
CREATE TRIGGER IF NOT EXISTS dropped AFTER DELETE ON events BEGIN UPDATE waiting SET events = events - 1; END;
"""  # noqa: S608  # the same

T = TypeVar("T")
DISK_ERRORS = (OSError, sqlite3.Error)
_log = log.get()


class SpoolFull(OSError):
    """SPOOL_MAX_MB is reached."""


class SpoolFile:
    """A connection to the file; its methods block, and raise OSError or sqlite3.Error when the disk fails."""

    def __init__(self, path: Path) -> None:
        """Open the file; a new one is closed to others, and so are its companions `-wal` and `-shm`."""
        self._path = path
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        self._inode = path.stat().st_ino
        # Opened by one thread and used by it alone, save for `close` in tests.
        self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            # FULL gives pages back to the disk as events are drained; it must come before the first table.
            self._db.execute("PRAGMA auto_vacuum=FULL")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            _sync_folder(path.parent)
        except BaseException:
            self._db.close()
            raise

    def is_there(self) -> bool:
        """Return whether the path still names this file: once a cleaner deleted it, no other process finds it."""
        try:
            return self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def put(self, events: Sequence[OrderProcessed]) -> None:
        """Store the events, all or none; when this returns they are on the disk."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(_PUT, map(astuple, events))

    def oldest(self, count: int, after: int = 0) -> list[tuple[int, OrderProcessed]]:
        """Return up to `count` events (-1: all) with ids above `after`, oldest first, each with its id."""
        found = self._db.execute(_AFTER, (after, count)).fetchall()
        return [(row[0], OrderProcessed(*row[1:])) for row in found]

    def drop(self, ids: Sequence[int]) -> int:
        """Delete what Redis has recorded; return how many of them no other process had deleted."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            dropped = self._db.executemany("DELETE FROM events WHERE id = ?", [(one,) for one in ids]).rowcount
        if not self.waiting():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return dropped

    def waiting(self) -> int:
        """Return how many events are in the file."""
        return int(self._db.execute(_COUNT).fetchone()[0])

    def prove(self) -> None:
        """Write to the disk, so that a broken disk is found before an event is received."""
        self._db.execute("PRAGMA user_version = 1")

    def close(self) -> None:
        self._db.close()


class Backlog(NamedTuple):
    """Events to be drained together: rows of one file, by their ids."""

    file: SpoolFile
    rows: list[tuple[int, OrderProcessed]]


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
        self._refused = 0
        self._group = GroupCommit(self._put_group, calls=1)

    async def put(self, events: Sequence[OrderProcessed]) -> None:
        """Store the events of one POST; when this returns they are on the disk.

        Raises NotRecorded `spool_failed`: the disk or SPOOL_MAX_MB is full, or the disk too slow.
        """
        try:
            async with asyncio.timeout(PUT_SECONDS):
                await self._group.put(events)
        except (TimeoutError, *DISK_ERRORS) as error:
            raise NotRecorded("spool_failed", type(error).__name__) from None

    async def backlog(self, count: int) -> Backlog | None:
        """Return up to `count` of the oldest events, None when there is none; raises OSError, sqlite3.Error."""
        return await self._in_turn(self._backlog, count)

    async def drop(self, backlog: Backlog, ids: Sequence[int]) -> int:
        """Delete those of the backlog that Redis has recorded; return how many this process was the first to delete.

        The others of the backlog stay, and are left out until `retry_refused`.
        """
        dropped = await self._in_turn(backlog.file.drop, ids)
        if len(ids) < len(backlog.rows) and backlog.file is self._file:
            self._refused = backlog.rows[-1][0]
        return dropped

    async def problem(self) -> str:
        """Return why the spool could not take an event now, "" if it can."""
        return await self._in_turn(self._problem)

    async def waiting(self) -> int | None:
        """Return how many events are on this machine's disk, None if the disk does not answer."""
        try:
            async with asyncio.timeout(PUT_SECONDS):
                return await self._in_turn(lambda: self._opened().waiting())
        except (TimeoutError, *DISK_ERRORS):
            return None

    def retry_refused(self) -> None:
        """Let `backlog` begin at the oldest event again."""
        self._refused = 0

    async def close(self) -> None:
        try:
            if self._file:
                await asyncio.wait_for(self._in_turn(self._file.close), CLOSE_SECONDS)
        except (TimeoutError, *DISK_ERRORS) as error:
            _log.error("spool.failed", error=type(error).__name__, trace=log.trace_of(error))

    async def _in_turn(self, call: Callable[..., T], *arguments: object) -> T:
        async with self._turn:
            return await self._thread.run(call, *arguments)

    async def _put_group(self, events: list[OrderProcessed]) -> tuple[int, ...]:
        await self._thread.run(self._put, events)
        return ()

    # The following methods run in the thread.

    def _opened(self) -> SpoolFile:
        path = self._folder / NAME
        if self._file is None:
            self._file = SpoolFile(path)
        elif not self._file.is_there():
            self._replace(self._file, SpoolFile(path))
        return self._file

    def _replace(self, deleted: SpoolFile, new: SpoolFile) -> None:
        """Move the events of a deleted file, which can still be read through its connection, to a new file."""
        try:
            events = [event for _, event in deleted.oldest(-1)]
        except sqlite3.Error as error:
            # A broken file that was moved away: its events are in the file that was moved.
            _log.error("spool.failed", error=type(error).__name__, trace=log.trace_of(error))
            events = []
        new.put(events)
        _log.error("spool.file_gone", events=len(events))
        self._file, self._refused = new, 0
        deleted.close()

    def _put(self, events: Sequence[OrderProcessed]) -> None:
        if self._used() + len(events) * EVENT_BYTES > self._max_bytes:
            raise SpoolFull
        self._opened().put(events)

    def _backlog(self, count: int) -> Backlog | None:
        file = self._opened()
        rows = file.oldest(count, self._refused)
        return Backlog(file, rows) if rows else None

    def _problem(self) -> str:
        try:
            if self._used() + ROOM > self._max_bytes:
                return "SPOOL_MAX_MB is reached"
            self._opened().prove()
            free = os.statvfs(self._folder)
        except DISK_ERRORS as error:
            # Exactly this class: the content is wrong, and not the disk.
            if type(error) is sqlite3.DatabaseError:
                return f"{NAME} is broken or not ours ({error}): move it away"
            return f"the disk fails ({type(error).__name__})"
        return "" if free.f_bavail * free.f_frsize > ROOM else "the disk is full"

    def _used(self) -> int:
        sizes = 0
        for entry in os.scandir(self._folder):
            # SQLite deletes `-wal` and `-shm` when the last process closes the file.
            with suppress(FileNotFoundError):
                sizes += entry.stat(follow_symlinks=False).st_size
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


def waiting(folder: Path) -> int | None:
    """Return how many events are in this SPOOL_DIR; None if the file cannot be read, or there is no such folder."""
    if not folder.is_dir():
        return None
    try:
        with closing(_existing(folder / NAME, BUSY_SECONDS)) as file:
            return int(file.execute(_COUNT).fetchone()[0])
    except sqlite3.Error:
        return None if (folder / NAME).exists() else 0


class Swept(NamedTuple):
    """How many rows of these orders were deleted, and the file that could not be read, with the reason."""

    rows: int
    problems: tuple[str, ...]


def erase_rows(folder: Path, orders: Sequence[OrderKey]) -> Swept:
    """Delete the rows of these orders, and their traces on the disk, while web processes go on.

    An event of these orders that is spooled later meets the tombstone in Redis (accept.lua).
    """
    path = folder / NAME
    try:
        with closing(_existing(path, ERASE_BUSY_SECONDS)) as file:
            # Overwritten, not only unlinked; then the log, which holds the row as it was written, is emptied.
            file.execute("PRAGMA secure_delete=ON")
            file.execute("BEGIN IMMEDIATE")
            of_order = "DELETE FROM events WHERE company_id = ? AND order_id = ?"
            rows = sum(file.execute(of_order, order).rowcount for order in orders)
            file.execute("COMMIT")
            if rows:
                file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return Swept(rows, ())
    except sqlite3.Error as error:
        return Swept(0, (f"{path} ({type(error).__name__})",) if path.exists() else ())


def _existing(path: Path, busy: float) -> sqlite3.Connection:
    # rw: a file that is not there must not be made.
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=busy, isolation_level=None)


def _make_private(folder: Path) -> None:
    """Make the folder; raise SettingsError unless it and its files belong to this user alone."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_private(folder, stat.S_ISDIR)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise SettingsError(f"SPOOL_DIR: {folder} cannot be written to")
        for file in folder.iterdir():
            # SQLite in another process may just have deleted its `-wal`.
            with suppress(FileNotFoundError):
                _check_private(file, stat.S_ISREG)
    except OSError as error:
        raise SettingsError(f"SPOOL_DIR: cannot be used ({error.strerror}): {folder}") from None


def _check_private(path: Path, is_kind: Callable[[int], bool]) -> None:
    found = path.lstat()
    if not is_kind(found.st_mode):
        raise SettingsError(f"SPOOL_DIR: {path} is not a {'folder' if is_kind is stat.S_ISDIR else 'file'}")
    if found.st_uid != os.geteuid():
        raise SettingsError(f"SPOOL_DIR: {path} belongs to another user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise SettingsError(f"SPOOL_DIR: {path} is open to others: chmod go-rwx it")


def _sync_folder(folder: Path) -> None:
    """The name of a new file must survive a power failure as its content does."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
