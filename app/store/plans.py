"""Replays as plans: orders to fetch (or to hand on) once more, fed at a rate, that outlive who feeds them.

A plan is a hash and a list of the orders still to do. What takes from the list also owes the fetch, in one script, so a
feeder may be killed at any instruction and another goes on; both at once share the rate and never an order.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Final

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ResponseError

from app.store import clockwork, keys, schema
from app.store.audit import Audit, Deed
from app.store.jobs import BACKFILL, LIVE, QUEUES_KEY, JobTemplate, queue_key
from app.store.plan import Draft, Plan, Step, parse_plan
from app.store.scripts import source

MOST_A_STEP: Final = 50
"""Orders one step looks at, about a millisecond of Redis: live traffic is served in between."""

_WRITTEN_AT_ONCE: Final = 1000
_DRAFT: Final = clockwork.DAY
"""How long a list is kept whose plan was never filed: its writer died, or went to sleep with the machine."""

_LETTERS: Final = "23456789abcdefghjkmnpqrstvwxyz"
"""Without those that are taken for each other when an id is read aloud."""


class Plans:
    """The plans of replays; `now` is always an argument, ms since 1970. Raises NewerData where it writes orders."""

    def __init__(self, redis: Redis, *, event_days: int) -> None:
        self._redis = redis
        self._audit = Audit(redis, event_days=event_days)
        self._keep = event_days * clockwork.DAY
        self._template = JobTemplate()
        # want.lua as it is: there is one way to owe an order a fetch.
        replay = f"local function want()\n{source('want')}\nend\n{source('replay')}"
        self._replay = redis.register_script(schema.guarded(replay))
        self._rehand = redis.register_script(schema.guarded(source("rehand")))

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

    def feed(self, plan: Plan, now: int) -> Step:
        """Take what the rate allows off the plan and owe it a fetch, or a hand-on, in one step."""
        own = [keys.replay(plan.id), keys.replay_todo(plan.id)]
        try:
            if plan.sinks:
                state, left, wait = self._rehand(
                    keys=[keys.DUE, keys.DEAD_SINKS, *own],
                    args=[now, keys.PREFIX, BACKFILL, MOST_A_STEP, plan.id, *plan.sinks],
                )
            else:
                why = f"replay:{plan.id}"
                state, left, wait = self._replay(
                    keys=[keys.DUE, queue_key(BACKFILL), QUEUES_KEY, keys.ORDERS, keys.DEAD, *own],
                    args=[
                        now,
                        clockwork.GRACE,
                        keys.PREFIX,
                        BACKFILL,
                        LIVE,
                        why,
                        *self._template.fields(),
                        MOST_A_STEP,
                    ],
                )
        except ResponseError as error:
            raise schema.newer_data(error) or error from None
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
