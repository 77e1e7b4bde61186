"""The identity of a process beyond its pid. It is here, and not in workers, because `health` must load little else."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec


class Identity(msgspec.Struct, frozen=True):
    """A process, distinct from a later one with the same pid.

    `machine` is the boot and the pid namespace: a container cannot judge the processes of another.
    """

    machine: str
    pid: int
    started: str

    def is_dead(self) -> bool:
        """Return whether the process has ended; False if it ran on another machine."""
        return self.machine == _machine() and _started(self.pid) != self.started


def identity() -> Identity:
    """Return this process's own."""
    return Identity(_machine(), os.getpid(), _started(os.getpid()))


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}-unknown-boot"


def _started(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot, "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
