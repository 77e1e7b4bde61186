"""Events on disk: one SQLite file, written by one process and drained by it or, when it has died, by another.

WAL with `synchronous=FULL`: a transaction that has ended survives a power failure (sqlite.org/pragma.html).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import astuple, fields

from app.store.inbox import Entry

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
