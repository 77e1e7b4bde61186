"""A replay as a plan: what it is to do, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

import msgspec

from app.store.moment import from_ms

State = Literal["open", "done", "cancelled"]


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan is to do: fetch the orders, or hand their stored revision to `sinks` without a fetch.

    `rate` in orders a second; `who` and `why` are a person's own words.
    """

    who: str
    why: str
    selected: str
    rate: float
    sinks: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One plan. Of its `orders`, `left` are still to do, or were when it was cancelled.

    `queued` have a new job (or hand-on), `waiting` had one already, `passed` needed none: their copy is newer by now,
    or there is nothing to hand on.
    """

    id: str
    at: datetime
    who: str
    why: str
    selected: str
    rate: float
    sinks: tuple[str, ...]
    state: State
    orders: int
    left: int
    queued: int
    waiting: int
    passed: int
    ended: datetime | None


class Step(msgspec.Struct, frozen=True):
    """What a step came to: `unknown` is a plan that is not here (any more); `wait` ms until there is more to take."""

    state: State | Literal["unknown"]
    left: int
    wait: int


def is_plan_id(text: str) -> bool:
    """Return whether `text` can be the id of a plan."""
    return 0 < len(text) <= 20 and text.isascii() and text.isalnum()


def parse_plan(plan_id: str, texts: Mapping[str, str], left: int) -> Plan:
    """Return the plan in the hash `texts`, with the length of its list."""
    return Plan(
        id=plan_id,
        at=from_ms(int(texts["at"])),
        who=texts["who"],
        why=texts["why"],
        selected=texts["selected"],
        rate=float(texts["rate"]),
        sinks=tuple(filter(None, texts["sinks"].split(","))),
        state=texts["state"],  # type: ignore[arg-type]  # only we write it
        orders=int(texts["orders"]),
        left=int(texts.get("left", left)),
        queued=int(texts.get("queued", 0)),
        waiting=int(texts.get("waiting", 0)),
        passed=int(texts.get("passed", 0)),
        ended=from_ms(int(texts["ended"])) if "ended" in texts else None,
    )
