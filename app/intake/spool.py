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
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
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

LONGEST_BREAK: Final = 0.03
"""Between two writes of one process, so that another gets its turn: SQLite looks for it every 25 ms at first."""

ERASE_BUSY_SECONDS: Final = 5.0
"""For `orders erase`, which no sender waits for."""

CLOSE_SECONDS: Final = 2.0
"""For the file to be closed when the process ends; a disk that hangs must not hold it."""

EVENT_BYTES: Final = 600
"""One event on disk, at most: about 330 bytes in the table, and room for the journal of a group."""

ROOM: Final = 100 * EVENT_BYTES
"""With less room than this /readyz reports the spool as full before a sender gets 503."""

_NAMES = [field.name for field in fields(OrderProcessed)]
_COLUMNS = ", ".join(_NAMES)
_PUT = f"INSERT INTO events ({_COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))})"  # noqa: S608  # names of our own
_AFTER = f"SELECT id, {_COLUMNS} FROM events WHERE id > ? ORDER BY id LIMIT ?"  # noqa: S608  # the same
_COUNT = "SELECT events FROM waiting"
_PROBE = OrderProcessed("probe", "probe", "", "", "", "")

# AUTOINCREMENT: an id is never used again. A process that deletes what another has drained already must not meet a
# new event under the old id. The count is kept in a table: counting many rows takes long, and /readyz is open to all.
# It is taken anew when the file is opened, whatever wrote it before.
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY AUTOINCREMENT, {_COLUMNS});
CREATE TABLE IF NOT EXISTS waiting (id INTEGER PRIMARY KEY, events INTEGER);
INSERT OR REPLACE INTO waiting SELECT 1, found FROM (SELECT count(*) AS found FROM events)
WHERE found IS NOT (SELECT events FROM waiting);
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
        """Open the file; a new one is closed to others, and so is its journal.

        Raises sqlite3.DatabaseError if it is damaged or no spool.
        """
        self._path = path
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        self._inode = _inode(path.stat())
        # Opened by one thread and used by it alone, save for `close` in tests.
        self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            # FULL gives pages back to the disk as events are drained; it must come before the first table.
            self._db.execute("PRAGMA auto_vacuum=FULL")
            self._db.execute("PRAGMA journal_mode=TRUNCATE")
            self._db.execute("PRAGMA synchronous=FULL")
            (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
            # The question fails, before anything is written, if another program made the table.
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} SELECT {_COLUMNS} FROM events LIMIT 0; COMMIT;")  # noqa: S608  # names of our own
            _sync_folder(path.parent)
        except BaseException:
            self._db.close()
            raise

    def is_there(self) -> bool:
        """Return whether the path still names this file, with content: a cleaner may delete, replace or empty it."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        return _inode(found) == self._inode and found.st_size > 0

    def put(self, events: Sequence[OrderProcessed]) -> None:
        """Store the events, all or none; when this returns they are on the disk."""
        with self._writing():
            self._insert(events)

    def take_over(self, deleted: SpoolFile) -> int:
        """Store the events of a deleted file, which can still be read through its connection; return how many."""
        # In one transaction: the journals of both files have one name, and SQLite would take that of a write to this
        # file for the deleted one's.
        with self._writing():
            try:
                events = [event for _, event in deleted.oldest(-1)]
            except sqlite3.Error as error:
                # A broken file that was moved away: its events are in the file that was moved.
                _log.error("spool.failed", error=type(error).__name__, trace=log.trace_of(error))
                events = []
            self._insert(events)
        return len(events)

    def oldest(self, count: int, after: int = 0) -> list[tuple[int, OrderProcessed]]:
        """Return up to `count` events (-1: all) with ids above `after`, oldest first, each with its id."""
        found = self._db.execute(_AFTER, (after, count)).fetchall()
        return [(row[0], OrderProcessed(*row[1:])) for row in found]

    def drop(self, ids: Sequence[int]) -> int:
        """Delete what Redis has recorded; return how many of them no other process had deleted."""
        with self._writing():
            return self._db.executemany("DELETE FROM events WHERE id = ?", [(one,) for one in ids]).rowcount

    def waiting(self) -> int:
        """Return how many events are in the file."""
        return int(self._db.execute(_COUNT).fetchone()[0])

    def prove(self) -> None:
        """Store an event and delete it again, so that what prevents it is found before an event is received."""
        with self._writing():
            self._insert([_PROBE])
            self._db.execute("DELETE FROM events WHERE id = last_insert_rowid()")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def _insert(self, events: Sequence[OrderProcessed]) -> None:
        self._db.executemany(_PUT, map(astuple, events))


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
        self._refused = 0
        self._next_put = 0.0
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

        The others of the backlog stay, and are left out until `retry_refused`; all of them if the disk fails, so that
        they are not recorded again and again. Raises OSError, sqlite3.Error.
        """
        dropped = 0
        try:
            dropped = await self._in_turn(backlog.file.drop, ids)
        finally:
            if (not dropped or len(ids) < len(backlog.rows)) and backlog.file is self._file:
                self._refused = backlog.rows[-1][0]
        return dropped

    async def state(self) -> SpoolState:
        """Return what the spool can do and holds, after an attempt to store an event; never raises."""
        try:
            async with asyncio.timeout(PUT_SECONDS):
                return await self._in_turn(self._state)
        except TimeoutError:
            return SpoolState("the disk does not answer", None)

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
        await asyncio.sleep(self._next_put - time.monotonic())
        started = time.monotonic()
        await self._thread.run(self._put, events)
        ended = time.monotonic()
        self._next_put = ended + min(ended - started, LONGEST_BREAK)
        return ()

    # The following methods run in the thread.

    def _opened(self) -> SpoolFile:
        path = self._folder / NAME
        _refuse_log(path)
        if self._file is None:
            # Its journal stays when only the file is deleted.
            is_gone = not path.exists() and any(self._folder.iterdir())
            self._file = SpoolFile(path)
            if is_gone:
                _log.error("spool.file_gone", events=0)
        elif not self._file.is_there():
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._replace(self._file, SpoolFile(path))
        return self._file

    def _replace(self, deleted: SpoolFile, new: SpoolFile) -> None:
        try:
            events = new.take_over(deleted)
        except BaseException:
            new.close()
            raise
        _log.error("spool.file_gone", events=events)
        self._file, self._refused = new, 0
        deleted.close()

    def _put(self, events: Sequence[OrderProcessed]) -> None:
        file = self._opened()
        if self._used() + len(events) * EVENT_BYTES > self._max_bytes:
            raise SpoolFull
        file.put(events)

    def _backlog(self, count: int) -> Backlog | None:
        file = self._opened()
        rows = file.oldest(count, self._refused)
        return Backlog(file, rows) if rows else None

    def _state(self) -> SpoolState:
        try:
            waiting = self._opened().waiting()
        except DISK_ERRORS as error:
            return SpoolState(_reason(error), None)
        return SpoolState(self._problem(), waiting)

    def _problem(self) -> str:
        try:
            if self._used() + ROOM > self._max_bytes:
                return "SPOOL_MAX_MB is reached"
            self._opened().prove()
            free = os.statvfs(self._folder)
        except DISK_ERRORS as error:
            return _reason(error)
        return "" if free.f_bavail * free.f_frsize > ROOM else "the disk is full"

    def _used(self) -> int:
        sizes = 0
        for entry in os.scandir(self._folder):
            # A journal may be deleted meanwhile.
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
    """Return how many events are in this SPOOL_DIR.

    None if the file cannot be read or was deleted (its journal is left then), or if there is no such folder.
    """
    try:
        with closing(_existing(folder / NAME, BUSY_SECONDS)) as file:
            return int(file.execute(_COUNT).fetchone()[0])
    except DISK_ERRORS:
        with suppress(OSError):
            return None if any(folder.iterdir()) else 0
    return None


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
            # Overwritten, not only unlinked; the journal, which holds the row as it was, is emptied at the end.
            file.execute("PRAGMA secure_delete=ON")
            file.execute("PRAGMA journal_mode=TRUNCATE")
            file.execute("BEGIN IMMEDIATE")
            of_order = "DELETE FROM events WHERE company_id = ? AND order_id = ?"
            rows = sum(file.execute(of_order, order).rowcount for order in orders)
            file.execute("COMMIT")
            return Swept(rows, ())
    except DISK_ERRORS as error:
        is_empty = not folder.is_dir() or waiting(folder) == 0
        return Swept(0, () if is_empty else (f"{path} ({type(error).__name__})",))


def _existing(path: Path, busy: float) -> sqlite3.Connection:
    _refuse_log(path)
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
            # A journal may be deleted meanwhile.
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


def _refuse_log(path: Path) -> None:
    """Raise DatabaseError if a write-ahead log lies beside the file, which has none.

    SQLite would take its pages for those of the file, whatever database they are of.
    """
    if path.with_name(f"{path.name}-wal").exists():
        raise sqlite3.DatabaseError("a write-ahead log lies beside it")


def _inode(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _reason(error: Exception) -> str:
    # SQLITE_ERROR: no such table or column. Exactly DatabaseError: the content is wrong, and not the disk.
    if type(error) is sqlite3.DatabaseError or getattr(error, "sqlite_errorname", "") == "SQLITE_ERROR":
        return f"{NAME} is broken or not ours ({error}): move it away"
    return f"the disk fails ({type(error).__name__})"


def _sync_folder(folder: Path) -> None:
    """The name of a new file must survive a power failure as its content does."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
