"""Replays: which orders to fetch or deliver again, and the plans that feed them to the backfill queue at a rate.

A plan is a hash and a list of the orders still to do. One script takes orders off the list and requests their fetches,
so a feeder may be killed at any instruction and another continues. Two feeders share the rate and never an order.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from typing import Any, Final, Literal

import msgspec
from redis import Redis
from redis.client import Pipeline

from app import audit
from app.audit import AuditEntry
from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.events import EventLog, EventQuery, StoredEvent
from app.ledger.orders import read_fields
from app.ledger.redis import Script, oldest_first, server_time, stream_pages
from app.ledger.rq_jobs import JobTemplate
from app.times import from_ms, to_ms

MOST_A_STEP: Final = 50
"""Orders per step, about a millisecond of Redis: live traffic is served in between."""

PAGE: Final = 500
"""Events a call: fewer calls than a list for people needs, and Redis still serves others after a millisecond."""

_WRITTEN_AT_ONCE: Final = 1000
_DRAFT: Final = policy.DAY
"""How long the list of an unfinished plan is kept: its writer died or sleeps."""

_LETTERS: Final = "23456789abcdefghjkmnpqrstvwxyz"
"""Without letters and digits that look alike."""

State = Literal["open", "done", "cancelled"]


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan is to do: fetch the orders, or deliver their stored revision to `sinks` without a fetch.

    `rate` is in orders a second; `who` and `why` are a person's own words.
    """

    who: str
    why: str
    selected: str
    rate: float
    sinks: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One plan. Of its `orders`, `left` are still to do, or were when it was cancelled.

    `queued` got a new job or delivery, `waiting` had one already, `passed` needed none: their copy is newer by now, or
    nothing is stored to deliver.
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
    """The result of a step: `unknown` if the plan does not exist (any more); `wait` ms until the next order."""

    state: State | Literal["unknown"]
    left: int
    wait: int


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which events, and so which orders; all conditions must hold.

    `event_ids` and `orders` together name what is searched; without them all events are. `since` and `until` are aware
    and inclusive, `status` in any case. `dead`: only orders with a dead letter.
    """

    event_ids: tuple[str, ...] = ()
    orders: tuple[OrderKey, ...] = ()
    company_id: str | None = None
    status: str | None = None
    outcome: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    dead: bool = False

    @property
    def named(self) -> bool:
        return bool(self.event_ids or self.orders)

    @property
    def has_event_conditions(self) -> bool:
        """Return whether there is a condition that only an event can meet."""
        return any((self.status, self.outcome, self.since, self.until))

    def matches(self, event: StoredEvent) -> bool:
        """Return whether an event meets the conditions, except `dead`."""
        query = EventQuery(company_id=self.company_id, status=self.status, outcome=self.outcome)
        return (
            query.matches(event)
            and (self.since is None or event.at >= self.since)
            and (self.until is None or event.at <= self.until)
        )

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
        self._template = JobTemplate()
        self._step = Script(redis, "replay_step", clock)
        self._now = clock or (lambda: server_time(redis))

    def file(self, draft: Draft, orders: Iterable[tuple[str, int | None]]) -> Plan:
        """Store a new plan with its audit entry, and return it; nothing is fed yet.

        `orders`: member and ms of its last event, None to fetch it whatever is stored. A writer that dies here leaves
        only a list that expires after a day.
        """
        plan_id = self._free_id()
        todo = keys.replay_todo(plan_id)
        left = iter(orders)
        count = 0
        while chunk := list(islice(left, _WRITTEN_AT_ONCE)):
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.rpush(todo, *(f"{member} {'-' if event_at is None else event_at}" for member, event_at in chunk))
                pipe.pexpire(todo, _DRAFT)
                pipe.execute()
            count += len(chunk)
        now = self._now()
        fields: dict[Any, Any] = {
            "at": now,
            "who": draft.who,
            "why": draft.why,
            "selected": draft.selected,
            "rate": draft.rate,
            "sinks": ",".join(draft.sinks),
            "state": "open",
            "orders": count,
            "paced": now,
        }
        entry = AuditEntry(
            what="replay", plan=plan_id, who=draft.who, why=draft.why, selected=draft.selected, orders=count
        )
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(keys.replay(plan_id), mapping=fields)
            pipe.pexpire(keys.replay(plan_id), self._keep)
            pipe.pexpire(todo, self._keep)
            pipe.zadd(keys.REPLAYS, {plan_id: now})
            audit.append(pipe, entry)
            pipe.execute()
        return self._stored(plan_id)

    def of(self, plan_id: str) -> Plan | None:
        """Return a plan, None if it does not exist (any more)."""
        return next(self._read([plan_id]), None)

    def newest_first(self) -> Iterator[Plan]:
        """Return the plans of the last EVENT_DAYS."""
        found: Any = self._redis.zrevrange(keys.REPLAYS, 0, -1)
        return self._read([plan_id.decode() for plan_id in found])

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

    def resume(self, plan: Plan, who: str, rate: float | None = None) -> Plan:
        """Write to the audit who continues the plan, from now on at `rate` if one is given."""
        return self._change(plan, {} if rate is None else {"rate": rate}, "resume", who, "")

    def cancel(self, plan: Plan, who: str, why: str) -> Plan:
        """End the plan; queued orders stay queued. One that has ended meanwhile stays as it is."""
        return self._change(plan, {"state": "cancelled", "ended": self._now()}, "cancel", who, why)

    def _change(self, plan: Plan, fields: dict[Any, Any], what: str, who: str, why: str) -> Plan:
        plan_key, todo = keys.replay(plan.id), keys.replay_todo(plan.id)

        def change(pipe: Pipeline) -> None:
            # Watched: a feeder may end the plan between this read and the transaction.
            state: Any = pipe.hget(plan_key, "state")
            left: Any = pipe.llen(todo)
            pipe.multi()
            if state != b"open":
                return
            if what == "cancel":
                fields["left"] = left
                pipe.delete(todo)
            if fields:
                pipe.hset(plan_key, mapping=fields)
            entry = AuditEntry(what=what, plan=plan.id, who=who, why=why, selected=plan.selected, orders=left)
            audit.append(pipe, entry)

        self._redis.transaction(change, plan_key, todo)
        return self._stored(plan.id)

    def _free_id(self) -> str:
        while True:
            plan_id = "".join(secrets.choice(_LETTERS) for _ in range(6))
            if not self._redis.exists(keys.replay(plan_id), keys.replay_todo(plan_id)):
                return plan_id

    def _stored(self, plan_id: str) -> Plan:
        plan = self.of(plan_id)
        if plan is None:
            raise LookupError(plan_id)
        return plan

    def _read(self, plan_ids: list[str]) -> Iterator[Plan]:
        with self._redis.pipeline(transaction=False) as pipe:
            for plan_id in plan_ids:
                pipe.hgetall(keys.replay(plan_id))
                pipe.llen(keys.replay_todo(plan_id))
            answers = pipe.execute()
        for plan_id, fields, left in zip(plan_ids, answers[::2], answers[1::2], strict=True):
            if fields:
                yield _plan(plan_id, {name.decode(): value.decode() for name, value in fields.items()}, left)


class Selector:
    """Finds the orders of a selection; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._events = EventLog(redis)

    def select(self, selection: Selection, step: Callable[[int], None]) -> Selected:
        """Return the orders; `step` gets the number of events or orders of each page."""
        if selection.named:
            return self._named(selection)
        if selection.dead and not selection.has_event_conditions:
            dead = self._dead(selection.company_id, step)
            return Selected(events=0, orders=dict.fromkeys(dead, 0))
        return self._of_stream(selection, step)

    def up_to_date(self, orders: dict[str, int]) -> set[str]:
        """Return the members without a pending fetch that were fetched after their event (member -> ms)."""
        fields = self._numbers(orders, "generation", "fetched_generation", "fetched_at")
        return {
            member
            for (member, event_at), (generation, fetched_generation, fetched_at) in zip(
                orders.items(), fields, strict=True
            )
            if fetched_at > event_at and fetched_generation >= generation
        }

    def without_content(self, members: Iterable[str]) -> set[str]:
        """Return the members without stored content."""
        names = list(members)
        return {
            name
            for name, values in zip(names, self._numbers(names, "generation", "revision"), strict=True)
            if 0 in values
        }

    def _named(self, selection: Selection) -> Selected:
        of_orders = [event.id for order in selection.orders for event in self._events.of_order(order)]
        found = self._events.of_ids([*selection.event_ids, *of_orders])
        ids = {event.id for event in found}
        events = [event for event in found if selection.matches(event)]
        orders = {event.key.member: to_ms(event.at) for event in events}
        if not selection.has_event_conditions:
            # Its events may be older than EVENT_DAYS, or reconciling found it.
            for order in selection.orders:
                if selection.company_id in (None, order.company_id):
                    orders.setdefault(order.member, 0)
        if selection.dead:
            dead = set(self._dead(None, lambda _: None))
            orders = {member: at for member, at in orders.items() if member in dead}
        return Selected(
            events=sum(event.key.member in orders for event in events),
            orders=orders,
            missing=tuple(one for one in selection.event_ids if one not in ids),
        )

    def _of_stream(self, selection: Selection, step: Callable[[int], None]) -> Selected:
        """Read the events of a time span with as little work per event as possible: there may be millions."""
        dead = set(self._dead(None, lambda _: None)) if selection.dead else None
        company, outcome = _encoded(selection.company_id), _encoded(selection.outcome)
        status = None if selection.status is None else selection.status.casefold()
        orders: dict[str, int] = {}
        events = 0
        low = "-" if selection.since is None else str(max(0, to_ms(selection.since)))
        # It ends where the stream ends now.
        high = self._events.last_id() if selection.until is None else str(max(0, to_ms(selection.until)))
        for page in stream_pages(self._redis, keys.EVENTS, low, high, count=PAGE):
            for event_id, fields in page:
                if (
                    (company is not None and fields[b"company"] != company)
                    or (outcome is not None and fields.get(b"outcome") != outcome)
                    or (status is not None and fields.get(b"status", b"").decode().casefold() != status)
                ):
                    continue
                member = f"{fields[b'company'].decode()}:{fields[b'order'].decode()}"
                if dead is None or member in dead:
                    events += 1
                    orders[member] = int(event_id.partition(b"-")[0])
            step(len(page))
        return Selected(events=events, orders=orders)

    def _dead(self, company_id: str | None, step: Callable[[int], None]) -> list[str]:
        found: list[str] = []
        # New dead letters come at the end of the zset, and the walk ends all the same.
        for page in oldest_first(self._redis, keys.DEAD):
            found += [member for member, _ in page if company_id is None or member.startswith(f"{company_id}:")]
            step(len(page))
        return list(dict.fromkeys(found))

    def _numbers(self, members: Iterable[str], *names: str) -> Iterator[list[int]]:
        for values in read_fields(self._redis, map(OrderKey.of, members), *names):
            yield [int(value or 0) for value in values]


def is_plan_id(text: str) -> bool:
    """Return whether `text` can be the id of a plan."""
    return 0 < len(text) <= 20 and text.isascii() and text.isalnum()


def _plan(plan_id: str, texts: Mapping[str, str], left: int) -> Plan:
    """Return the plan in the hash `texts`; `left` is the length of its list."""
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


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode()
