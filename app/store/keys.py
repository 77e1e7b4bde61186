"""Every key in Redis: its name, type, lifetime, and who writes it.

| key | type | lifetime | written by |
|---|---|---|---|
| `ota:order:<company>:<order>` | hash: the record of one order (below) | none while owed, then ORDER_DAYS | all |
| `ota:content:<company>:<order>` | string: the order as fetched, zlib | as the record | finish |
| `ota:trail:<company>:<order>` | list: what happened to the order, the last 200 lines | as the record | all |
| `ota:seen:<digest>` | string: this event came already | DEDUP_DAYS | accept |
| `ota:events` | stream: the accepted events | trimmed to EVENT_DAYS | accept |
| `ota:due` | zset: order -> ms when somebody must look again; the only clock | until nothing is owed | all scripts |
| `ota:dead` | zset: order -> ms when it was given up | until revived | begin, finish, fail |
| `ota:dead-sinks` | zset: order + sink -> ms when the hand-on was given up | until revived | handed |
| `ota:orders` | zset: order -> ms of the last change | ORDER_DAYS | accept, want, finish |
| `ota:holding:<worker>` | string: order and fence a worker is busy with | the work, at most 1 h | begin, hand |
| `ota:pools` | hash: pool -> JSON of machine, pid, workers, heartbeat | until the pool ends | pool |
| `ota:counters` | hash: metric and labels -> number | none | accept, counters |
| `ota:budget:<key id>` | hash: Retry-After and last release of one API key | one day | budget scripts |
| `ota:breaker:<key and company>` | hash: breaker of one company's calls with one key | one day | budget scripts |
| `ota:slots:<key id>` | zset: lease of a slot -> ms when it expires | as its leases | budget scripts |
| `ota:window:<key id>` | zset: request -> ms when it was made | five minutes | budget scripts |
| `ota:freed:<key id>` | list: one entry a slot given back, for those who wait | two seconds | budget scripts |

Beside them stand RQ's own keys (`rq:queue:live`, `rq:queue:backfill`, `rq:job:<id>`), written as RQ writes them.

Fields of a record. Counters: `wanted` settlements accepted, `begun` the `wanted` that the latest fetch saw, `done`
the highest `begun` whose fetch was stored, `fence` of the latest fetch, `stored` fence of the latest stored one. Now:
`job` queue in which a job waits, `lane` queue this order's jobs go to, `pushes` by the ticker since the last begin,
`lease` ms until the holder must be done, `holder` worker, `fetch_at` ms before which no fetch begins. Troubles since
the last good fetch: `tries`, `rejects`, `looks`, `parks`, `crashes`, `missing` ms of the first 404, `error` reason
code, `http` status, `dead` reason code, `dead_at` ms. Content: `status`, `digest`, `revision`, `fetched` ms,
`wallets`, `tickets`, `coupons`, `manifest` (0 or 1). Events: `first` ms, `heard` ms, `said` status of the latest
event, `reference` its buyFromOrderReference, `request` its request id, `duplicates`. Sinks: `<sink>:at` revision
handed on, `<sink>:tries`, `<sink>:next` ms of the next, `<sink>:dead` reason; `hand` ms until the hand-on in progress
must be done, `handler` worker.
"""

from __future__ import annotations

from typing import Final, NamedTuple

PREFIX: Final = "ota:"
DUE: Final = "ota:due"
DEAD: Final = "ota:dead"
DEAD_SINKS: Final = "ota:dead-sinks"
EVENTS: Final = "ota:events"
ORDERS: Final = "ota:orders"
COUNTERS: Final = "ota:counters"
POOLS: Final = "ota:pools"


class OrderKey(NamedTuple):
    """One order: the GUIDs of its company and of itself, canonical (lower case, no braces)."""

    company_id: str
    order_id: str

    @property
    def member(self) -> str:
        """Return the form used in zsets and at the end of keys."""
        return f"{self.company_id}:{self.order_id}"

    @classmethod
    def of(cls, member: str) -> OrderKey:
        """Return the order a zset member or key ending stands for."""
        company_id, order_id = member.split(":")
        return cls(company_id, order_id)


def record(order: OrderKey) -> str:
    return f"ota:order:{order.member}"


def content(order: OrderKey) -> str:
    return f"ota:content:{order.member}"


def trail(order: OrderKey) -> str:
    return f"ota:trail:{order.member}"


def holding(worker: str) -> str:
    return f"ota:holding:{worker}"


def budget(key_id: str) -> str:
    return f"ota:budget:{key_id}"


def breaker(connection_id: str) -> str:
    return f"ota:breaker:{connection_id}"


def slots(key_id: str) -> str:
    return f"ota:slots:{key_id}"


def window(key_id: str) -> str:
    return f"ota:window:{key_id}"


def freed(key_id: str) -> str:
    return f"ota:freed:{key_id}"
