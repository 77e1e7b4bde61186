"""Who starts again what has ended, as systemd or Kubernetes would, and strikes when the plan says so."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from typing import Final

from tests.acceptance.strangers import System, children
from tests.chaos.plan import Blow

_PAUSE: Final = 0.5
"""Seconds before a part that ended by itself is started again."""


class Supervisor:
    """Minds web, the pool and Valkey of one system. All of it in one thread: what it starts dies with that thread."""

    def __init__(self, system: System, variables: dict[str, str]) -> None:
        """Take over a system whose Valkey runs; `variables` are added to the environment of both commands."""
        self._system = system
        self._variables = variables
        assert system.valkey is not None
        self._parts = {name: system.start(name, **variables) for name in ("web", "worker")}
        self._parts["valkey"] = system.valkey
        #: When a part is to be started again, by its name; when Valkey is to go on.
        self._again: dict[str, float] = {}
        self._thaw: float | None = None
        #: Blows that were dealt, by kind, and parts that ended without one.
        self.dealt: Counter[str] = Counter()
        self.surprises: Counter[str] = Counter()

    def mind(self) -> None:
        """Start what is due to be started; call often."""
        now = time.monotonic()
        if self._thaw is not None and now >= self._thaw:
            self._parts["valkey"].send_signal(signal.SIGCONT)
            self._thaw = None
        for name, part in self._parts.items():
            if part.poll() is None:
                continue
            if name not in self._again:
                self.surprises[f"{name} exit {part.returncode}"] += 1
                self._again[name] = now + _PAUSE
            elif now >= self._again[name]:
                del self._again[name]
                self._parts[name] = self._started(name)

    def strike(self, blow: Blow) -> bool:
        """Deal the blow, unless its target is not up just now: then return False."""
        victim = self._victim(blow)
        if victim is None:
            return False
        now = time.monotonic()
        self.dealt[blow.kind] += 1
        if blow.kind == "freeze":
            os.kill(victim, signal.SIGSTOP)
            self._thaw = now + blow.down
            return True
        os.kill(victim, signal.SIGKILL)
        name = "worker" if blow.kind == "pool" else blow.kind
        if blow.kind != "worker":
            self._parts[name].wait()
            self._again[name] = now + blow.down
        return True

    @property
    def all_up(self) -> bool:
        """Return whether every part runs."""
        return self._thaw is None and all(part.poll() is None for part in self._parts.values())

    def _victim(self, blow: Blow) -> int | None:
        pool, web, valkey = self._parts["worker"], self._parts["web"], self._parts["valkey"]
        match blow.kind:
            case "web":
                return web.pid if web.poll() is None and self._system.web_listens() else None
            case "valkey" | "freeze":
                up = valkey.poll() is None and self._thaw is None and self._system.valkey_listens()
                return valkey.pid if up else None
            case "pool" | "worker":
                workers = children(pool.pid) if pool.poll() is None else []
                if not workers:
                    return None
                return pool.pid if blow.kind == "pool" else workers[blow.pick % len(workers)]

    def _started(self, name: str) -> subprocess.Popen[bytes]:
        if name == "valkey":
            self._system.launch_valkey()
            assert self._system.valkey is not None
            return self._system.valkey
        return self._system.launch(name, **self._variables)
