"""The async side of the spool: a thread of its own writes what came in one moment in one transaction.

Events on disk: one SQLite file, written by one process and drained by it or, when it has died, by another.

WAL with `synchronous=FULL`: a transaction that has ended survives a power failure (sqlite.org/pragma.html).

SPOOL_DIR: a folder of ours alone, one file a process, each with a lock that tells whether its process lives.

A thread for a disk that may hang: what must not wait goes first, and the process can end without it.

How many events wait on the disk of this machine, in the files of whatever process, for people who ask.

Events of erased orders in the spool files of this machine, also in those of web processes that live.

SQLite lets several processes write one file in turn; the owner forgets by id what it has drained, and misses nothing.
What it holds in memory at this moment, or spools later, meets the tombstone in Redis (accept.lua).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import queue
import secrets
import sqlite3
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec.structs import astuple, fields

from app import log
from app.errors import NotRecorded, SettingsError
from app.ids import OrderKey
from app.intake.recorder import Entry

_NAMES = [field.name for field in fields(Entry)]
_COLUMNS = ", ".join(_NAMES)
_TABLE = f"CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, refused INTEGER DEFAULT 0, {_COLUMNS})"
_PUT = f"INSERT INTO events ({_COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))})"  # noqa: S608  # names of our own
_OLDEST = f"SELECT id, {_COLUMNS} FROM events WHERE NOT refused ORDER BY id LIMIT ?"  # noqa: S608  # the same


class Kept(NamedTuple):
    """An entry, and its place in the file."""

    id: int
    entry: Entry


class SpoolFile:
    """One file; its methods block, and raise OSError or sqlite3.Error when the disk does not do what it should.

    `waiting` entries are to be drained, `refused` ones were set aside.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, which exists (perhaps empty) and whose mode its companions `-wal` and `-shm` get too."""
        self.path = path
        # Made by one thread and used by one other: the spool's.
        self._db = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
        try:
            # FULL gives pages back to the disk as events are drained; it must come before the first table.
            self._db.execute("PRAGMA auto_vacuum=FULL")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(_TABLE)
            self._inode = os.stat(path).st_ino
            self.waiting, self.refused = 0, 0
            self.retry_refused()
        except (OSError, sqlite3.Error):
            self._db.close()
            raise

    @property
    def is_there(self) -> bool:
        """Tell whether the file still has its name: without it, as after a cleaner of old files, nobody finds it."""
        try:
            return os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            return False

    def put(self, entries: Sequence[Entry]) -> None:
        """Keep the entries, all or none; when this returns they are on the disk."""
        with self._transaction():
            self._db.executemany(_PUT, map(astuple, entries))
        self.waiting += len(entries)

    def oldest(self, count: int) -> list[Kept]:
        """Return up to `count` entries in the order in which they came, without those put aside."""
        found = [Kept(row[0], Entry(*row[1:])) for row in self._db.execute(_OLDEST, (count,))]
        if not found:
            # `orders erase` deletes rows too, in a process of its own.
            self.waiting = 0
        return found

    def drop(self, kept: Sequence[Kept]) -> None:
        """Forget entries that Redis has recorded."""
        with self._transaction():
            self._db.executemany("DELETE FROM events WHERE id = ?", [(one.id,) for one in kept])
        self.waiting -= len(kept)
        if self.is_empty:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def set_aside(self, kept: Kept) -> None:
        """Leave an entry out of `oldest` until `retry_refused`."""
        with self._transaction():
            self._db.execute("UPDATE events SET refused = 1 WHERE id = ?", (kept.id,))
        self.waiting -= 1
        self.refused += 1

    def retry_refused(self) -> None:
        """Let `oldest` return again what was set aside: what Redis refused once it may take now."""
        self._db.execute("UPDATE events SET refused = 0 WHERE refused")
        self.waiting = int(self._db.execute("SELECT count(*) FROM events").fetchone()[0])
        self.refused = 0

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing is left; counted in memory, since a large table takes long to count."""
        return self.waiting <= 0 and self.refused <= 0

    def prove(self) -> None:
        """Write something to the disk, so that a disk that takes nothing is known before an event comes."""
        self._db.execute("PRAGMA user_version = 1")

    def close(self) -> None:
        """Close the file; its log is then part of it."""
        self._db.close()

    def _transaction(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db


_SUFFIX: Final = ".sqlite"
_COMPANIONS: Final = ("", "-wal", "-shm")


class Refused(Exception):
    """A file in the folder is not ours alone; the text says what is wrong with it."""


class Claim:
    """A spool file and the lock that is ours while this process lives."""

    def __init__(self, file: SpoolFile, lock: int) -> None:
        self.file = file
        self._lock = lock

    def release(self) -> None:
        """Close the file and leave it for the next process."""
        self.file.close()
        os.close(self._lock)

    def discard(self) -> None:
        """Delete a file that holds nothing any more."""
        self.file.close()
        for companion in _COMPANIONS:
            _path(self.file.path, companion).unlink(missing_ok=True)
        _lock_of(self.file.path).unlink(missing_ok=True)
        os.close(self._lock)


class SpoolFolder:
    """The folder. It must be on a disk of this machine: over a network no lock tells who lives."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Make the folder if it is not there.

        Raises SettingsError if it cannot be had, or if it or a file in it is open to others.
        """
        self.path = path
        self.max_bytes = max_bytes
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            _look_at(path, stat.S_ISDIR)
            if not os.access(path, os.W_OK | os.X_OK):
                raise Refused(f"{path} cannot be written to")
            for file in path.iterdir():
                # Another process may be deleting its own at this moment.
                with contextlib.suppress(FileNotFoundError):
                    _look_at(file, stat.S_ISREG)
        except OSError as error:
            raise SettingsError(f"SPOOL_DIR: cannot be used ({error.strerror}): {path}") from None
        except Refused as refused:
            raise SettingsError(f"SPOOL_DIR: {refused}") from None

    def create(self) -> Claim:
        """Return a new file of this process; raises OSError, sqlite3.Error."""
        path = self.path / f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        # Locked before it gets the name under which others look for it: nobody takes us for dead in between.
        unnamed = _path(path, ".new")
        lock = _own(unnamed)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(_lock_of(path))
            os.close(_own(path))
            claim = Claim(SpoolFile(path), lock)
        except BaseException:
            os.close(lock)
            raise
        # The name of the new file must survive a power failure as its content does.
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return claim

    def adopt(self) -> tuple[list[Claim], list[str]]:
        """Return the files of processes that have died, and what is wrong with those that cannot be taken over.

        Raises OSError.
        """
        claims, troubles = [], []
        for lock_path in sorted(self.path.glob(f"*{_SUFFIX}.lock")):
            try:
                if claim := _adopt(lock_path):
                    claims.append(claim)
            except Refused as refused:
                troubles.append(str(refused))
            except FileNotFoundError:
                # Its process ended in good order while we looked.
                continue
            except (OSError, sqlite3.Error) as error:
                # One file that cannot be read must not keep the others from being drained.
                troubles.append(f"{lock_path.stem} cannot be read ({type(error).__name__})")
        return claims, troubles

    def used(self) -> int:
        """Return the bytes of all spool files, those of other processes too; raises OSError."""
        sizes = 0
        for entry in os.scandir(self.path):
            # Another process may delete one while we look.
            with contextlib.suppress(FileNotFoundError):
                sizes += entry.stat(follow_symlinks=False).st_size
        return sizes


def _adopt(lock_path: Path) -> Claim | None:
    path = lock_path.with_suffix("")
    _look_at(lock_path, stat.S_ISREG)
    lock = os.open(lock_path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for companion in _COMPANIONS:
            with contextlib.suppress(FileNotFoundError):
                _look_at(_path(path, companion), stat.S_ISREG)
        if path.exists():
            return Claim(SpoolFile(path), lock)
        # It died before there was a file, or while it deleted it.
        lock_path.unlink(missing_ok=True)
    except BlockingIOError:
        # Its process lives; the lock is closed below.
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _look_at(path: Path, is_kind: object) -> None:
    """Raise Refused unless the path is of this kind (no link), ours, and closed to others."""
    found = path.lstat()
    if not callable(is_kind) or not is_kind(found.st_mode):
        raise Refused(f"{path} is not what it should be")
    if found.st_uid != os.geteuid():
        raise Refused(f"{path} belongs to another user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise Refused(f"{path} is open to others: chmod go-rwx it")


def _own(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def _lock_of(path: Path) -> Path:
    return _path(path, ".lock")


def _path(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


FIRST: Final = 0
LATER: Final = 1

T = TypeVar("T")
_Task = tuple[int, int, Callable[[], None]]


class DiskThread:
    """One daemon thread: unlike an executor's it is not waited for when the process ends."""

    def __init__(self) -> None:
        self._tasks: queue.PriorityQueue[_Task] = queue.PriorityQueue()
        self._number = itertools.count()
        self._thread: threading.Thread | None = None

    async def run(self, priority: int, call: Callable[..., T], *arguments: object) -> T:
        """Return what the call returns; those of a lower `priority` go first, others in turn."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                value = call(*arguments)
            except BaseException as error:
                _tell(loop, answer, answer.set_exception, error)
            else:
                _tell(loop, answer, answer.set_result, value)

        self._tasks.put((priority, next(self._number), work))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="spool", daemon=True)
            self._thread.start()
        return await answer

    def _work(self) -> None:
        while True:
            self._tasks.get()[2]()


def _tell(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Any], tell: Callable[[Any], None], word: Any) -> None:
    def if_awaited() -> None:
        if not answer.done():
            tell(word)

    try:
        loop.call_soon_threadsafe(if_awaited)
    except RuntimeError:
        # The loop has ended: nobody waits for the disk any more.
        return


PUT_SECONDS: Final = 0.9
"""Beyond it the sender is told 503: with what Redis may take it stays below 2.5 s."""

ENTRY_BYTES: Final = 600
"""What one event may need on disk: about 330 bytes in the table, and the same again in the log before it."""

CLOSE_SECONDS: Final = 2.0
"""For the files to be closed when the process ends; a disk that hangs must not hold it."""

ROOM: Final = 100 * ENTRY_BYTES
"""Less than a batch of so many events is no room: /readyz says so before a sender hears 503."""

_log = log.get()
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


def waiting(folder: Path) -> int | None:
    """Return the rows of all files in this SPOOL_DIR; None if one cannot be read, or there is no such folder."""
    if not folder.is_dir():
        return None
    rows = 0
    for path in folder.glob("*.sqlite"):
        try:
            # rw: a file that its owner deletes at this moment must not be made anew.
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=2.0)) as file:
                if file.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone():
                    rows += int(file.execute("SELECT count(*) FROM events").fetchone()[0])
        except sqlite3.Error:
            if path.exists():
                return None
    return rows


_BUSY_SECONDS: Final = 5.0
_OF_ORDER: Final = "FROM events WHERE company_id = ? AND order_id = ?"


class Swept(NamedTuple):
    """How many rows of these orders there were, and the files that could not be looked at, with the reason."""

    rows: int
    troubles: tuple[str, ...]


class SpoolTraces:
    """The files of one SPOOL_DIR."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def forget(self, orders: Sequence[OrderKey]) -> Swept:
        """Delete the rows of these orders, and what the disk still shows of them."""
        rows, troubles = 0, []
        for path in sorted(self._folder.glob("*.sqlite")):
            try:
                # rw: a file that its owner deletes at this moment must not be made anew.
                uri = f"{path.absolute().as_uri()}?mode=rw"
                with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)) as file:
                    rows += _forget(file, orders)
            except sqlite3.Error as error:
                if path.exists():
                    troubles.append(f"{path} ({type(error).__name__})")
        return Swept(rows, tuple(troubles))


def _forget(file: sqlite3.Connection, orders: Sequence[OrderKey]) -> int:
    if file.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone() is None:
        return 0  # its owner was born, or died, this moment
    # Overwritten, not only unlinked; then the log, which holds the row as it was written, is emptied.
    file.execute("PRAGMA secure_delete=ON")
    file.execute("BEGIN IMMEDIATE")
    rows = sum(file.execute(f"DELETE {_OF_ORDER}", order).rowcount for order in orders)
    file.execute("COMMIT")
    if rows:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return rows
