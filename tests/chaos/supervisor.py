"""Restarts the parts that ended, as systemd or Kubernetes does, and kills or freezes them as planned."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import Final

from tests.chaos.plan import Kill
from tests.eventually import eventually
from tests.pids import children
from tests.service import Service

_PAUSE: Final = 0.5
"""Seconds before a part that ended by itself is started again."""


class Supervisor:
    """Keeps web, the pool and Valkey of one service running. Main thread only (see Process)."""

    def __init__(self, service: Service) -> None:
        """Start web and the pool; Valkey runs before."""
        self._service = service
        self._commands = {name: service.start(name) for name in ("web", "worker")}
        #: When a part is started again, by its name; when Valkey continues.
        self._restart_at: dict[str, float] = {}
        self._resume_at: float | None = None
        #: Kills done, by kind, and exits without a kill.
        self.done: Counter[str] = Counter()
        self.unexpected_exits: Counter[str] = Counter()

    def restart_ended(self) -> None:
        """Start each part whose time has come; call often."""
        now = time.monotonic()
        if self._resume_at is not None and now >= self._resume_at:
            self._service.valkey.resume()
            self._resume_at = None
        for name in ("web", "worker", "valkey"):
            code = self._exit_code(name)
            if code is None:
                continue
            if name not in self._restart_at:
                self.unexpected_exits[f"{name} exit {code}"] += 1
                self._restart_at[name] = now + _PAUSE
            elif now >= self._restart_at[name]:
                del self._restart_at[name]
                if name == "valkey":
                    self._service.valkey.restart()
                else:
                    self._commands[name] = self._service.launch(name)

    def kill(self, kill: Kill) -> bool:
        """Send the signal and return True; return False if the target does not run."""
        target = self._target(kill)
        if target is None:
            return False
        self.done[kill.kind] += 1
        if kill.kind == "freeze":
            self._service.valkey.pause()
            self._resume_at = time.monotonic() + kill.down
            return True
        os.kill(target, signal.SIGKILL)
        if kill.kind == "worker":
            return True
        name = "worker" if kill.kind == "pool" else kill.kind
        eventually(lambda: self._exit_code(name) is not None, what=f"{name} is dead")
        self._restart_at[name] = time.monotonic() + kill.down
        return True

    @property
    def all_up(self) -> bool:
        """Return whether every part runs."""
        return self._resume_at is None and all(self._exit_code(name) is None for name in ("web", "worker", "valkey"))

    def _exit_code(self, name: str) -> int | None:
        return self._service.valkey.exit_code if name == "valkey" else self._commands[name].exit_code

    def _target(self, kill: Kill) -> int | None:
        name = {"pool": "worker", "freeze": "valkey"}.get(kill.kind, kill.kind)
        if self._exit_code(name) is not None:
            return None
        match name:
            case "web":
                return self._commands["web"].pid if self._service.web_listens() else None
            case "valkey":
                return self._service.valkey.pid if self._resume_at is None else None
        pool = self._commands["worker"].pid
        # The worker that runs longest, so that each has its turn.
        oldest = next(iter(children(pool)), None)
        return pool if kill.kind == "pool" and oldest is not None else oldest
