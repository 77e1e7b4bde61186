"""SPOOL_DIR: a folder of ours alone, one file a process, each with a lock that tells whether its process lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
import stat
from pathlib import Path
from typing import Final

from app.errors import SettingsError
from app.spool.file import SpoolFile

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
