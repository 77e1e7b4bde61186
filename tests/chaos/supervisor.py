"""Restarts the parts that ended, as systemd or Kubernetes does, and kills, freezes or fails them as planned."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from math import inf
from typing import Final

from app.dev.processes import Process
from tests.chaos.plan import Kill, outage
from tests.service import Service, children

_PAUSE: Final = 0.5
"""Seconds before a part that ended by itself is started again."""

_DIES_WITHIN: Final = 5.0


class Supervisor:
    """Keeps web, the pool and Valkey of one service running. Main thread only (see Process)."""

    def __init__(self, service: Service) -> None:
        """Start web and the pool; Valkey runs before."""
        self._service = service
        self._parts: dict[str, Process] = {name: service.start(name) for name in ("web", "worker")}
        self._parts["valkey"] = service.valkey
        #: When a part is started again, by its name; when Valkey continues.
        self._restart_at: dict[str, float] = {}
        self._resume_at = inf
        #: Kills done, by kind, and exits without a kill.
        self.done: Counter[str] = Counter()
        self.unexpected_exits: Counter[str] = Counter()

    def restart_ended(self) -> None:
        """Start each part whose time has come; call often."""
        now = time.monotonic()
        if now >= self._resume_at:
            self._service.valkey.resume()
            self._resume_at = inf
        for name, part in self._parts.items():
            if part.exit_code is None:
                continue
            if name not in self._restart_at:
                self.unexpected_exits[f"{name} exit {part.exit_code}"] += 1
                self._restart_at[name] = now + _PAUSE
            elif now >= self._restart_at[name]:
                del self._restart_at[name]
                if name == "valkey":
                    self._service.valkey.restart()
                else:
                    self._parts[name] = self._service.launch(name)

    def strike(self, kill: Kill) -> bool:
        """Kill, freeze or fail the target and return True; return False if it does not run."""
        name = {"pool": "worker", "freeze": "valkey"}.get(kill.kind, kill.kind)
        if kill.kind == "outage":
            self._service.admin("POST", "faults", outage(kill.down))
        elif (target := self._target(kill, self._parts[name])) is None:
            return False
        elif kill.kind == "freeze":
            self._service.valkey.pause()
            self._resume_at = time.monotonic() + kill.down
        else:
            os.kill(target, signal.SIGKILL)
            if kill.kind != "worker":
                self._parts[name].wait(_DIES_WITHIN)
                self._restart_at[name] = time.monotonic() + kill.down
        self.done[kill.kind] += 1
        return True

    @property
    def all_up(self) -> bool:
        """Return whether every part runs."""
        return self._resume_at == inf and all(part.exit_code is None for part in self._parts.values())

    def _target(self, kill: Kill, part: Process) -> int | None:
        """Return the pid that is struck; None while the part does not do its work."""
        if part.exit_code is not None:
            return None
        match kill.kind:
            case "web":
                return part.pid if self._service.web_listens() else None
            case "worker" | "pool":
                workers = children(part.pid)
                if not workers:
                    return None
                return part.pid if kill.kind == "pool" else workers[int(kill.victim * len(workers))]
        return part.pid if self._resume_at == inf else None
