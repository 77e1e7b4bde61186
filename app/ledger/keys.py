"""Every key in Redis: its name, type, lifetime, and who writes it. `ota` stands for KEY_PREFIX.

| key | type | lifetime | written by |
|---|---|---|---|
| `ota:order:<company>:<order>` | hash: the record of one order (below) | none while pending, then ORDER_DAYS | all |
| `ota:content:<company>:<order>` | string: the order as fetched (content.py) | as the record | store_fetch |
| `ota:revisions:<company>:<order>` | hash: the revisions before the latest (below) | as the record | store_fetch |
| `ota:history:<company>:<order>` | list: what happened to the order, the last 200 entries | as the record | all |
| `ota:seen:<digest>` | string: this event came already | DEDUP_DAYS | accept |
| `ota:events` | stream: the accepted events | trimmed to EVENT_DAYS | accept |
| `ota:audit` | stream: manual changes: who, what, when and why (app/audit.py) | trimmed to EVENT_DAYS | CLI |
| `ota:replays` | zset: plan of a replay -> ms when it was made | EVENT_DAYS | replay |
| `ota:replay:<plan>` | hash: what one replay is to do, and how far it is (below) | EVENT_DAYS | replay |
| `ota:replay-todo:<plan>` | list: orders to do, and ms of the latest event of each | as its plan | replay |
| `ota:due` | zset: order -> ms of its next fetch; the clock of fetches | until nothing is pending | all scripts |
| `ota:deliveries:<sink>` | zset: order -> ms of its next delivery; a sink's clock | until it has it | all scripts |
| `ota:dead` | zset: order -> ms when its fetch became a dead letter | until requeued or discarded | all scripts |
| `ota:dead-deliveries` | zset: order + sink -> ms when the delivery became one | the same | complete_delivery |
| `ota:dead-by:<sink>|<reason>` | zset: the entries of one kind in these two (sink "": fetches) | the same | the same |
| `ota:dead-kinds` | set: the kinds that have entries | none | the same |
| `ota:erasing` | zset: erased order -> ms, while its events may be stored | until they are deleted | erase |
| `ota:orders` | zset: order -> ms of the last change | ORDER_DAYS | accept, request_fetch, store_fetch |
| `ota:feed` | zset: order -> position of its latest revision, about the ms when it came | as the record | store_fetch |
| `ota:feed-position` | string: the highest position ever given | none | store_fetch |
| `ota:feed-cursors` | zset: consumer -> position up to which it has acknowledged the feed | none | api, keys |
| `ota:api-keys` | hash: short id of a key of the API -> JSON: name, scopes, digest (app/api/keys.py) | none | keys |
| `ota:api-keys-used` | hash: short id -> ms of its last use, to the minute | none | api |
| `ota:api-requests:<id>:<minute>` | string: requests of one key in this minute | two minutes | api |
| `ota:reference:<digest>` | set: orders with this reference (OrderKey.packed) | ORDER_DAYS and a week | store_fetch |
| `ota:claim:<worker>` | string: order and token (0 and sink) that a worker is busy with | 1 h at most | workers |
| `ota:schema` | string: version of the layout (redis.py) | none | all that write orders |
| `ota:pools` | hash: pool -> JSON heartbeat: process, workers, configuration | until the pool ends | pool |
| `ota:sinks` | hash: sink -> ms when a pool first declared it | until retired (app/deployment.py) | pool, workers |
| `ota:companies` | hash: company -> slug, id of its breaker, ms since when, path, key id | until retired | pool |
| `ota:sink-failing:<sink>` | hash: since when every delivery fails (below) | until one succeeds | workers |
| `ota:sink-breaker:<sink>` | hash: its destination is away (below) | until an attempt ends otherwise | workers |
| `ota:sinks-disabled` | hash: sink -> ms and reason, while nothing is delivered | until enabled | workers, CLI |
| `ota:undeclared` | hash: sink or company -> evaluations in which no running pool had it | until retired | pool |
| `ota:probe:…` | the keys of the event that readiness records | deleted in the same transaction | recorder |
| `ota:reconcile:<company>` | hash: when the list of orders is read next (below) | none | reconcile |
| `ota:reconcile-checkpoints:<company>` | zset: row version to read from -> ms listed | until superseded | reconcile |
| `ota:reconcile-anchors:<company>` | set: orders of its last rows, to be seen again | until the next page | reconcile |
| `ota:reconcile-differing:<company>` | hash: order that differs for good -> row | ORDER_DAYS | reconcile |
| `ota:reconcile-watch:<company>` | zset: unsettled order -> ms when first seen so | until it settles | reconcile |
| `ota:reconcile-lease:<company>` | string: who reads the list of this company now | the run, some min | reconcile |
| `ota:subscription:<company>` | hash: how the subscription is, and its repair (below) | none | subscriptions |
| `ota:subscription-turn:<company>` | string: a pool has checked it | SUBSCRIPTION_CHECK_EVERY | subscriptions |
| `ota:alert:<company>` | string: an alert for rejected events was sent | five minutes | metrics |
| `ota:job:<layout>:<queue>` | hash: the latest job, of which the next is a copy (push_job) | none | scripts |
| `ota:counters` | hash: metric and labels -> number | none | scripts, metrics |
| `ota:event-rate:<company>` | hash: last event by secret, events by hour (below) | four weeks | accept, alerts |
| `ota:latency:<company>:<hour>` | hash: upper bound in ms or `inf` -> fetches (below) | 49 h | store_fetch |
| `ota:alerts` | hash: alert, company or sink -> JSON of its state | until the next evaluation | alerts |
| `ota:alerts-turn` | string: a pool has evaluated the alerts | 19 s | alerts |
| `ota:limiter:<key id>` | hash: Retry-After and last release of one API key | one day | permit scripts |
| `ota:breaker:<key and company>` | hash: breaker of a company's calls with a key (below) | two days | permit scripts |
| `ota:failing:<key and company>` | set: orders that failed since one was answered | one day | permit scripts |
| `ota:unanswered:<company>` | zset: dead order -> ms, while no other is answered | until one is | all scripts |
| `ota:permits:<key id>` | zset: permit -> ms when its lease ends | as its leases | permit scripts |
| `ota:window:<key id>` | zset: request -> ms when it was made | five minutes | permit scripts |
| `ota:waiting:<key id>` | zset: permit and breaker -> ms until which its worker waits | PERMIT_WAIT | permit scripts |
| `ota:granted:<permit>` | list: one entry, for the worker that waits for it | two seconds | permit scripts |

RQ's own keys (`rq:queue:ota-live`, `rq:queue:ota-backfill`, `rq:queue:ota-sink-<sink>`, `rq:job:ota-<id>`) are written
as RQ writes them.

Fields of a record. Counters: `generation` settlements accepted and fetches requested, `started_generation` the
generation that the latest fetch saw when it started, `fetched_generation` the highest one whose fetch was stored,
`fencing_token` of the latest fetch, `stored_token` of the latest stored one. Now: `job` queue in which a job waits,
`queue` queue of this order's jobs
(absent: live), `enqueues` by the dispatcher since the last start, `enqueues_total` by the
dispatcher ever (no job id comes twice), `lease` ms until the worker must be done, `worker` that fetches, `fetch_at` ms
before which no fetch starts. Since the last stored fetch: `attempts`, `client_errors`, `rechecks` of an unsettled
answer, `deferrals`, `crashes`, `first_404_at` ms, `failing_since` ms of the first failure, `error` reason code, `http`
status, `dead` reason code, `dead_at` ms, `discarded_at` ms when it was last discarded by hand (then
`fetched_generation` is `generation`). Content: `status`, `digest`, `revision`, `fetched_at` ms, `wallets`, `tickets`,
`coupons`, `manifest` (0 or 1). Events: `first_at` ms,
`first_event` id of the first event, while its entry of the history is in the stream alone: until another one comes,
`last_event_at` ms when the latest event was received, `latency_recorded_for` the `last_event_at` whose latency was
counted, `last_event_status`, `reference` its buyFromOrderReference, `request_id` and `traceparent` of its POST (without
an event `request_id` of the first request; after the traceparent, separated by blanks, those of up to seven earlier
POSTs whose events the same job serves), `duplicates`. `erased_at` ms when the order was erased: only counters and
`<sink>:revision` are left then, of the history the deliveries, and ORDER_DAYS end both. Sinks: `<sink>:revision`
delivered (0: none yet; absent: the sink was declared after the latest fetch); while it is to get a later one
`<sink>:job` 1 while a job waits, `<sink>:enqueues` by the dispatcher since the last start, `<sink>:lease` ms until the
delivery in progress must be done, `<sink>:worker` that makes it, `<sink>:attempts`, `<sink>:next_at` ms before which
none starts, `<sink>:crashes` deliveries that started and never ended, `<sink>:error` type and place of what it raised
last, `<sink>:postponed` ms when it first raised Retry, `<sink>:dead` reason; `<sink>:discarded` revision that it is
never to get. Reconcile: `listed_row` digest of the row in the order list for which it requested the last fetch.

Fields of `ota:revisions:…`, which only an order has whose content changed: `<revision>` MessagePack of when it was
fetched last, its status, digest and counts, of the last 100; `<revision>:content` as it was stored, of the last
REVISIONS_KEPT. It ends ORDER_DAYS after the order was last complete, also where the order is pending again by then.

Fields of `ota:sink-failing:<sink>`: `since` ms of the first failure after which no delivery succeeded; since then
`orders` whose first attempt failed, `order` the latest of them, `attempts` that failed; `error` type and place of the
last one.

Fields of `ota:sink-breaker:<sink>`: `failures` attempts in a row whose destination was away. After five of them
`opened_at` ms, `open_until` ms, `open_ms` for how long it opened last, `reason` of the last one; `probe` worker that
tries whether it is back, `probe_until` ms.

Fields of `ota:replay:<plan>`: `at` ms when it was made, `who`, `why`, `selected` as text, `rate` orders a second,
`sinks` (comma-separated; empty: fetch), `state` draft, open, done or cancelled, `orders` in all, `paced` ms up to which
the rate has been used, `queued`, `waiting` and `passed` orders so far, `ended` ms, `left` orders when it was cancelled.
`fed_by` ops if the ops page feeds it, else its command does. `kind` dead if it requeues dead letters: its list then has
orders, ms when each became a dead letter, and sinks. While it is a draft, `query` has their filter as JSON, and `left`
how many they are.

Fields of `ota:reconcile:<company>`: `next_run_at` ms, `not_before` ms before which no run starts, `triggers` counted by
rejected events, `triggers_handled` those that a run has handled, `next_trigger_at` ms before which they start no run.

Fields of `ota:subscription:<company>`: `state` as a pool saw it last (app/subscriptions.py), `failing` reason code of
the check that upstream did not answer, "" if it answered the last one, `repaired_at` ms when a repair began, until the
subscription works an hour later.

Fields of `ota:breaker:<key and company>`: `answered_at` ms when the latest good call began. While it is open:
`open_until` ms, `open_ms` for how long it opened, `opened_at` ms when it did so first, `reason` and `http` of the
failure that opened it last, `probe` permit of the probe, `probe_until` ms.

Fields of `ota:event-rate:<company>`: `secret:<name>` ms when an event that carried it last came,
`hour:<hours since 1970>` events that were new in that hour.

`ota:latency:…` has, for each company and hour since 1970, how long after its latest event an order was fetched: the
histogram of the counters, for the hour in which the fetch was stored.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

DEFAULT_PREFIX: Final = "ota"


class Keys:
    """The names of all keys of one deployment, which begin with its prefix (KEY_PREFIX)."""

    def __init__(self, prefix: str) -> None:
        key = f"{prefix}:{{}}".format
        self.prefix: Final = key("")
        self.rq_prefix: Final = f"{prefix}-"
        """Before RQ's names of our queues and jobs."""
        self.due: Final = key("due")
        self.dead: Final = key("dead")
        self.dead_deliveries: Final = key("dead-deliveries")
        self.dead_by: Final = key("dead-by:{}").format
        self.dead_kinds: Final = key("dead-kinds")
        self.audit: Final = key("audit")
        self.replays: Final = key("replays")
        self.events: Final = key("events")
        self.orders: Final = key("orders")
        self.feed: Final = key("feed")
        self.feed_position: Final = key("feed-position")
        self.feed_cursors: Final = key("feed-cursors")
        self.api_keys: Final = key("api-keys")
        self.api_keys_used: Final = key("api-keys-used")
        self.counters: Final = key("counters")
        self.pools: Final = key("pools")
        self.sinks: Final = key("sinks")
        self.companies: Final = key("companies")
        self.undeclared: Final = key("undeclared")
        self.deliveries: Final = key("deliveries:{}").format
        self.sink_failing: Final = key("sink-failing:{}").format
        self.sink_breaker: Final = key("sink-breaker:{}").format
        self.sinks_disabled: Final = key("sinks-disabled")
        self.alerts: Final = key("alerts")
        self.alerts_turn: Final = key("alerts-turn")
        self.erasing: Final = key("erasing")
        self.schema: Final = key("schema")
        self.probe: Final = key("probe:")
        """Before the keys of the event that readiness records."""
        self.records: Final = key("order:")
        """Before company and order in the key of a record."""
        self.reference_prefix: Final = key("reference:")
        # Keys that end with an order (OrderKey), then those that end with an id, as the table above names it.
        self.record: Final = key("order:{0.member}").format
        self.content: Final = key("content:{0.member}").format
        self.revisions: Final = key("revisions:{0.member}").format
        self.history: Final = key("history:{0.member}").format
        self.replay: Final = key("replay:{}").format
        self.replay_todo: Final = key("replay-todo:{}").format
        self.breaker: Final = key("breaker:{}").format
        self.window: Final = key("window:{}").format
        self.reconcile: Final = key("reconcile:{}").format
        self.reconcile_checkpoints: Final = key("reconcile-checkpoints:{}").format
        self.reconcile_anchors: Final = key("reconcile-anchors:{}").format
        self.reconcile_differing: Final = key("reconcile-differing:{}").format
        self.reconcile_watch: Final = key("reconcile-watch:{}").format
        self.reconcile_lease: Final = key("reconcile-lease:{}").format
        self.subscription: Final = key("subscription:{}").format
        self.subscription_turn: Final = key("subscription-turn:{}").format
        self.event_rate: Final = key("event-rate:{}").format
        self.latency: Final = key("latency:{}:{}").format
        self.alert: Final = key("alert:{}").format
        self.api_requests: Final = key("api-requests:{}:{}").format
        self.granted: Final = key("granted:{}").format

    def reference(self, text: str) -> str:
        """Return the key of a reference, the same for `cm-1` and `CM-1`; of fixed length, whatever a partner writes."""
        digest = sha256(text.strip().casefold().encode(errors="replace")).hexdigest()
        return f"{self.reference_prefix}{digest[:20]}"
