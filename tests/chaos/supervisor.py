"""Restarts what has ended, as systemd or Kubernetes does, and kills and freezes when the plan says so."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import Final

from tests.chaos.plan import Blow
from tests.eventually import eventually
from tests.pids import children
from tests.service import Service

_PAUSE: Final = 0.5
"""Seconds before a part that ended by itself is started again."""


class Supervisor:
    """Keeps web, the pool and Valkey of one service running. Main thread only (see Process)."""

    def __init__(self, service: Service, variables: dict[str, str]) -> None:
        """Start web and the pool with `variables` beside the service's own; its Valkey runs already."""
        self._service = service
        self._variables = variables
        self._commands = {name: service.start(name, **variables) for name in ("web", "worker")}
        #: When a part is started again, by its name; when Valkey continues.
        self._again: dict[str, float] = {}
        self._thaw: float | None = None
        #: Blows dealt, by kind, and parts that ended without one.
        self.dealt: Counter[str] = Counter()
        self.surprises: Counter[str] = Counter()

    def mind(self) -> None:
        """Start what is due to be started; call often."""
        now = time.monotonic()
        if self._thaw is not None and now >= self._thaw:
            self._service.valkey.resume()
            self._thaw = None
        for name in ("web", "worker", "valkey"):
            code = self._exit_code(name)
            if code is None:
                continue
            if name not in self._again:
                self.surprises[f"{name} exit {code}"] += 1
                self._again[name] = now + _PAUSE
            elif now >= self._again[name]:
                del self._again[name]
                if name == "valkey":
                    self._service.valkey.restart()
                else:
                    self._commands[name] = self._service.launch(name, **self._variables)

    def strike(self, blow: Blow) -> bool:
        """Deal the blow and return True; return False if its target is not up."""
        victim = self._victim(blow)
        if victim is None:
            return False
        self.dealt[blow.kind] += 1
        if blow.kind == "freeze":
            self._service.valkey.pause()
            self._thaw = time.monotonic() + blow.down
            return True
        os.kill(victim, signal.SIGKILL)
        if blow.kind == "worker":
            return True
        name = "worker" if blow.kind == "pool" else blow.kind
        eventually(lambda: self._exit_code(name) is not None, what=f"{name} is dead")
        self._again[name] = time.monotonic() + blow.down
        return True

    @property
    def all_up(self) -> bool:
        """Return whether every part runs."""
        return self._thaw is None and all(self._exit_code(name) is None for name in ("web", "worker", "valkey"))

    def _exit_code(self, name: str) -> int | None:
        return self._service.valkey.exit_code if name == "valkey" else self._commands[name].exit_code

    def _victim(self, blow: Blow) -> int | None:
        name = {"pool": "worker", "freeze": "valkey"}.get(blow.kind, blow.kind)
        if self._exit_code(name) is not None:
            return None
        match name:
            case "web":
                return self._commands["web"].pid if self._service.web_listens() else None
            case "valkey":
                return self._service.valkey.pid if self._thaw is None else None
        pool = self._commands["worker"].pid
        workers = children(pool)
        if not workers:
            return None
        return pool if blow.kind == "pool" else workers[blow.pick % len(workers)]
