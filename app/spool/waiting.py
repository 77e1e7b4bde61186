"""How many events wait on the disk of this machine, in the files of whatever process, for people who ask."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


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
