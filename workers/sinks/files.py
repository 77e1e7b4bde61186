"""The kind files: JSON lines in files of a local folder, one file a day and process."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from app.order_document import OrderDocument
from app.sink_settings import FilesSink
from workers.sinks.contract import Context, Unavailable


def _now() -> datetime:
    return datetime.now(UTC)


class Files:
    """Appends a line and syncs it to the disk.

    Each file belongs to one process and one UTC day. It gets no line after another day's, after an error, or from
    another process: a line that was not written whole is the last of its file.
    """

    package = "workers"

    def __init__(self, declared: FilesSink, now: Callable[[], datetime] = _now) -> None:
        self._folder = declared.folder
        self._now = now
        self._path = Path()
        self._file: int | None = None

    def deliver(self, document: OrderDocument, context: Context) -> None:
        """Append a line; raises Unavailable with the system's text if the disk or the folder cannot take it."""
        try:
            self._append(document.encode() + b"\n")
        except OSError as error:
            raise Unavailable(os.strerror(error.errno or 0)) from error

    def _append(self, line: bytes) -> None:
        file = self._of_today()
        length = os.fstat(file).st_size
        try:
            while line:
                line = line[os.write(file, line) :]
            os.fsync(file)
            if length == 0:
                self._sync_folder()
            # Its readers would not find a line in a file that was removed or replaced.
            if not os.path.samestat(os.fstat(file), os.stat(self._path, follow_symlinks=False)):
                raise FileNotFoundError(2, "")
        except BaseException:
            # Also after RQ's time limit. After a failed fsync the system may take what is not on the disk for written,
            # so the file is not used again.
            with suppress(OSError):
                os.ftruncate(file, length)
            if length == 0:
                with suppress(OSError):
                    self._path.unlink()
            self._close()
            raise

    def _of_today(self) -> int:
        """Return the descriptor of this process's file of today."""
        now = self._now()
        if self._file is not None and not self._path.name.startswith(f"{now:%Y-%m-%d}"):
            self._close()
        if self._file is None:
            self._path = self._folder / f"{now:%Y-%m-%d-%H%M%S}-{secrets.token_hex(8)}.jsonl"
            # O_EXCL: a new file, and no symbolic link.
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        return self._file

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # NFS: every line that counts was synced
                os.close(file)
