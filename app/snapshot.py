"""How the receiver is, read in one step for /metrics, for the alerts and for people: what waits, what hangs, who lives.

The step costs the same with one order and with a million: of `due` it looks at SAMPLE orders from either end. The
soonest are those that wait longest for a worker, the latest those that have failed most often, so the longest owed
fetch is among them, or one nearly as old. Up to twice SAMPLE orders owed it is exact.

The heartbeats of the worker pools: one JSON value a pool in `ota:pools`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from rq.job import Job

from app.ledger import keys
from app.ledger.redis import packed, source
from app.ledger.rq_jobs import BACKFILL, LIVE, queue_key
from app.times import to_ms


class Heartbeat(msgspec.Struct, frozen=True):
    """What a pool writes each second: its identity (workers.recovery), its workers, and when, in ms since 1970."""

    machine: str
    pid: int
    started: str
    workers: list[str]
    beat: int


def read_heartbeat(text: bytes | str) -> Heartbeat | None:
    """Return the heartbeat in a value of `ota:pools`, None if another version or another program wrote it."""
    try:
        return msgspec.json.decode(text, type=Heartbeat)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class AlertState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One alert; times in ms since 1970, 0 for never.

    `since` its sign was first seen, `seen` last, `raised` and `told` (again), `count` of the counter it watches.
    """

    since: int = 0
    seen: int = 0
    raised: int = 0
    told: int = 0
    count: int = -1


def read_alert(text: bytes | str) -> AlertState | None:
    """Return the state in a value of `ota:alerts`, None if another version or another program wrote it."""
    try:
        return msgspec.json.decode(text, type=AlertState)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class Pools:
    """Reads the heartbeats; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def all(self) -> list[bytes]:
        """Return what each pool wrote last, as JSON."""
        told: list[Any] = self._redis.hvals(keys.POOLS)
        return told


SAMPLE: Final = 200


class Subject(msgspec.Struct, frozen=True):
    """A company of the settings as it is looked at; `breaker` is the key of its breaker (budget.breaker_key)."""

    slug: str
    company_id: str
    breaker: str


class CompanyVitals(msgspec.Struct, frozen=True):
    """Times in ms since 1970, 0 for never.

    `oldest_owed` is ms since the latest event of the order that has waited longest for what that event told of. Not
    among them: what people or reconciling asked for, what waits in backfill, what was given up, and what was fetched
    and had not settled (that has a time of its own). `unsettled`: orders that the list showed so, `unsettled_since`
    when the first of them was seen. `breaker_until` lies in the past while a probe is to come, 0 with no breaker open.
    """

    oldest_owed: int
    breaker_until: int
    current_seen: int
    previous_seen: int
    unsettled: int
    unsettled_since: int

    @property
    def last_event(self) -> int:
        return max(self.current_seen, self.previous_seen)


class SinkVitals(msgspec.Struct, frozen=True):
    """Orders, among those looked at, whose latest revision a sink has not had, and those of them it has refused."""

    behind: int
    failing: int


class QueueVitals(msgspec.Struct, frozen=True):
    """Jobs that wait, and when the first of them was queued as RQ writes it, "" if none waits."""

    jobs: int
    oldest: str


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """The whole. `companies` is by id; `elsewhere` is `oldest_owed` of companies that the settings do not name.

    `soonest`: ms when the next order of `due` is to be looked at, 0 if none is. `alerts`: what watch.py keeps.
    """

    now: int
    due: int
    soonest: int
    dead: int
    dead_deliveries: int
    pools: dict[str, str]
    schema: str
    alerts: dict[str, str]
    queues: dict[str, QueueVitals]
    companies: dict[str, CompanyVitals]
    elsewhere: int
    sinks: dict[str, SinkVitals]

    @property
    def late(self) -> int:
        """Return for how many ms the ticker has not looked at an order whose time has come."""
        return max(self.now - self.soonest, 0) if self.soonest else 0

    def waited(self, queue: str) -> int:
        """Return for how many ms the first job of a queue has waited, 0 without one."""
        oldest = self.queues[queue].oldest
        return max(self.now - to_ms(datetime.fromisoformat(oldest)), 0) if oldest else 0

    def alert_states(self) -> dict[tuple[str, str, str], AlertState]:
        """Return the alerts that are kept, by name, company and sink; unreadable entries are left out."""
        found = {tuple(field.split("|")): read_alert(text) for field, text in sorted(self.alerts.items())}
        return {key: state for key, state in found.items() if state is not None and len(key) == 3}

    def heartbeats(self) -> list[Heartbeat]:
        """Return the last heartbeat of each pool; entries of another version or program are left out."""
        return [one for text in self.pools.values() if (one := read_heartbeat(text)) is not None]


class VitalSigns:
    """Asks for them, on either kind of client. `sinks`: SINKS."""

    def __init__(self, subjects: Sequence[Subject], sinks: Sequence[str]) -> None:
        self.subjects = tuple(subjects)
        self._script = source("snapshot")
        self._arguments = {
            "sample": SAMPLE,
            "companies": [(one.company_id, one.breaker) for one in subjects],
            "sinks": list(sinks),
            "job_prefix": Job.redis_job_namespace_prefix,
            "queues": {name: queue_key(name) for name in (LIVE, BACKFILL)},
        }

    def read(self, redis: Redis, now: int | None = None) -> Vitals:
        """Return how it is now, by the clock of Redis unless `now` (ms) is given; raises what redis-py raises."""
        return _vitals(redis.register_script(self._script)(args=[packed(**self._arguments, now=now)]))

    async def read_async(self, redis: AsyncRedis, now: int | None = None) -> Vitals:
        """Return the same as `read`."""
        return _vitals(await redis.register_script(self._script)(args=[packed(**self._arguments, now=now)]))


def _vitals(answer: bytes) -> Vitals:
    # Keys and values of `ota:pools` and `ota:alerts` are copied into the answer, whatever bytes they hold.
    return msgspec.json.decode(answer.decode(errors="replace"), type=Vitals)
