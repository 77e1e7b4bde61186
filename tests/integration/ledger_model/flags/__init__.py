"""The obvious design, kept to be refuted: a flag "a fetch is waiting" in place of the three counters.

Two readings of it, by who takes the flag down; both have the clock, the leases and the fences of the real scripts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from redis import Redis
from redis.commands.core import Script

from app.store.scripts import source

Reading = Literal["lowered_by_begin", "lowered_by_finish"]
_SHARED: Final = ("accept", "want", "tick", "fail")
_OWN: Final = ("begin", "finish")
_FOLDER: Final = Path(__file__).parent


def scripts(redis: Redis, reading: Reading) -> dict[str, Script]:
    """Return the scripts that replace those of app/store, by their names."""
    paths = {name: _FOLDER / f"{name}.lua" for name in _SHARED}
    paths.update({name: _FOLDER / reading / f"{name}.lua" for name in _OWN})
    return {name: redis.register_script(_with_parts(path)) for name, path in paths.items()}


def _with_parts(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    uses = "push" if text.startswith("--! uses push") else None
    return f"{source(uses)}\n{text}" if uses else text
