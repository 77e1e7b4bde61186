"""Processes by id, also those that are not children of the test."""

from __future__ import annotations

import os
from pathlib import Path


def is_running(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except FileNotFoundError:
        # No /proc on this system, or the process ended meanwhile.
        return not status.parent.parent.exists()
    except ProcessLookupError:
        return False


def children(pid: int) -> list[int]:
    """Return the pids of the child processes (Linux)."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]
