"""The file of the spool: what may block on the disk, and what other programs of the machine do with it."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple

from msgspec.structs import fields

from app import log
from app.ids import OrderKey
from app.intake.envelope import OrderProcessed

NAME: Final = "spool.sqlite"

BUSY_SECONDS: Final = 0.5
"""A write waits so long for one of another process; it is part of PUT_SECONDS."""

ERASE_BUSY_SECONDS: Final = 5.0
"""For `orders erase`, which no sender waits for."""

EVENT_BYTES: Final = 600
"""One event on disk, at most: about 390 bytes in the table, and room for the journal of a group."""

ROOM: Final = 100 * EVENT_BYTES
"""With less room than this /readyz reports the spool as full before a sender gets 503."""

DISK_FULL: Final = "the disk is full"

RESERVE: Final = 1_000_000
"""Bytes of the disk that no event may take: to delete rows needs room for a journal, about 60 kB for a group."""

_NAMES = [field.name for field in fields(OrderProcessed)]
_COLUMNS = ", ".join(_NAMES)
_PUT = f"INSERT INTO events ({_COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))})"  # noqa: S608  # names of our own
_AFTER = f"SELECT id, {_COLUMNS} FROM events WHERE id > ? AND id NOT IN recorded ORDER BY id LIMIT ?"  # noqa: S608  # the same
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

DISK_ERRORS: Final = (OSError, sqlite3.Error)
_log = log.get()


class SpoolFull(OSError):
    """SPOOL_MAX_MB is reached, or the disk is full but for RESERVE; the text says which."""


class NotReplaced(OSError):
    """The file was deleted and there is no new one; its events can be read from the old one."""


class SpoolFile:
    """A connection to the file; its methods block, and raise OSError or sqlite3.Error when the disk fails."""

    def __init__(self, path: Path) -> None:
        """Open the file; a new one is closed to others, and so is its journal.

        Raises sqlite3.DatabaseError if it is damaged or no spool.
        """
        self._path = path
        self._known = 0
        self._is_readable = True
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
            # In memory: a full disk may prevent the rows of recorded events from being deleted.
            self._db.execute("PRAGMA temp_store=MEMORY")
            self._db.execute("CREATE TEMP TABLE recorded (id INTEGER PRIMARY KEY)")
            self.waiting()
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
        with self.locked():
            self._insert(events)

    def hold(self) -> tuple[int, int | None]:
        """Go on reading this deleted file; return how many events can be read, and how many more it had.

        Until the connection is closed SQLite does not look for a journal again: that of the new file has the same name,
        and would be taken for this one's.
        """
        known, found = self._known, 0
        try:
            # An emptied file is also the new one: a lock that stays would keep events out of it.
            self._is_readable = not self.is_there()
            if self._is_readable:
                self._db.execute("BEGIN")
                found = len(self.oldest(-1))
        except sqlite3.Error as error:
            # A broken file that was moved away: its events are in the file that was moved.
            _log.error("spool.failed", error=type(error).__name__, cause=reason_of(error), trace=log.trace_of(error))
            self._is_readable = False
            self._db.rollback()
        return found, max(known - found - self._recorded(), 0)

    def left(self) -> int:
        """Return how many events of this deleted file Redis has not recorded."""
        return self.waiting() - self._recorded() if self._is_readable else 0

    def take_over(self, deleted: SpoolFile) -> None:
        """Store the events of a deleted file, which can still be read through its connection."""
        with self.locked():
            self._insert([event for _, event in deleted.oldest(-1)])

    def discard(self) -> None:
        """Close the file, and delete it if no event is in it."""
        with suppress(*DISK_ERRORS), self.locked():
            if not self.waiting():
                self._path.unlink()
        self.close()

    def oldest(self, count: int, after: int = 0) -> list[tuple[int, OrderProcessed]]:
        """Return up to `count` events (-1: all) with ids above `after` that are not dropped, oldest first."""
        if not self._is_readable:
            return []
        found = self._db.execute(_AFTER, (after, count)).fetchall()
        return [(row[0], OrderProcessed(*row[1:])) for row in found]

    def drop(self, ids: Sequence[int]) -> int:
        """Delete what Redis has recorded; return how many of them no other process had deleted.

        If that fails they are left out by `oldest`, and deleted with the next ones. Of a deleted file nothing is
        deleted: it ends with its connection.
        """
        self._db.executemany("INSERT OR IGNORE INTO recorded VALUES (?)", [(one,) for one in ids])
        return self.delete_recorded() if self.is_there() else len(ids)

    def delete_recorded(self) -> int:
        """Delete the rows that were dropped; return how many no other process had deleted."""
        with self.locked():
            deleted = self._db.execute("DELETE FROM events WHERE id IN recorded").rowcount
        self._db.execute("DELETE FROM recorded")
        return deleted

    def waiting(self) -> int:
        """Return how many events are in the file."""
        self._known = int(self._db.execute(_COUNT).fetchone()[0])
        return self._known

    def prove(self) -> None:
        """Store an event and delete it again, so that what prevents it is found before an event is received."""
        with self.locked():
            self._insert([_PROBE])
            self._db.execute("DELETE FROM events WHERE id = last_insert_rowid()")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock for writing; what is written is written whole or, on an error, not at all."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            # Under the lock: what is acknowledged must not be in a file that another process has just discarded.
            if not self.is_there():
                raise FileNotFoundError(f"{NAME} was deleted")
            yield
            self.waiting()

    def _recorded(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM recorded").fetchone()[0])

    def _insert(self, events: Sequence[OrderProcessed]) -> None:
        self._db.executemany(_PUT, map(attrgetter(*_NAMES), events))


def waiting(folder: Path) -> int | None:
    """Return how many events are in this SPOOL_DIR.

    None if the file cannot be read or was deleted (its journal is left then), or if there is no such folder.
    """
    try:
        with closing(_existing(folder / NAME, BUSY_SECONDS)) as file:
            return int(file.execute(_COUNT).fetchone()[0])
    except DISK_ERRORS:
        with suppress(OSError):
            return None if own_files(folder) else 0
    return None


def own_files(folder: Path) -> list[Path]:
    """Return the file and what SQLite writes beside it; a folder that is the root of a volume has others."""
    return [one for one in folder.iterdir() if one.name.startswith(NAME)]


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


def refuse_log(path: Path) -> None:
    """Raise DatabaseError if a write-ahead log lies beside the file, which has none.

    SQLite would take its pages for those of the file, whatever database they are of.
    """
    if path.with_name(f"{path.name}-wal").exists():
        raise sqlite3.DatabaseError("a write-ahead log lies beside it")


def free_bytes(folder: Path) -> int:
    """Return how many bytes the disk has above RESERVE."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize - RESERVE


def reason_of(error: Exception) -> str:
    """Return in one sentence why the spool does not work, for an error of one of its methods."""
    if isinstance(error, SpoolFull | NotReplaced):
        return str(error)
    if isinstance(error, TimeoutError):
        return "the disk does not answer"
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL" or getattr(error, "errno", None) == errno.ENOSPC:
        return DISK_FULL
    # SQLITE_ERROR: no such table or column. Exactly DatabaseError: the content is wrong, and not the disk.
    if type(error) is sqlite3.DatabaseError or name == "SQLITE_ERROR":
        return f"{NAME} is broken or not ours ({error}): move it away"
    return f"the disk fails ({type(error).__name__})"


def _existing(path: Path, busy: float) -> sqlite3.Connection:
    refuse_log(path)
    # rw: a file that is not there must not be made.
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=busy, isolation_level=None)


def _inode(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _sync_folder(folder: Path) -> None:
    """The name of a new file must survive a power failure as its content does."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
