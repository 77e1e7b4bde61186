"""ERASED_FILE: which orders were erased, for the time after a flush of Redis, which takes their tombstones along.

The file holds salted digests and no id. `orders erase` adds to it; the workers read it before they fetch an order.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

from app import log
from app.errors import SettingsError
from app.ids import OrderKey

_HEADER: Final = re.compile(rb"ota-receiver erased orders, salt ([0-9a-f]{32})\n")
_LINE: Final = re.compile(rb"[0-9a-f]{64}")

_log = log.get()


class ErasedFile:
    """The file as this process has last read it; without a path no order is in it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._stamp: object = None
        self._salt = b""
        self._digests: frozenset[bytes] = frozenset()
        self._problem = ""

    def __contains__(self, order: OrderKey) -> bool:
        """Return whether the order was erased; a file that cannot be read any more is logged, and what was read holds.

        Orders that are not in it must be fetched also while it cannot be read.
        """
        if self.path is None:
            return False
        problem = ""
        try:
            self.read()
        except SettingsError as error:
            problem = str(error)
        if problem and problem != self._problem:
            _log.error("erased_file.failed", reason=problem)
        self._problem = problem
        return bool(self._digests) and self._digest(order) in self._digests

    def read(self) -> None:
        """Read the file if it has changed. There may be none before the first erase.

        Raises SettingsError if it cannot be read, is not one of ours, or is missing after it was there.
        """
        if self.path is None:
            return
        try:
            found = self.path.stat()
            stamp = found.st_ino, found.st_size, found.st_mtime_ns
            if stamp != self._stamp:
                self._take(self.path.read_bytes())
                self._stamp = stamp
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise SettingsError(f"ERASED_FILE: the folder of {self.path} is missing: make it first") from None
            if self._stamp is not None:
                raise SettingsError(f"ERASED_FILE: {self.path} is missing: restore it from a backup") from None
        except OSError as error:
            raise SettingsError(f"ERASED_FILE: {self.path} cannot be read ({error.strerror})") from None

    def add(self, orders: Iterable[OrderKey]) -> None:
        """Add the orders that are not in the file, which is made if it is missing; they are on the disk after this.

        Raises SettingsError if they cannot be written.
        """
        if self.path is None:
            return
        try:
            self._make(self.path)
            with self.path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                content = file.read()
                self._take(content)
                # What a killed erase has left of a line. Only now: the file may be another program's.
                file.seek(content.rfind(b"\n") + 1)
                file.truncate()
                new = sorted({self._digest(order) for order in orders} - self._digests)
                file.write(b"".join(one + b"\n" for one in new))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SettingsError(f"ERASED_FILE: {self.path} cannot be written ({error.strerror})") from None

    @staticmethod
    def _make(path: Path) -> None:
        """Make the file with a salt, unless it is there: whole or not at all, whoever else makes it now."""
        if path.exists():
            return
        # No pid in the name: containers that share the folder have the same ones.
        whole = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(b"ota-receiver erased orders, salt %s\n" % secrets.token_hex(16).encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            with suppress(FileExistsError):
                os.link(whole, path)
        finally:
            whole.unlink()
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _take(self, content: bytes) -> None:
        header = _HEADER.match(content)
        # A last line without an end is of an erase that was killed before it erased anything.
        lines = content[header.end() :].split(b"\n")[:-1] if header else []
        wrong = 1 if header is None else next((at for at, one in enumerate(lines, 2) if not _LINE.fullmatch(one)), None)
        if header is None or wrong:
            raise SettingsError(f"ERASED_FILE: {self.path} line {wrong} is not one of ours; restore it from a backup")
        self._salt, self._digests = header[1], frozenset(lines)

    def _digest(self, order: OrderKey) -> bytes:
        return sha256(self._salt + order.member.encode()).hexdigest().encode()
