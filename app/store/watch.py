"""The alarms' memory: whose minute it is to look, what was raised when, and how many events each hour usually has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from redis import Redis

from app.store import clockwork, counters, keys

EVERY: Final = clockwork.MINUTE
"""Between two looks, over all machines."""

HOUR: Final = 60 * clockwork.MINUTE
HOURS_KEPT: Final = (4 * 7 + 2) * 24
"""Four weeks, and what a window that began yesterday reaches beyond them."""

_HOUR_FIELD: Final = "hour:"


class AlarmState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One alarm; times in ms since 1970, 0 for never.

    `since` its sign was first seen, `seen` last, `raised` and `told` (again), `count` of the counter it watches.
    """

    since: int = 0
    seen: int = 0
    raised: int = 0
    told: int = 0
    count: int = -1


def read_alarm(text: bytes | str) -> AlarmState | None:
    """Return the state in a value of `ota:alarms`, None if another version or another program wrote it."""
    try:
        return msgspec.json.decode(text, type=AlarmState)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class Watch:
    """Reads and writes it; raises what Redis raises."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def take_turn(self) -> bool:
        """Return whether this pool is to look now; if it dies at it, another does a minute later."""
        return bool(self._redis.set(keys.ALARMS_TURN, 1, nx=True, px=EVERY - clockwork.SECOND))

    def totals(self) -> dict[tuple[str, ...], int]:
        """Return every counter by field prefix and label values."""
        kept: Any = self._redis.hgetall(keys.COUNTERS)
        known = counters.METRICS.keys()
        fields = {tuple(field.decode(errors="replace").split("|")): value for field, value in kept.items()}
        return {name: int(value) for name, value in fields.items() if name[0] in known}

    def hours(self, company_id: str, now: int) -> dict[int, int]:
        """Return hour since 1970 -> events of the company that were new in it; those long past are forgotten."""
        kept: Any = self._redis.hgetall(keys.pulse(company_id))
        prefix = _HOUR_FIELD.encode()
        found = {int(field[len(prefix) :]): int(value) for field, value in kept.items() if field.startswith(prefix)}
        if old := [hour for hour in found if hour < now // HOUR - HOURS_KEPT]:
            self._redis.hdel(keys.pulse(company_id), *(f"{_HOUR_FIELD}{hour}" for hour in old))
        return {hour: count for hour, count in found.items() if hour not in old}

    def states(self) -> dict[str, AlarmState]:
        """Return the state of each alarm by its field."""
        kept: Any = self._redis.hgetall(keys.ALARMS)
        found = {field.decode(errors="replace"): read_alarm(text) for field, text in kept.items()}
        return {field: state for field, state in found.items() if state is not None}

    def save(self, states: Mapping[str, AlarmState]) -> None:
        """Put these states in the place of all that were kept."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(keys.ALARMS)
            if states:
                pipe.hset(keys.ALARMS, mapping={field: msgspec.json.encode(state) for field, state in states.items()})
            pipe.execute()
