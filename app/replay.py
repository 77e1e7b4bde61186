"""Replays: which orders to fetch or deliver again, and the plans that feed them to the backfill queue at a rate.

A plan is a hash and a list of the orders still to do, or of the dead letters still to requeue. One script takes orders
off the list and requests their fetches, so a feeder may be killed at any instruction and another continues. Two feeders
share the rate and never an order.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, Final, Literal

import msgspec
from redis.client import Pipeline

from app import audit
from app.audit import AuditEntry
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.dead_letters import DeadLetters, DeadQuery
from app.ledger.events import EventLog, EventQuery, StoredEvent
from app.ledger.orders import read_fields
from app.ledger.pages import Page, scored_page
from app.ledger.redis import Redis, Scored, Script, oldest_first, server_time
from app.ledger.rq_jobs import JobTemplate
from app.settings import Settings
from app.times import from_ms, to_ms

MOST_A_STEP: Final = 50
"""Orders per step, about a millisecond of Redis: live traffic is served in between."""

GET_ORDER: Final = 0.25
"""Seconds that a getOrder is assumed to take, for the default rate. With a faster upstream, permits stay unused."""

SHARE: Final = 0.2
"""Share of UPSTREAM_REQUESTS_PER_5_MIN that replays take by default; the rest is for live orders."""

WINDOW: Final = 300
"""Seconds for which UPSTREAM_REQUESTS_PER_5_MIN counts."""

_SHORTEST_WAIT: Final = 10
"""ms between two steps: at a high rate each takes several orders."""

_LONGEST_WAIT: Final = 1000
"""ms between two steps at a low rate, so that a cancelled plan ends its feeders soon."""

_WRITTEN_AT_ONCE: Final = 1000
_DRAFT: Final = policy.DAY
"""How long the list of an unfinished plan is kept: its writer died or sleeps."""

State = Literal["draft", "open", "done", "cancelled"]
Feeder = Literal["command", "ops"]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One plan: fetch the orders, or deliver their stored revision to `sinks` without a fetch.

    A plan of the `kind` dead requeues dead letters: each fetch or delivery that was dead when it was made, and is the
    same dead letter still. It is a `draft` until its list is written. `fed_by` names what feeds it: the command that
    made it, for as long as it runs, or the ops page.

    `rate` is in orders a second; `who` and `why` are a person's own words. Of the `orders`, `left` are still to do, or
    were when it was cancelled. `queued` got a new job or delivery, `waiting` had one already, `passed` needed none:
    their copy is newer by now, nothing is stored to deliver, or the dead letter is gone.
    """

    id: str
    at: datetime
    who: str
    why: str
    selected: str
    rate: float
    sinks: tuple[str, ...]
    state: State
    kind: Literal["events", "dead"] = "events"
    fed_by: Feeder = "command"
    orders: int
    left: int
    queued: int = 0
    waiting: int = 0
    passed: int = 0
    ended: datetime | None = None

    @property
    def is_over(self) -> bool:
        return self.state in {"done", "cancelled"}


class Step(msgspec.Struct, frozen=True):
    """The result of a step: `unknown` if the plan does not exist (any more); `wait` ms until the next order."""

    state: State | Literal["unknown"]
    left: int
    wait: int


class Selection(EventQuery, frozen=True, kw_only=True):
    """Which orders, by their events; all conditions must hold.

    `event_ids` and `orders` together name what is searched; without them all events are. `dead`: only orders with a
    dead letter.
    """

    event_ids: tuple[str, ...] = ()
    orders: tuple[OrderKey, ...] = ()
    dead: bool = False

    def words(self) -> str:
        """Return the selection on one line, for the audit and for lists of plans."""
        named = [f"{len(self.event_ids)} event ids"] * bool(self.event_ids)
        named += [f"{len(self.orders)} orders"] * bool(self.orders)
        conditions = {
            "company": self.company_id,
            "status": self.status,
            "outcome": self.outcome,
            "since": self.since and self.since.isoformat(timespec="seconds"),
            "until": self.until and self.until.isoformat(timespec="seconds"),
        }
        named += [f"{name}={value}" for name, value in conditions.items() if value]
        return " ".join(named + ["dead"] * self.dead)


class Selected(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; `orders`: member -> ms of its last selected event (0: named, without one), oldest first.

    `missing` are the event ids that are not stored (any more).
    """

    events: int
    orders: dict[str, int]
    missing: tuple[str, ...] = ()


class Plans:
    """The plans of replays; `clock` (ms since 1970) replaces the time of the Redis server in tests."""

    def __init__(self, redis: Redis, *, event_days: int, clock: Callable[[], int] | None = None) -> None:
        self._redis = redis
        self._keep = event_days * policy.DAY
        self._template = JobTemplate(redis.names)
        self._step = Script(redis, "replay_step", clock)
        self._now = clock or (lambda: server_time(redis))

    def file(
        self,
        orders: Iterable[tuple[str, int | None]],
        *,
        rate: float,
        sinks: tuple[str, ...] = (),
        selected: str = "",
        who: str = "",
        why: str = "",
    ) -> Plan:
        """Store a new plan with its audit entry, and return it; nothing is fed yet.

        `orders`: member and ms of its last event, None to fetch it whatever is stored. A writer that dies here leaves
        only a list that expires after a day.
        """
        plan_id = self.new_id()
        todo = self._redis.names.replay_todo(plan_id)
        count = self._write(todo, (f"{member} {'-' if event_at is None else event_at}" for member, event_at in orders))
        texts = {"who": who, "why": why, "selected": selected}
        return self._store(plan_id, "replay", count, texts, {"state": "open", "rate": rate, "sinks": ",".join(sinks)})

    def draft(
        self, plan_id: str, query: DeadQuery, *, count: int, rate: float, selected: str, who: str, why: str
    ) -> Plan:
        """Store a plan of these dead letters with its audit entry, and return it; the ops page makes and feeds it.

        If there is a plan with this id, it is returned: a form that is sent twice makes one. `count`: how many letters
        they are about. Those that become dead after `query.until` are not among them.
        """
        texts = {"who": who, "why": why, "selected": selected}
        fields = {"state": "draft", "kind": "dead", "query": msgspec.json.encode(query), "left": count}
        return self._store(plan_id, "requeue", count, texts, fields | {"rate": rate, "sinks": "", "fed_by": "ops"})

    def make(self, plan: Plan) -> None:
        """Write the list of a draft, and open it; raises what redis-py raises.

        Each maker writes a list of its own, and the first one that is done opens the plan with it. The list of a maker
        that dies expires after a day.
        """
        plan_key, todo = self._redis.names.replay(plan.id), self._redis.names.replay_todo(plan.id)
        query: Any = self._redis.hget(plan_key, "query")
        if query is None:
            return
        own = self._redis.names.replay_todo(f"{plan.id}-{secrets.token_hex(3)}")
        letters = DeadLetters(self._redis).entries(msgspec.json.decode(query, type=DeadQuery))
        named = ((member.partition(" "), ms) for member, ms in letters)
        count = self._write(own, (f"{order} {ms} {sink}" for (order, _, sink), ms in named))
        now = self._now()

        def open_plan(pipe: Pipeline) -> None:
            # Watched: another maker may be done, or the plan be cancelled, between this read and the transaction.
            state: Any = pipe.hget(plan_key, "state")
            pipe.multi()
            if state != b"draft":
                pipe.delete(own)
                return
            if count:
                pipe.rename(own, todo)
                pipe.pexpire(todo, self._keep)
            pipe.hset(plan_key, mapping={"state": "open", "orders": count, "paced": now})
            pipe.hdel(plan_key, "left", "query")

        self._redis.transaction(open_plan, plan_key)

    def of(self, plan_id: str) -> Plan | None:
        """Return a plan, None if it does not exist (any more)."""
        return next(self._read([plan_id]), None)

    def ids(self) -> list[str]:
        """Return the ids of the plans of the last EVENT_DAYS, newest first."""
        found: Any = self._redis.zrevrange(self._redis.names.replays, 0, -1)
        return [plan_id.decode() for plan_id in found]

    def newest_first(self) -> Iterator[Plan]:
        """Return the plans of the last EVENT_DAYS."""
        return self._read(self.ids())

    def of_ops(self) -> list[Plan]:
        """Return the plans that the ops page is to make or to feed, newest first."""
        plan_ids = self.ids()
        with self._redis.pipeline(transaction=False) as pipe:
            for plan_id in plan_ids:
                pipe.hmget(self._redis.names.replay(plan_id), "fed_by", "state")
            answers = pipe.execute()
        to_do = ([b"ops", b"draft"], [b"ops", b"open"])
        return list(self._read([one for one, answer in zip(plan_ids, answers, strict=True) if answer in to_do]))

    def run(self, plan: Plan) -> Iterator[int]:
        """Make the plan if it is a draft, and feed it until it ends; yield after each step how many orders are left.

        Raises OtherSchema, and what redis-py raises; another run goes on where this one ended.
        """
        if plan.state == "draft":
            self.make(plan)
        while True:
            fed = self.feed(plan)
            yield fed.left
            if fed.state != "open":
                return
            time.sleep(min(max(fed.wait, _SHORTEST_WAIT), _LONGEST_WAIT) / 1000)

    def page(
        self,
        after: str | None = None,
        limit: int = 50,
        *,
        state: State | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Page[Plan]:
        """Return a page of these plans, of one state or of all, made between two times; raises UnknownCursor."""

        def matching(entries: Sequence[Scored]) -> Iterator[Plan | None]:
            plans = {plan.id: plan for plan in self._read([plan_id for plan_id, _ in entries])}
            found = (plans.get(plan_id) for plan_id, _ in entries)
            return (plan if plan is not None and state in (None, plan.state) else None for plan in found)

        zsets = [self._redis.names.replays]
        return scored_page(self._redis, zsets, matching, after, limit, since=since, until=until, newest_first=True)

    def feed(self, plan: Plan) -> Step:
        """Take what the rate allows off the plan and request fetches or deliveries, in one step; raises OtherSchema."""
        state, left, wait = self._step(
            plan=plan.id,
            limit=MOST_A_STEP,
            deliver_to=list(plan.sinks),
            grace=policy.GRACE,
            job=self._template.fields(),
        )
        return Step(state.decode(), left, wait)

    def resume(
        self, plan: Plan, who: str, why: str = "", *, rate: float | None = None, fed_by: Feeder | None = None
    ) -> Plan:
        """Write to the audit who continues the plan; from now on at `rate` and `fed_by` this, if they are given."""
        changed = {"rate": rate, "fed_by": fed_by}
        return self._change(plan, {name: to for name, to in changed.items() if to is not None}, "resume", who, why)

    def cancel(self, plan: Plan, who: str, why: str) -> Plan:
        """End the plan; queued orders stay queued. One that has ended meanwhile stays as it is."""
        return self._change(plan, {"state": "cancelled", "ended": self._now()}, "cancel", who, why)

    def _change(self, plan: Plan, fields: dict[Any, Any], what: str, who: str, why: str) -> Plan:
        plan_key, todo = self._redis.names.replay(plan.id), self._redis.names.replay_todo(plan.id)

        def change(pipe: Pipeline) -> None:
            # Watched: a feeder may end the plan between this read and the transaction.
            state: Any = pipe.hget(plan_key, "state")
            left: Any = plan.left if state == b"draft" else pipe.llen(todo)
            pipe.multi()
            if state not in (b"draft", b"open"):
                return
            if what == "cancel":
                fields["left"] = left
                pipe.delete(todo)
                pipe.hdel(plan_key, "query")
            if fields:
                pipe.hset(plan_key, mapping=fields)
            entry = AuditEntry(what=what, plan=plan.id, who=who, why=why, selected=plan.selected, orders=left)
            audit.append(pipe, self._redis.names, entry)

        self._redis.transaction(change, plan_key, todo)
        (changed,) = self._read([plan.id])
        return changed

    def new_id(self) -> str:
        """Return the id for a plan, which no other one has."""
        names = self._redis.names
        while True:
            plan_id = secrets.token_hex(3)
            if not self._redis.exists(names.replay(plan_id), names.replay_todo(plan_id)):
                return plan_id

    def _write(self, todo: str, entries: Iterable[str]) -> int:
        """Write the list of a plan that is not open yet; return its length."""
        left = iter(entries)
        count = 0
        while chunk := list(islice(left, _WRITTEN_AT_ONCE)):
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.rpush(todo, *chunk)
                pipe.pexpire(todo, _DRAFT)
                pipe.execute()
            count += len(chunk)
        return count

    def _store(
        self,
        plan_id: str,
        what: Literal["replay", "requeue"],
        count: int,
        texts: dict[str, str],
        fields: dict[str, Any],
    ) -> Plan:
        """Store a new plan and its audit entry; its list, if it is written, lives as long."""
        names, now = self._redis.names, self._now()
        entry = AuditEntry(what=what, plan=plan_id, orders=count, **texts)
        whole: dict[Any, Any] = {"at": now, "paced": now, "orders": count} | texts | fields

        def store(pipe: Pipeline) -> None:
            is_there: Any = pipe.exists(names.replay(plan_id))
            pipe.multi()
            if is_there:
                return
            pipe.hset(names.replay(plan_id), mapping=whole)
            pipe.pexpire(names.replay(plan_id), self._keep)
            pipe.pexpire(names.replay_todo(plan_id), self._keep)
            pipe.zadd(names.replays, {plan_id: now})
            audit.append(pipe, names, entry)

        self._redis.transaction(store, names.replay(plan_id))
        (stored,) = self._read([plan_id])
        return stored

    def _read(self, plan_ids: list[str]) -> Iterator[Plan]:
        with self._redis.pipeline(transaction=False) as pipe:
            for plan_id in plan_ids:
                pipe.hgetall(self._redis.names.replay(plan_id))
                pipe.llen(self._redis.names.replay_todo(plan_id))
            answers = pipe.execute()
        for plan_id, fields, left in zip(plan_ids, answers[::2], answers[1::2], strict=True):
            if fields:
                yield _plan(plan_id, fields, left)


def default_rate(settings: Settings) -> float:
    """Return the orders a second that the backfill's permits and its share of the window allow."""
    by_permits = settings.backfill_concurrency / GET_ORDER
    by_window = SHARE * settings.upstream_requests_per_5_min / WINDOW
    return min(by_permits, by_window)


def select(redis: Redis, selection: Selection, step: Callable[[int], None]) -> Selected:
    """Find the orders of a selection; `step` gets the number of events or orders of each page."""
    log = EventLog(redis)
    of_events = any((selection.status, selection.outcome, selection.since, selection.until))
    dead = _dead(redis, selection.company_id, step) if selection.dead else None
    missing: tuple[str, ...] = ()
    if selection.event_ids or selection.orders:
        of_orders = [event.id for order in selection.orders for event in log.of_order(order)]
        stored = log.of_ids([*selection.event_ids, *of_orders])
        ids = {event.id for event in stored}
        missing = tuple(one for one in selection.event_ids if one not in ids)
        events: Iterable[StoredEvent] = filter(selection.matches, stored)
    elif dead is not None and not of_events:
        return Selected(events=0, orders=dict.fromkeys(dead, 0))
    else:
        events = log.oldest_first(selection, step)
    orders: dict[str, int] = {}
    count = 0
    for event in events:
        member = event.key.member
        if dead is None or member in dead:
            count += 1
            orders[member] = to_ms(event.at)
    if not of_events:
        # Its events may be older than EVENT_DAYS, or reconciling found it.
        for order in selection.orders:
            if selection.company_id in (None, order.company_id) and (dead is None or order.member in dead):
                orders.setdefault(order.member, 0)
    return Selected(events=count, orders=orders, missing=missing)


def needless(redis: Redis, orders: Mapping[str, int], *, deliver: bool) -> set[str]:
    """Return the members (-> ms of the last event) that a replay would pass over.

    To fetch: those without a pending fetch that were fetched after their event. To deliver: those without content.
    """
    names = ("generation", "fetched_generation", "fetched_at", "revision")
    found: set[str] = set()
    records = read_fields(redis, map(OrderKey.of, orders), *names)
    for (member, event_at), values in zip(orders.items(), records, strict=True):
        generation, fetched_generation, fetched_at, revision = (int(value or 0) for value in values)
        is_new = fetched_at > event_at and fetched_generation >= generation
        if not (generation and revision) if deliver else is_new:
            found.add(member)
    return found


def _dead(redis: Redis, company_id: str | None, step: Callable[[int], None]) -> dict[str, int]:
    """Return the members with a dead letter, oldest first."""
    found: dict[str, int] = {}
    # New dead letters come at the end of the zset, and the walk ends all the same.
    for page in oldest_first(redis, redis.names.dead):
        found |= {member: at for member, at in page if company_id is None or member.startswith(f"{company_id}:")}
        step(len(page))
    return found


def _plan(plan_id: str, fields: Mapping[bytes, bytes], left: int) -> Plan:
    """Return the plan in its hash; `left` is the length of its list."""
    texts = {name.decode(): value.decode() for name, value in fields.items()}
    times = {name: from_ms(int(texts[name])) for name in ("at", "ended") if name in texts}
    sinks = [*filter(None, texts["sinks"].split(","))]
    return msgspec.convert({"id": plan_id, "left": left} | texts | times | {"sinks": sinks}, Plan, strict=False)
