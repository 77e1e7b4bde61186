"""Every key in Redis: its name, type, lifetime, and who writes it.

| key | type | lifetime | written by |
|---|---|---|---|
| `ota:order:<company>:<order>` | hash: the record of one order (below) | none while pending, then ORDER_DAYS | all |
| `ota:content:<company>:<order>` | string: the order as fetched, zlib | as the record | store_fetch |
| `ota:history:<company>:<order>` | list: what happened to the order, the last 200 entries | as the record | all |
| `ota:seen:<digest>` | string: this event came already | DEDUP_DAYS | accept |
| `ota:events` | stream: the accepted events | trimmed to EVENT_DAYS | accept |
| `ota:audit` | stream: manual changes: who, what, when and why (app/audit.py) | trimmed to EVENT_DAYS | CLI |
| `ota:replays` | zset: plan of a replay -> ms when it was made | EVENT_DAYS | replay |
| `ota:replay:<plan>` | hash: what one replay is to do, and how far it is (below) | EVENT_DAYS | replay |
| `ota:replay-todo:<plan>` | list: orders to do, and ms of the latest event of each | as its plan | replay |
| `ota:due` | zset: order -> ms of its next dispatch; the only clock | until nothing is pending | all scripts |
| `ota:dead` | zset: order -> ms when its fetch became a dead letter | until requeued or discarded | all scripts |
| `ota:dead-deliveries` | zset: order + sink -> ms when the delivery became one | the same | complete_delivery |
| `ota:erasing` | zset: erased order -> ms, while its events may be stored | until they are deleted | erase |
| `ota:orders` | zset: order -> ms of the last change | ORDER_DAYS | accept, request_fetch, store_fetch |
| `ota:reference:<digest>` | set: orders with this reference, of either side | ORDER_DAYS and a week | store_fetch |
| `ota:claim:<worker>` | string: order and token (0 and sink) that a worker is busy with | 1 h at most | workers |
| `ota:schema` | string: version of the layout (redis.py) | none | all that write orders |
| `ota:pools` | hash: pool -> JSON heartbeat: process, workers, configuration | until the pool ends | pool |
| `ota:sinks` | hash: sink -> ms when a pool first declared it | until retired (app/deployment.py) | pool, workers |
| `ota:companies` | hash: company -> its slug and the id of its breaker | until retired | pool |
| `ota:undeclared` | hash: sink or company -> minutes in which no running pool had it | until retired | pool |
| `ota:probe:…` | the keys of the event that readiness records | deleted in the same transaction | recorder |
| `ota:reconcile:<company>` | hash: when the list of orders is read next (below) | none | reconcile |
| `ota:reconcile-checkpoints:<company>` | zset: highest row version of a page -> ms of the call | 10 min | reconcile |
| `ota:reconcile-watch:<company>` | zset: unsettled order -> ms when first seen so | until it settles | reconcile |
| `ota:reconcile-lease:<company>` | string: who reads the list of this company now | the run, some min | reconcile |
| `ota:alert:<company>` | string: an alert for rejected events was sent | five minutes | metrics |
| `ota:counters` | hash: metric and labels -> number | none | scripts, metrics |
| `ota:event-rate:<company>` | hash: last event by secret, events by hour (below) | four weeks | accept, alerts |
| `ota:alerts` | hash: alert, company or sink -> JSON of its state | until the next evaluation | alerts |
| `ota:alerts-turn` | string: a pool evaluates the alerts in this minute | a minute | alerts |
| `ota:limiter:<key id>` | hash: Retry-After and last release of one API key | one day | permit scripts |
| `ota:breaker:<key and company>` | hash: breaker of one company's calls with one key | one day | permit scripts |
| `ota:permits:<key id>` | zset: permit -> ms when its lease ends | as its leases | permit scripts |
| `ota:window:<key id>` | zset: request -> ms when it was made | five minutes | permit scripts |
| `ota:wakeups:<key id>` | list: one entry a released permit, for waiting workers | two seconds | permit scripts |

RQ's own keys (`rq:queue:live`, `rq:queue:backfill`, `rq:job:<id>`) are written as RQ writes them.

Fields of a record. Counters: `generation` settlements accepted and fetches requested, `started_generation` the
generation that the latest fetch saw when it started, `fetched_generation` the highest one whose fetch was stored,
`fencing_token` of the latest fetch, `stored_token` of the latest stored one. Now: `job` queue in which a job waits,
`queue` queue of this order's jobs, `enqueues` by the dispatcher since the last start, `enqueues_total` by the
dispatcher ever (no job id comes twice), `lease` ms until the worker must be done, `worker` that fetches, `fetch_at` ms
before which no fetch starts. Since the last stored fetch: `attempts`, `client_errors`, `rechecks` of an unsettled
answer, `deferrals`, `crashes`, `first_404_at` ms, `error` reason code, `http` status, `dead` reason code, `dead_at` ms,
`discarded_at` ms when it was last discarded by hand (then `fetched_generation` is `generation`). Content: `status`,
`digest`, `revision`, `fetched_at` ms, `wallets`, `tickets`, `coupons`, `manifest` (0 or 1). Events: `first_at` ms,
`last_event_at` ms when the latest event was received, `latency_recorded_for` the `last_event_at` whose latency was
counted, `last_event_status`, `reference` its buyFromOrderReference, `request_id`, `duplicates`. `erased_at` ms when the
order was erased: only counters and `<sink>:revision` are left then, of the history the deliveries, and ORDER_DAYS end
both. Sinks: `<sink>:revision` delivered (0: none yet; absent: the sink was declared after the latest fetch),
`<sink>:attempts`, `<sink>:next_at` ms of the next one, `<sink>:crashes` deliveries that started and never ended,
`<sink>:dead` reason, `<sink>:discarded` revision that it is never to get; `delivery_lease` ms until the delivery in
progress must be done, `delivery_worker`.

Fields of `ota:replay:<plan>`: `at` ms when it was made, `who`, `why`, `selected` as text, `rate` orders a second,
`sinks` (comma-separated; empty: fetch), `state` open, done or cancelled, `orders` in all, `paced` ms up to which the
rate has been used, `queued`, `waiting` and `passed` orders so far, `ended` ms, `left` orders when it was cancelled.

Fields of `ota:reconcile:<company>`: `next_run_at` ms, `not_before` ms before which no run starts, `triggers` counted by
rejected events, `triggers_handled` those that a run has handled, `next_trigger_at` ms before which they start no run.

Fields of `ota:event-rate:<company>`: `secret:<name>` ms when an event that carried it last came,
`hour:<hours since 1970>` events that were new in that hour.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

PREFIX: Final = "ota:"
DUE: Final = "ota:due"
DEAD: Final = "ota:dead"
DEAD_DELIVERIES: Final = "ota:dead-deliveries"
AUDIT: Final = "ota:audit"
REPLAYS: Final = "ota:replays"
EVENTS: Final = "ota:events"
ORDERS: Final = "ota:orders"
COUNTERS: Final = "ota:counters"
POOLS: Final = "ota:pools"
SINKS: Final = "ota:sinks"
COMPANIES: Final = "ota:companies"
UNDECLARED: Final = "ota:undeclared"
ALERTS: Final = "ota:alerts"
ALERTS_TURN: Final = "ota:alerts-turn"
ERASING: Final = "ota:erasing"
SCHEMA: Final = "ota:schema"
PROBE: Final = "ota:probe:"
"""Before the keys of the event that readiness records."""
RECORDS: Final = "ota:order:"
"""Before company and order in the key of a record."""


def reference(text: str) -> str:
    """Return the key of a reference, the same for `cm-1` and `CM-1`; of fixed length, whatever a partner puts there."""
    return f"ota:reference:{sha256(text.strip().casefold().encode(errors='replace')).hexdigest()[:20]}"


# Keys that end with an order (OrderKey), then those that end with an id, as the table above names it.
record: Final = "ota:order:{0.member}".format
content: Final = "ota:content:{0.member}".format
history: Final = "ota:history:{0.member}".format
replay: Final = "ota:replay:{}".format
replay_todo: Final = "ota:replay-todo:{}".format
breaker: Final = "ota:breaker:{}".format
window: Final = "ota:window:{}".format
reconcile: Final = "ota:reconcile:{}".format
reconcile_checkpoints: Final = "ota:reconcile-checkpoints:{}".format
reconcile_watch: Final = "ota:reconcile-watch:{}".format
reconcile_lease: Final = "ota:reconcile-lease:{}".format
event_rate: Final = "ota:event-rate:{}".format
alert: Final = "ota:alert:{}".format
wakeups: Final = "ota:wakeups:{}".format
