"""Who a process is beyond its pid, and how a child dies with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec

_PR_SET_PDEATHSIG: Final = 1


class Identity(msgspec.Struct, frozen=True):
    """A process that is not taken for another when its pid is used again.

    `machine` is the boot and the pid namespace, so that a container never judges the processes of another.
    """

    machine: str
    pid: int
    started: str

    def is_dead(self) -> bool:
        """Return True only where this machine can tell."""
        return self.machine == _machine() and _started(self.pid) != self.started


def identity() -> Identity:
    """Return this process's own."""
    return Identity(_machine(), os.getpid(), _started(os.getpid()))


def die_with(parent: int) -> None:
    """End this process when its parent ends, also by SIGKILL; call first thing in a child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


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
