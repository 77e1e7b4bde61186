"""When a sign becomes an alarm, and when it is one no more: each is told once, at its onset and at its end. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal

import msgspec

from app.alarms.signs import Sign
from app.store import clockwork
from app.store.watch import AlarmState

MINUTE: Final = clockwork.MINUTE


class Rule(msgspec.Struct, frozen=True):
    """In ms: `hold` for how long the sign must be seen first, `calm` for how long it must not be seen to end it,
    `again` after which an alarm that lasts is told anew, 0 for never.
    """

    hold: int = 0
    calm: int = 0
    again: int = 0


RULES: Final[dict[str, Rule]] = {
    "fetch_late": Rule(),
    "breaker_open": Rule(hold=5 * MINUTE),
    # A rotation takes a day or two; after a week the old secret was forgotten somewhere.
    "previous_secret": Rule(hold=7 * clockwork.DAY, calm=clockwork.DAY),
    "dead_letters": Rule(calm=60 * MINUTE),
    "dead_hand_ons": Rule(calm=60 * MINUTE),
    "rejected_secrets": Rule(calm=60 * MINUTE),
    "missed_events": Rule(calm=60 * MINUTE),
    "sink_failing": Rule(hold=10 * MINUTE, calm=2 * MINUTE),
    "pool_silent": Rule(),
    "silence": Rule(again=60 * MINUTE),
}
"""Every alarm of the log; docs/operations.md has a section on each."""


class Change(msgspec.Struct, frozen=True):
    """What is to be told; `since` ms since 1970 is when its sign was first seen."""

    what: Literal["raised", "again", "cleared"]
    sign: Sign
    since: int


def judge(
    signs: Iterable[Sign], states: Mapping[str, AlarmState], now: int
) -> tuple[dict[str, AlarmState], list[Change]]:
    """Return the states from now on and what is to be told. What has no sign any more (a company that the settings no
    longer name) has ended.
    """
    after: dict[str, AlarmState] = {}
    changes: list[Change] = []
    for sign in signs:
        was = _not_ahead(states.get(sign.field, AlarmState()), now)
        after[sign.field], what = _next(sign, RULES[sign.name], was, now)
        if what is not None:
            changes.append(Change(what, sign, was.since or now))
    for field, was in states.items():
        if field not in after and was.raised:
            name, company, sink = field.split("|")
            changes.append(Change("cleared", Sign(name=name, company=company, sink=sink), was.since))
    return after, changes


def _next(
    sign: Sign, rule: Rule, was: AlarmState, now: int
) -> tuple[AlarmState, Literal["raised", "again", "cleared"] | None]:
    count = -1 if sign.count is None else sign.count
    # Seen for the first time, or lower than before (Redis was flushed), a counter says nothing yet.
    is_on = sign.is_on if sign.count is None else 0 <= was.count < count
    seen = now if is_on else was.seen
    if not is_on and not (was.since and now - seen < rule.calm):
        # When it was seen last is kept: silence.py asks for it.
        return AlarmState(seen=was.seen, count=count), "cleared" if was.raised else None
    state = AlarmState(since=was.since or now, seen=seen, raised=was.raised, told=was.told, count=count)
    if not was.raised:
        if now - state.since < rule.hold:
            return state, None
        return msgspec.structs.replace(state, raised=now, told=now), "raised"
    if rule.again and now - was.told >= rule.again:
        return msgspec.structs.replace(state, told=now), "again"
    return state, None


def _not_ahead(state: AlarmState, now: int) -> AlarmState:
    """Return the state with nothing in it that is still to come: a clock was ahead, and is right again."""
    return AlarmState(
        since=min(state.since, now),
        seen=min(state.seen, now),
        raised=min(state.raised, now),
        told=min(state.told, now),
        count=state.count,
    )
