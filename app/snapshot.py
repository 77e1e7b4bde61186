"""The state of the whole receiver, read in one script call for /metrics, the alerts and `ota-receiver status`.

The call costs the same with one order and with a million: it looks at policy.SAMPLE orders from either end of `due`,
and of the clock of each sink. Those due first have waited longest for a worker, those due last have failed most often.
So the oldest pending fetch is among them, or one nearly as old is. Up to twice SAMPLE pending orders it is exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import msgspec
from rq.job import Job
from rq.suspension import WORKERS_SUSPENDED

from app.deployment import running
from app.heartbeat import Heartbeat, decoded, readable
from app.ledger import policy
from app.ledger.keys import Keys
from app.ledger.rate_limit import breaker_id, key_id
from app.ledger.redis import AsyncRedis, Redis, packed, source
from app.ledger.rq_jobs import BACKFILL, LIVE, queue_key
from app.settings import Company
from app.times import from_ms, to_ms

_QUEUE_OF: Final = re.compile(r".*?-(live|backfill|sink-.+)-\d+")
"""The queue in the name of a worker."""

FAILING_ORDERS: Final = 3
FAILING_FOR: Final = 30 * policy.SECOND
"""A sink fails for everything when nothing was delivered since so many orders failed, or one did so long ago. One bad
order of a sink that gets others is the trouble of this order."""

PROBE_WITHIN: Final = policy.MINUTE
"""A probe follows within this after a breaker's time, if an order is pending. Later the breaker counts as closed."""


class AlertState(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of one alert; times in ms since 1970, 0 for never.

    Its condition has been true since `since`, and was true last at `last_true_at`. The alert fires since `firing_at`
    and was logged last at `logged_at`. `count` is the counter that it watches, -1 before the first evaluation, and
    `risen` by how much it has risen since `since`. `reason` as it was last.
    """

    since: int = 0
    last_true_at: int = 0
    firing_at: int = 0
    logged_at: int = 0
    count: int = -1
    risen: int = 0
    reason: str = ""


class Breaker(msgspec.Struct, frozen=True):
    """An open breaker: the reason code and the HTTP status of the failure that opened it last, and since when.

    `probe_at`: when the next call may be made, as a probe; in the past while no order has come for it.
    """

    reason: str
    http_status: int | None
    since: datetime
    probe_at: datetime


class CompanySnapshot(msgspec.Struct, frozen=True):
    """One company, by its `slug`; times in ms since 1970, 0 for never.

    `oldest_pending_ms` is the age of the latest event of the order that has waited longest for the fetch of this
    event. It covers every queue. Left out: fetches that people or reconciling requested of a fetched event, dead
    letters, and unsettled orders, which are rechecked at times of their own. `unsettled` counts orders that the list
    showed unsettled, `unsettled_since` is when the first of them was seen. `breaker_open_until` lies in the past while
    a probe is to come, and is 0 while no breaker is open; since `breaker_opened_at`, last for `breaker_reason` and
    `breaker_http` (0 without an answer). `subscription`: its state as a pool saw it last (app/subscriptions.py), ""
    before the first check. `key`: id of its API key; `throttled_until`: its Retry-After. `dead_at`: when its latest
    dead letter became one, of the SAMPLE latest of all.
    """

    slug: str
    oldest_pending_ms: int
    breaker_open_until: int
    breaker_opened_at: int
    breaker_reason: str
    breaker_http: int
    current_secret_at: int
    previous_secret_at: int
    unsettled: int
    unsettled_since: int
    subscription: str = ""
    key: str = ""
    throttled_until: int = 0
    dead_at: int = 0

    @property
    def last_event_at(self) -> int:
        return max(self.current_secret_at, self.previous_secret_at)


class SinkSnapshot(msgspec.Struct, frozen=True):
    """One sink.

    It has not received the latest revision of `behind` orders; of these, as far as looked at, it refused `failing`. No
    delivery has succeeded since `failing_since` (ms since 1970, 0 if the latest succeeded): since then
    `failed_orders` failed at their first attempt, with `failed_attempts` in all; `error` is type and place of the last.
    `dead_at` as for a company. Its breaker is open since `breaker_opened_at` for `breaker_reason`, and the next attempt
    is made at `breaker_open_until`, which may lie in the past while no order has come for it; 0 while it is closed. A
    probe under way must be done by `probe_until`; 0 without one. It is disabled since `disabled_at`, 0 while it is not.
    """

    behind: int
    failing: int
    failing_since: int
    failed_orders: int
    failed_attempts: int
    error: str
    dead_at: int = 0
    breaker_open_until: int = 0
    breaker_opened_at: int = 0
    breaker_reason: str = ""
    probe_until: int = 0
    disabled_at: int = 0
    disabled_reason: str = ""

    @property
    def breaker(self) -> Breaker | None:
        """Return its open breaker, also while the probe is overdue; None without one."""
        if not self.breaker_open_until:
            return None
        since, probe_at = from_ms(self.breaker_opened_at), from_ms(self.breaker_open_until)
        return Breaker(self.breaker_reason, None, since, probe_at)

    def failing_s(self, now: int) -> int | None:
        """Return for how many seconds nothing has been delivered at `now` (ms), None if the latest delivery did."""
        return (now - self.failing_since) // 1000 if self.failing_since else None

    def fails(self, now: int) -> bool:
        """Return whether it fails for everything at `now` (ms)."""
        is_long = now - self.failing_since >= FAILING_FOR
        return self.failing_since > 0 and (self.failed_orders >= FAILING_ORDERS or is_long)


class ConsumerSnapshot(msgspec.Struct, frozen=True):
    """One consumer of the feed: orders that it has not acknowledged, the oldest of them since `waiting_since`.

    `waiting_since` is in ms since 1970, 0 for none.
    """

    behind: int
    waiting_since: int

    def waiting_s(self, now: int) -> int:
        """Return for how many seconds the oldest has waited at `now` (ms)."""
        return max(now - self.waiting_since, 0) // 1000 if self.waiting_since else 0


class QueueSnapshot(msgspec.Struct, frozen=True):
    """Waiting jobs, and when the first of them was queued as RQ writes it, "" without one."""

    jobs: int
    oldest: str


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The whole; `companies` by id: those of the settings, and those that pools have declared, as the `sinks`.
    `consumers` of the feed by name.

    `counters`: field prefix and label values, with a `|` between them -> count (app.metrics). `next_due_at` is the
    lowest score of `due` in ms since 1970, 0 if it is empty. `suspended`: `rq suspend` was given.
    `elsewhere`: id of a company that is not in `companies` ->
    age of its oldest pending fetch in ms.
    """

    now: int
    due: int
    next_due_at: int
    dead: int
    dead_deliveries: int
    suspended: bool
    pools: dict[str, str]
    schema: str
    alerts: dict[str, str]
    counters: dict[str, str]
    queues: dict[str, QueueSnapshot]
    companies: dict[str, CompanySnapshot]
    elsewhere: dict[str, int]
    sinks: dict[str, SinkSnapshot]
    consumers: dict[str, ConsumerSnapshot]

    @property
    def dispatcher_lag_ms(self) -> int:
        """Return for how long the dispatcher has not looked at an order that is due."""
        return max(self.now - self.next_due_at, 0) if self.next_due_at else 0

    def queue_age_ms(self, queue: str) -> int:
        """Return for how long the first job of a queue has waited, 0 without one."""
        oldest = self.queues[queue].oldest
        return max(self.now - to_ms(datetime.fromisoformat(oldest)), 0) if oldest else 0

    def breaker_is_open(self, company_id: str) -> bool:
        """Return whether the breaker of a company is open, or half open with a probe still to come."""
        until = self.companies[company_id].breaker_open_until
        return until > 0 and self.now < until + PROBE_WITHIN

    def breaker(self, company_id: str) -> Breaker | None:
        """Return the breaker of a company's getOrder calls, also while its probe is overdue; None without one."""
        one = self.companies.get(company_id)
        if one is None or not one.breaker_open_until:
            return None
        since, probe_at = from_ms(one.breaker_opened_at), from_ms(one.breaker_open_until)
        return Breaker(one.breaker_reason, one.breaker_http or None, since, probe_at)

    def open_breakers(self) -> dict[str, Breaker]:
        """Return the open breakers by the slug of their company."""
        breakers = {id_: self.breaker(id_) for id_ in self.companies if self.breaker_is_open(id_)}
        return {self.companies[id_].slug: one for id_, one in breakers.items() if one is not None}

    def throttled(self) -> dict[str, datetime]:
        """Return until when the Retry-After of its API key holds back the calls of a company, by slug."""
        return {
            one.slug: from_ms(one.throttled_until)
            for one in self.companies.values()
            if 0 < one.throttled_until - self.now <= policy.LONGEST_RETRY
        }

    def total(self, *name: str) -> int:
        """Return the sum of the counters with this field prefix and these first label values."""
        return sum(int(value) for field, value in self.counters.items() if field.split("|")[: len(name)] == [*name])

    def alert_states(self) -> dict[tuple[str, str, str], AlertState]:
        """Return the saved alerts by name, company and sink; unreadable entries are left out."""
        found = {tuple(field.split("|")): decoded(text, AlertState) for field, text in sorted(self.alerts.items())}
        return {key: state for key, state in found.items() if state is not None and len(key) == 3}

    def heartbeats(self) -> list[Heartbeat]:
        """Return the last heartbeat of each pool; unreadable entries are left out."""
        return readable(self.pools.values())

    def running_pools(self) -> dict[str, Heartbeat]:
        """Return the last heartbeat of each running pool, by its name."""
        return running(self.pools, self.now)

    def undeclared(self) -> dict[tuple[str, str], int]:
        """Return what orders wait for and no running pool declares, as (slug or id of a company, sink): one is "".

        The value is the age of the oldest fetch in ms, or the number of deliveries. {} while no pool runs.
        """
        pools = [pool.configuration for pool in self.running_pools().values()]
        if not pools:
            return {}
        companies = {id_ for pool in pools for id_ in pool.companies}
        sinks = {sink for pool in pools for sink in pool.sinks}
        waiting = {(one.slug, ""): one.oldest_pending_ms for id_, one in self.companies.items() if id_ not in companies}
        waiting |= {(id_, ""): age for id_, age in self.elsewhere.items()}
        waiting |= {("", name): one.behind for name, one in self.sinks.items() if name not in sinks}
        return {name: figure for name, figure in waiting.items() if figure}

    def workers(self, queue: str) -> int:
        """Return the number of worker processes of the running pools that serve this queue."""
        found = (_QUEUE_OF.fullmatch(name) for pool in self.running_pools().values() for name in pool.workers)
        return sum(one is not None and one[1] == queue for one in found)


class SnapshotReader:
    """Reads a snapshot, with either kind of client; `companies` are in it even if no pool has declared them."""

    def __init__(self, companies: Sequence[Company]) -> None:
        self._script = source("snapshot")
        self._arguments = {
            "schema": None,
            "sample": policy.SAMPLE,
            "companies": [_arguments(one) for one in companies],
            "job_prefix": Job.redis_job_namespace_prefix,
            "queues": [LIVE, BACKFILL],
            "suspended": WORKERS_SUSPENDED,
        }

    def read(self, redis: Redis, now: int | None = None) -> Snapshot:
        """Return the snapshot at the time of the Redis server, or at `now` (ms); raises what redis-py raises."""
        return _snapshot(redis.register_script(self._script)(args=[self._packed(redis.names, now)]))

    async def read_async(self, redis: AsyncRedis) -> Snapshot:
        """Return the same as `read`."""
        return _snapshot(await redis.register_script(self._script)(args=[self._packed(redis.names)]))

    def _packed(self, names: Keys, now: int | None = None) -> bytes:
        return packed(names, **self._arguments, queue_prefix=queue_key("", names), now=now)


def _arguments(company: Company) -> tuple[str, ...]:
    api_key = company.np_api_key.get_secret_value()
    return company.np_company_id, company.slug, breaker_id(api_key, company.path), key_id(api_key)


def _snapshot(answer: bytes) -> Snapshot:
    # The answer holds keys and values of `ota:pools` and `ota:alerts`, which may be any bytes.
    return msgspec.json.decode(answer.decode(errors="replace"), type=Snapshot)
