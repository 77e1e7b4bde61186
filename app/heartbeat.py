"""The heartbeat of a worker pool: that it works, and who it is. `health` reads it, so this file loads little.

In Redis it tells all machines that the pool works. The time when its loop last ran tells this machine that it lives,
also while Redis is away.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from io import FileIO
from pathlib import Path
from time import monotonic
from typing import Final, TypeVar

import msgspec

from app.ledger import policy

HEARTBEAT_WITHIN: Final = 15 * policy.SECOND
"""A pool writes a heartbeat each second. Without one for this long it hangs or cannot reach Redis."""

LOOP_WITHIN: Final = 60.0
"""Seconds. The loop of a pool runs each second, each 10 s while Redis hangs; if it did not for so long, it hangs."""

_MFD_NOEXEC_SEAL: Final = 8
"""linux/memfd.h; Python has no name for it."""

T = TypeVar("T")


class DeclaredCompany(msgspec.Struct, frozen=True):
    """A company as a pool knows it: slug, path upstream, and the ids of its breaker and of its API key.

    `since` is when a pool declared it first, in ms since 1970; 0 in a heartbeat, which does not say it.
    """

    slug: str
    path: str
    breaker: str
    since: int = 0
    key: str = ""

    @property
    def place(self) -> str:
        """Return the tenant and the environment, `/tenant/environment`."""
        return self.path.rpartition("/")[0]


class Configuration(msgspec.Struct, frozen=True):
    """The settings of a pool that all pools of a deployment should share.

    `companies` by id; `upstream` is the address and the version of the API.
    """

    companies: dict[str, DeclaredCompany] = {}
    sinks: tuple[str, ...] = ()
    upstream: str = ""


class Heartbeat(msgspec.Struct, frozen=True):
    """What a pool writes each second: its process, its workers, `at`, and `since` when it does so, in ms since 1970.

    `started` distinguishes it from a later process with the same pid. `machine` is the boot and the pid namespace: a
    container cannot judge the processes of another.
    """

    machine: str
    pid: int
    started: str
    workers: list[str]
    at: int
    since: int = 0
    configuration: Configuration = Configuration()

    @classmethod
    def of_this_process(cls, workers: Iterable[str], at: int, since: int, configuration: Configuration) -> Heartbeat:
        return cls(this_machine(), os.getpid(), _started(os.getpid()), list(workers), at, since, configuration)

    def is_of_dead_process(self) -> bool:
        """Return whether the process has ended; False if it ran on another machine."""
        return self.machine == this_machine() and _started(self.pid) != self.started


def readable(texts: Iterable[bytes | str]) -> list[Heartbeat]:
    """Return the heartbeats among values of `ota:pools`."""
    return [one for text in texts if (one := decoded(text, Heartbeat)) is not None]


def decoded(text: bytes | str, kind: type[T]) -> T | None:
    """Return the value in a JSON text, None if another version or another program wrote it."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def this_machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}-unknown-boot"


def _started(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot, "" if it does not run, or waits for its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return ""


class LoopTime:
    """When the loop of this pool last ran, in a file of memory: /proc lists it, and no disk is needed (Linux)."""

    def __init__(self, deployment: str) -> None:
        """Begin to count; `deployment` is what `since_last_loop` gets."""
        self._file = FileIO(_memory_file(_file_of(deployment)), "w") if sys.platform == "linux" else None

    def set_now(self) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._file.write(f"{monotonic():20.3f}".encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def since_last_loop(deployment: str) -> float | None:
    """Return the seconds since the loop of a pool of this deployment on this machine last ran; None if none is seen.

    Only the user of the pool and root see it.
    """
    ages, wanted, ours = [], f"/memfd:{_file_of(deployment)} (deleted)", os.readlink("/proc/self/ns/pid")
    for file in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError, ValueError):  # it has just ended
            if os.readlink(file) == wanted and os.readlink(file.parents[1] / "ns/pid") == ours:
                ages.append(monotonic() - float(file.read_text()))
    return min(ages, default=None)


def _memory_file(name: str) -> int:
    """Return an open file of memory; where vm.memfd_noexec is 2, Linux wants a flag that it refuses before 6.3."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError:
        return os.memfd_create(name)


def _file_of(deployment: str) -> str:
    return f"ota-receiver-{sha256(deployment.encode()).hexdigest()[:16]}"
