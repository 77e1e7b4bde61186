"""Replays as plans: orders to fetch (or to hand on) once more, fed at a rate, that outlive who feeds them.

A plan is a hash and a list of the orders still to do. What takes from the list also owes the fetch, in one script, so a
feeder may be killed at any instruction and another goes on; both at once share the rate and never an order.

A replay as a plan: what it is to do, and how far it is.

Which orders a replay is about: those that stored events tell of, those named, or those given up.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, Final, Literal

import msgspec
from redis import Redis
from redis.client import Pipeline

from app.audit import Audit, Deed
from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.events import EventLog, StoredEvent
from app.ledger.redis import Script, oldest_first
from app.ledger.rq_jobs import JobTemplate
from app.times import from_ms, to_ms

State = Literal["open", "done", "cancelled"]


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan is to do: fetch the orders, or hand their stored revision to `sinks` without a fetch.

    `rate` in orders a second; `who` and `why` are a person's own words.
    """

    who: str
    why: str
    selected: str
    rate: float
    sinks: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One plan. Of its `orders`, `left` are still to do, or were when it was cancelled.

    `queued` have a new job (or hand-on), `waiting` had one already, `passed` needed none: their copy is newer by now,
    or there is nothing to hand on.
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
    """What a step came to: `unknown` is a plan that is not here (any more); `wait` ms until there is more to take."""

    state: State | Literal["unknown"]
    left: int
    wait: int


def is_plan_id(text: str) -> bool:
    """Return whether `text` can be the id of a plan."""
    return 0 < len(text) <= 20 and text.isascii() and text.isalnum()


def parse_plan(plan_id: str, texts: Mapping[str, str], left: int) -> Plan:
    """Return the plan in the hash `texts`, with the length of its list."""
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


MOST_A_STEP: Final = 50
"""Orders one step looks at, about a millisecond of Redis: live traffic is served in between."""

_WRITTEN_AT_ONCE: Final = 1000
_DRAFT: Final = policy.DAY
"""How long a list is kept whose plan was never filed: its writer died, or went to sleep with the machine."""

_LETTERS: Final = "23456789abcdefghjkmnpqrstvwxyz"
"""Without those that are taken for each other when an id is read aloud."""


class Plans:
    """The plans of replays; `now` is always an argument, ms since 1970. Raises OtherSchema where it writes orders."""

    def __init__(self, redis: Redis, *, event_days: int, clock: Callable[[], int] | None = None) -> None:
        self._redis = redis
        self._audit = Audit(redis, event_days=event_days)
        self._keep = event_days * policy.DAY
        self._template = JobTemplate()
        self._step = Script(redis, "replay_step", clock)

    def file(self, draft: Draft, orders: Iterable[tuple[str, int | None]], now: int) -> Plan:
        """Keep a new plan and the audit of it; return it.

        `orders`: member and ms of what was told last of it, None to fetch it whatever is stored. Nothing is fed yet,
        and a writer that dies here leaves no plan: only a list that nobody reads, for a day.
        """
        plan_id = self._free_id()
        todo = keys.replay_todo(plan_id)
        left = iter(orders)
        count = 0
        while chunk := list(islice(left, _WRITTEN_AT_ONCE)):
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.rpush(todo, *(f"{member} {'-' if told is None else told}" for member, told in chunk))
                pipe.pexpire(todo, _DRAFT)
                pipe.execute()
            count += len(chunk)
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
        oldest = self._audit.oldest_kept(now)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(keys.replay(plan_id), mapping=fields)
            pipe.pexpire(keys.replay(plan_id), self._keep)
            pipe.pexpire(todo, self._keep)
            pipe.zadd(keys.REPLAYS, {plan_id: now})
            pipe.zremrangebyscore(keys.REPLAYS, "-inf", oldest)
            self._note(pipe, "replay", plan_id, draft.who, draft.why, draft.selected, count, oldest)
            pipe.execute()
        return self._filed(plan_id)

    def of(self, plan_id: str) -> Plan | None:
        """Return a plan, None if it is not here (any more)."""
        return next(self._of([plan_id]), None)

    def newest_first(self) -> Iterator[Plan]:
        """Return the plans of the last EVENT_DAYS."""
        found: Any = self._redis.zrevrange(keys.REPLAYS, 0, -1)
        return self._of([plan_id.decode() for plan_id in found])

    def feed(self, plan: Plan) -> Step:
        """Take what the rate allows off the plan and owe it a fetch, or a hand-on, in one step."""
        state, left, wait = self._step(
            plan=plan.id,
            limit=MOST_A_STEP,
            deliver_to=list(plan.sinks),
            grace=policy.GRACE,
            job=self._template.fields(),
        )
        return Step(state.decode(), left, wait)

    def resume(self, plan: Plan, who: str, now: int, rate: float | None = None) -> Plan:
        """Note who goes on with the plan, from now on at `rate` if one is given."""
        self._change(plan, {} if rate is None else {"rate": rate}, "resume", who, "", now)
        return self._filed(plan.id)

    def cancel(self, plan: Plan, who: str, why: str, now: int) -> Plan:
        """End the plan; what was queued stays queued. One that has ended meanwhile stays as it is."""
        self._change(plan, {"state": "cancelled", "ended": now}, "cancel", who, why, now)
        return self._filed(plan.id)

    def _change(self, plan: Plan, fields: dict[Any, Any], what: str, who: str, why: str, now: int) -> None:
        oldest = self._audit.oldest_kept(now)
        plan_key, todo = keys.replay(plan.id), keys.replay_todo(plan.id)

        def change(pipe: Pipeline) -> None:
            # Watched: between this look and the transaction a feeder may have ended the plan.
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
            self._note(pipe, what, plan.id, who, why, plan.selected, left, oldest)

        self._redis.transaction(change, plan_key, todo)

    def _note(
        self, pipe: Pipeline, what: str, plan_id: str, who: str, why: str, selected: str, orders: int, oldest: int
    ) -> None:
        deed = Deed(what=what, plan=plan_id, who=who, why=why, selected=selected, orders=orders)
        self._audit.note(deed, oldest, pipe)

    def _free_id(self) -> str:
        while True:
            plan_id = "".join(secrets.choice(_LETTERS) for _ in range(6))
            if not self._redis.exists(keys.replay(plan_id), keys.replay_todo(plan_id)):
                return plan_id

    def _filed(self, plan_id: str) -> Plan:
        plan = self.of(plan_id)
        if plan is None:
            raise LookupError(plan_id)
        return plan

    def _of(self, plan_ids: list[str]) -> Iterator[Plan]:
        with self._redis.pipeline(transaction=False) as pipe:
            for plan_id in plan_ids:
                pipe.hgetall(keys.replay(plan_id))
                pipe.llen(keys.replay_todo(plan_id))
            answers = pipe.execute()
        for plan_id, fields, left in zip(plan_ids, answers[::2], answers[1::2], strict=True):
            if fields:
                yield parse_plan(plan_id, {name.decode(): value.decode() for name, value in fields.items()}, left)


PAGE: Final = 500
"""Events a call: fewer calls than a list for people needs, and Redis still serves others after a millisecond."""

_CHUNK: Final = 500
"""Records a round trip, of each only the fields that are asked for."""


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which events, and so which orders; all conditions must hold.

    `event_ids` and `orders` together name what is looked through, nothing named means all. `since` and `until` are
    aware and inclusive, `status` in any case, `dead`: only orders that were given up.
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
    def asks_of_events(self) -> bool:
        """Return whether there is a condition that only an event can meet."""
        return any((self.status, self.outcome, self.since, self.until))

    def matches(self, event: StoredEvent) -> bool:
        """Return whether an event that was named meets the other conditions, except `dead`."""
        return (
            self.company_id in (None, event.company_id)
            and (self.status is None or event.status.casefold() == self.status.casefold())
            and self.outcome in (None, event.outcome)
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

    `missing` are the event ids that are not there (any more).
    """

    events: int
    orders: dict[str, int]
    missing: tuple[str, ...] = ()


class Selector:
    """Reads events and records; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._events = EventLog(redis)

    def select(self, selection: Selection, step: Callable[[int], None]) -> Selected:
        """Return the orders; `step` is told how many events or orders each page held."""
        if selection.named:
            return self._named(selection)
        if selection.dead and not selection.asks_of_events:
            dead = self._dead(selection.company_id, step)
            return Selected(events=0, orders=dict.fromkeys(dead, 0))
        return self._of_the_stream(selection, step)

    def up_to_date(self, told: dict[str, int]) -> set[str]:
        """Return the orders whose stored copy is newer than what was told (fetched later, and nothing is owed)."""
        return {
            member
            for (member, at), (wanted, done, fetched) in zip(
                told.items(), self._fields(told, "generation", "fetched_generation", "fetched_at"), strict=True
            )
            if fetched > at and done >= wanted
        }

    def without_content(self, members: Iterable[str]) -> set[str]:
        """Return the orders of which nothing is stored."""
        asked = list(members)
        found = self._fields(asked, "generation", "revision")
        return {member for member, values in zip(asked, found, strict=True) if 0 in values}

    def erased(self, members: Iterable[str]) -> set[str]:
        """Return the orders that were erased: they are not brought back."""
        asked = list(members)
        found = self._fields(asked, "erased_at")
        return {member for member, (at,) in zip(asked, found, strict=True) if at}

    def _named(self, selection: Selection) -> Selected:
        found = self._events.of_ids(selection.event_ids)
        missing = set(selection.event_ids) - {event.id for event in found}
        for order in selection.orders:
            found += self._events.of_order(order)
        found = sorted({event.id: event for event in found}.values(), key=_age)
        told: dict[str, int] = {}
        for event in filter(selection.matches, found):
            told[event.key.member] = to_ms(event.at)
        if not selection.asks_of_events:
            # Its events may be older than EVENT_DAYS, or it came by another way than an event.
            for order in selection.orders:
                if selection.company_id in (None, order.company_id):
                    told.setdefault(order.member, 0)
        if selection.dead:
            dead = set(self._dead(None, lambda _: None))
            told = {member: at for member, at in told.items() if member in dead}
        events = sum(event.key.member in told for event in filter(selection.matches, found))
        return Selected(events=events, orders=told, missing=tuple(one for one in selection.event_ids if one in missing))

    def _of_the_stream(self, selection: Selection, step: Callable[[int], None]) -> Selected:
        """Go through the stretch of time with as little work for each event as can be: there may be millions."""
        dead = set(self._dead(None, lambda _: None)) if selection.dead else None
        company, outcome = _encoded(selection.company_id), _encoded(selection.outcome)
        status = None if selection.status is None else selection.status.casefold()
        told: dict[str, int] = {}
        events = 0
        for page in self._pages(selection):
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
                    told[member] = int(event_id.partition(b"-")[0])
            step(len(page))
        return Selected(events=events, orders=told)

    def _pages(self, selection: Selection) -> Iterator[Any]:
        """Return the entries of the stretch of time as Redis has them; it ends where the stream ends now."""
        newest: Any = self._redis.xrevrange(keys.EVENTS, count=1)
        if not newest:
            return
        low = "-" if selection.since is None else str(max(0, to_ms(selection.since)))
        high = newest[0][0].decode() if selection.until is None else str(max(0, to_ms(selection.until)))
        while True:
            page: Any = self._redis.xrange(keys.EVENTS, low, high, count=PAGE)
            if not page:
                return
            yield page
            low = f"({page[-1][0].decode()}"

    def _dead(self, company_id: str | None, step: Callable[[int], None]) -> list[str]:
        found: list[str] = []
        # What is given up while we walk comes at the end of the zset, and the walk ends all the same.
        for page in oldest_first(self._redis, keys.DEAD):
            found += [member for member, _ in page if company_id is None or member.startswith(f"{company_id}:")]
            step(len(page))
        return list(dict.fromkeys(found))

    def _fields(self, members: Iterable[str], *names: str) -> Iterator[Sequence[int]]:
        left = iter(members)
        while chunk := list(islice(left, _CHUNK)):
            with self._redis.pipeline(transaction=False) as pipe:
                for member in chunk:
                    pipe.hmget(keys.record(OrderKey.of(member)), *names)
                found = pipe.execute()
            yield from ([int(value or 0) for value in values] for values in found)


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def _age(event: StoredEvent) -> tuple[int, int]:
    ms, _, number = event.id.partition("-")
    return int(ms), int(number)
