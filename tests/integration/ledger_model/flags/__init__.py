"""The obvious design, kept to be refuted: a flag "a fetch is waiting" in place of the three counters.

Two readings of it, by who takes the flag down; both have the clock, the leases and the fences of the real scripts.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, Literal

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.intake.recorder import Inbox
from app.ledger.ledger import Ledger
from app.ledger.redis import source
from tests.integration.ledger_model.parts import LEASE, Clock, Parts, awaited
from tests.integration.ledger_model.wire import Wire

Reading = Literal["lowered_by_begin", "lowered_by_finish"]
_FOLDER: Final = Path(__file__).parent
_PARTS: Final = "--! uses push\n"


def flag_parts(wire: Wire, loop: asyncio.AbstractEventLoop, reading: Reading) -> Parts:
    """Return what drives the flag scripts as `real_parts` drives ours."""
    clock = Clock()
    inbox = _FlagInbox(awaited(wire), dedup_days=7, event_days=90, clock=clock)
    return Parts(wire, loop, clock, _FlagLedger(wire, reading), inbox)


class _FlagLedger(Ledger):
    def __init__(self, redis: Redis, reading: Reading) -> None:
        super().__init__(redis, order_days=400, fetch_lease=LEASE)
        paths = [_FOLDER / f"{name}.lua" for name in ("want", "tick", "fail")]
        paths += [_FOLDER / reading / f"{name}.lua" for name in ("begin", "finish")]
        self._script.update({path.stem: redis.register_script(_text(path)) for path in paths})


class _FlagInbox(Inbox):
    def __init__(self, redis: AsyncRedis, *, dedup_days: int, event_days: int, clock: Clock) -> None:
        super().__init__(redis, dedup_days=dedup_days, event_days=event_days, clock=clock)
        self._accept = redis.register_script(_text(_FOLDER / "accept.lua"))


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return f"{source('push')}\n{text}" if text.startswith(_PARTS) else text
