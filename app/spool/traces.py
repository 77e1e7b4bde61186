"""Events of erased orders in the spool files of this machine, also in those of web processes that live.

SQLite lets several processes write one file in turn; the owner forgets by id what it has drained, and misses nothing.
What it holds in memory at this moment, or spools later, meets the tombstone in Redis (accept.lua).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

from app.store.keys import OrderKey

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
