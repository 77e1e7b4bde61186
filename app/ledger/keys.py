"""Every key in Redis: its name, type, lifetime, and who writes it.

| key | type | lifetime | written by |
|---|---|---|---|
| `ota:order:<company>:<order>` | hash: the record of one order (below) | none while owed, then ORDER_DAYS | all |
| `ota:content:<company>:<order>` | string: the order as fetched, zlib | as the record | finish |
| `ota:trail:<company>:<order>` | list: what happened to the order, the last 200 lines | as the record | all |
| `ota:seen:<digest>` | string: this event came already | DEDUP_DAYS | accept |
| `ota:events` | stream: the accepted events | trimmed to EVENT_DAYS | accept |
| `ota:audit` | stream: who changed something by hand, what, when and why (audit.py) | trimmed to EVENT_DAYS | CLI |
| `ota:replays` | zset: plan of a replay -> ms when it was made | EVENT_DAYS | plans |
| `ota:replay:<plan>` | hash: what one replay is to do, and how far it is (below) | EVENT_DAYS | plans and scripts |
| `ota:replay-todo:<plan>` | list: orders to do, and ms of what each was told last | as its plan | plans and scripts |
| `ota:due` | zset: order -> ms when somebody must look again; the only clock | until nothing is owed | all scripts |
| `ota:dead` | zset: order -> ms when it was given up | until revived, dropped | begin, finish, fail |
| `ota:dead-sinks` | zset: order + sink -> ms when the hand-on was given up | until revived, dropped | handed |
| `ota:salt` | string: salt of the digests of guests' addresses (guests.py) | none | finish |
| `ota:erasing` | zset: erased order -> ms, while its events and jobs may be here | until they went | erase |
| `ota:orders` | zset: order -> ms of the last change | ORDER_DAYS (order_list.py) | accept, want, finish |
| `ota:reference:<digest>` | set: orders with this reference, of either side | ORDER_DAYS and a week | finish |
| `ota:holding:<worker>` | string: order and fence (0 and sink) of a worker | the work, at most 1 h | begin, hand |
| `ota:schema` | string: version of what stands here (schema.py); none = 1 | none | all that write orders |
| `ota:pools` | hash: pool -> JSON of machine, pid, workers, heartbeat | until the pool ends | pool |
| `ota:probe` | string: a web process asks whether Redis takes writes again | ten seconds | inbox |
| `ota:reconcile:<company>` | hash: when the list of orders is read next (below) | none | turns, tally |
| `ota:reconcile-marks:<company>` | zset: highest row version of a page -> ms of the call | until one is old | cursor |
| `ota:reconcile-watch:<company>` | zset: unsettled order -> ms when it was first seen so | until it settles | cursor |
| `ota:reconcile-lease:<company>` | string: who reads the list of this company now | the run, at most some min | turns |
| `ota:alarm:<company>` | string: rejected events of this company were told of | five minutes | tally |
| `ota:counters` | hash: metric and labels -> number | none | accept, finish, begin, fail, handed, counters |
| `ota:pulse:<company>` | hash: last event by secret, events by hour (below) | four weeks an hour | accept, watch |
| `ota:alarms` | hash: alarm, company or sink -> JSON of its state | until the next look | watch |
| `ota:alarms-turn` | string: a pool looks at the alarms in this minute | a minute | watch |
| `ota:budget:<key id>` | hash: Retry-After and last release of one API key | one day | budget scripts |
| `ota:breaker:<key and company>` | hash: breaker of one company's calls with one key | one day | budget scripts |
| `ota:slots:<key id>` | zset: lease of a slot -> ms when it expires | as its leases | budget scripts |
| `ota:window:<key id>` | zset: request -> ms when it was made | five minutes | budget scripts |
| `ota:freed:<key id>` | list: one entry a slot given back, for those who wait | two seconds | budget scripts |

Beside them stand RQ's own keys (`rq:queue:live`, `rq:queue:backfill`, `rq:job:<id>`), written as RQ writes them.

Fields of a record. Counters: `wanted` settlements accepted, `begun` the `wanted` that the latest fetch saw, `done`
the highest `begun` whose fetch was stored, `fence` of the latest fetch, `stored` fence of the latest stored one. Now:
`job` queue in which a job waits, `lane` queue this order's jobs go to, `pushes` by the ticker since the last begin,
`pushed` by the ticker ever, so that no job id comes twice, `lease` ms until the holder must be done, `holder` worker,
`fetch_at` ms before which no fetch begins. Troubles since the last good fetch: `tries`, `rejects`, `looks`, `parks`,
`crashes`, `missing` ms of the first 404, `error` reason code, `http` status, `dead` reason code, `dead_at` ms,
`dropped` ms when it was last given up for good by hand (drop.lua; then `done` is `wanted`). Content:
`status`, `digest`, `revision`, `fetched` ms, `wallets`, `tickets`, `coupons`, `manifest` (0 or 1). Events: `first` ms,
`heard` ms when the latest event was received, `timed` the `heard` whose way home was measured, `said` its status,
`reference` its buyFromOrderReference, `request` its request id, `duplicates`. Guests: `guests` digests of their
addresses (guests.py). `erased` ms when the order was erased: only counters and `<sink>:at` are left then, of the trail
what was handed on, and ORDER_DAYS end both. Sinks: `<sink>:at` revision handed on,
`<sink>:tries`, `<sink>:next` ms of the next, `<sink>:crashes` hand-ons that began and never ended, `<sink>:dead`
reason, `<sink>:dropped` revision that it is never to get; `hand` ms until the hand-on in progress must be done,
`handler` worker.

Fields of `ota:replay:<plan>`: `at` ms when it was made, `who`, `why`, `selected` in words, `rate` orders a second,
`sinks` (comma-separated; empty: fetch), `state` open, done or cancelled, `orders` in all, `paced` ms up to which the
rate has been used, `queued`, `waiting` and `passed` orders so far, `ended` ms, `left` orders when it was cancelled.

Fields of `ota:reconcile:<company>`: `next` ms of the next run, `not_before` ms for any run, `asks` by rejected events,
`heeded` those of them that a run has answered, `ask_after` ms before which they cause no other.

Fields of `ota:pulse:<company>`: `secret:<name>` ms when an event that carried it last came, `hour:<hours since 1970>`
events that were new in that hour.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

from app.ids import OrderKey

PREFIX: Final = "ota:"
DUE: Final = "ota:due"
DEAD: Final = "ota:dead"
DEAD_SINKS: Final = "ota:dead-sinks"
AUDIT: Final = "ota:audit"
REPLAYS: Final = "ota:replays"
EVENTS: Final = "ota:events"
ORDERS: Final = "ota:orders"
COUNTERS: Final = "ota:counters"
POOLS: Final = "ota:pools"
ALARMS: Final = "ota:alarms"
ALARMS_TURN: Final = "ota:alarms-turn"
ERASING: Final = "ota:erasing"
SALT: Final = "ota:salt"
SCHEMA: Final = "ota:schema"
PROBE: Final = "ota:probe"


def record(order: OrderKey) -> str:
    return f"ota:order:{order.member}"


def content(order: OrderKey) -> str:
    return f"ota:content:{order.member}"


def trail(order: OrderKey) -> str:
    return f"ota:trail:{order.member}"


def reference(text: str) -> str:
    """Return the key of a reference, the same for `cm-1` and `CM-1`; of fixed length, whatever a partner puts there."""
    return f"ota:reference:{sha256(text.strip().casefold().encode(errors='replace')).hexdigest()[:20]}"


def replay(plan_id: str) -> str:
    return f"ota:replay:{plan_id}"


def replay_todo(plan_id: str) -> str:
    return f"ota:replay-todo:{plan_id}"


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


def reconcile(company_id: str) -> str:
    return f"ota:reconcile:{company_id}"


def reconcile_marks(company_id: str) -> str:
    return f"ota:reconcile-marks:{company_id}"


def reconcile_watch(company_id: str) -> str:
    return f"ota:reconcile-watch:{company_id}"


def reconcile_lease(company_id: str) -> str:
    return f"ota:reconcile-lease:{company_id}"


def pulse(company_id: str) -> str:
    return f"ota:pulse:{company_id}"


def alarm(company_id: str) -> str:
    return f"ota:alarm:{company_id}"


def freed(key_id: str) -> str:
    return f"ota:freed:{key_id}"
