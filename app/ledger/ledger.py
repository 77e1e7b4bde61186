"""The sync side of the ledger: what workers, the pool and the CLI do to orders, each step one script.

`now` is always an argument, in ms since 1970, so that hours are tested in milliseconds.

Giving dead letters up for good: the one way, beside their own success, in which something owed ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

from redis import Redis
from redis.exceptions import ResponseError

from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.guests import Guests
from app.ledger.redis import guarded, newer_data, source
from app.ledger.rq_jobs import BACKFILL, LIVE, QUEUES_KEY, JobTemplate, queue_key
from app.ledger.work import Begun, Content, Ending, Failed, Failure, Fetch, HandOn, Stored, Ticked

MOST_A_TICK: Final = 500
"""Orders one tick.lua looks at; the ticker calls again while there are more."""


class Ledger:
    """The record of every order, its counters and its clock; raises NewerData for data of a newer version of ours."""

    def __init__(self, redis: Redis, *, order_days: int, fetch_lease: int, sinks: Sequence[str] = ()) -> None:
        self.redis = redis
        self._keep = order_days * policy.DAY
        self._fetch_lease = fetch_lease
        self._sinks = tuple(sinks)
        self._template = JobTemplate()
        self._guests = Guests(redis)
        names = ("begin", "finish", "fail", "hand", "handed", "tick", "want", "abandon", "nudge", "revive_sink")
        self._script = {name: redis.register_script(guarded(source(name))) for name in names}

    def begin(self, order: OrderKey, worker: str, now: int) -> tuple[Begun, Fetch | None]:
        """Say what the order needs; `fetch` comes with the fence that `finish` or `fail` must show."""
        verdict, *values = self._run(
            "begin",
            [keys.record(order), keys.DUE, keys.DEAD, keys.trail(order), keys.holding(worker), keys.content(order)],
            [now, self._fetch_lease, worker, order.member, policy.CRASHES_ALLOWED, self._keep, *self._sinks],
        )
        what: Begun = _text(verdict)  # type: ignore[assignment]  # begin.lua's header names them
        if what != "fetch":
            return what, None
        begun, fence, tries, looks, parks, missing, known, request_id, lane, rejects = values
        return what, Fetch(
            begun,
            fence,
            tries,
            looks,
            parks,
            missing,
            _text(known),
            _text(request_id),
            _text(lane),
            rejects,
            now + self._fetch_lease,
        )

    def finish(
        self,
        order: OrderKey,
        worker: str,
        fetch: Fetch,
        content: Content,
        now: int,
        *,
        look_at: int | None = None,
        give_up: str = "",
    ) -> tuple[Stored, int, bool]:
        """Store an answer; return what follows, the revision, and whether the content is new.

        `look_at` (ms) marks an unsettled answer, `give_up` the reason when there is no further look.
        """
        verdict, revision, changed = self._run(
            "finish",
            [
                keys.record(order),
                keys.DUE,
                keys.DEAD,
                keys.trail(order),
                keys.holding(worker),
                keys.content(order),
                keys.ORDERS,
                keys.DEAD_SINKS,
                *map(keys.reference, content.references),
            ],
            [
                now,
                order.member,
                fetch.fence,
                fetch.begun,
                self._keep,
                policy.HAND_LEASE,
                "" if look_at is None else look_at,
                give_up,
                content.digest,
                zlib.compress(content.raw),
                content.status,
                content.wallets,
                content.tickets,
                content.coupons,
                int(content.manifest),
                content.http_status,
                content.duration_ms,
                self._guests.digests(content.guests),
                *self._sinks,
            ],
        )
        return _text(verdict), revision, bool(changed)  # type: ignore[return-value]  # finish.lua's header

    def fail(
        self,
        order: OrderKey,
        worker: str,
        fetch: Fetch,
        now: int,
        *,
        what: Failure,
        reason: str,
        http_status: int | None = None,
        due: int = 0,
        duration_ms: int = 0,
    ) -> Failed:
        """Record that a fetch ended without an order, and when to look again (`due`, ms)."""
        verdict = self._run(
            "fail",
            [keys.record(order), keys.DUE, keys.DEAD, keys.trail(order), keys.holding(worker), keys.content(order)],
            [
                now,
                order.member,
                fetch.fence,
                fetch.begun,
                self._keep,
                what,
                due,
                reason,
                "" if http_status is None else http_status,
                duration_ms,
                *self._sinks,
            ],
        )
        return _text(verdict)  # type: ignore[return-value]  # fail.lua's header

    def hand(self, order: OrderKey, worker: str, now: int) -> HandOn | None:
        """Take the next revision that a sink has not had, None when there is none for this worker now."""
        verdict, *values = self._run(
            "hand",
            [keys.record(order), keys.DUE, keys.trail(order), keys.holding(worker), keys.content(order)],
            [now, policy.HAND_LEASE, worker, order.member, self._keep, *self._sinks],
        )
        if verdict != b"sink":
            return None
        sink, revision, tries, raw, request_id, crashes, digest = values
        until = now + policy.HAND_LEASE
        content, request = zlib.decompress(raw), _text(request_id)
        return HandOn(_text(sink), revision, tries, content, request, crashes, until, _text(digest))

    def handed(
        self,
        order: OrderKey,
        worker: str,
        hand_on: HandOn,
        now: int,
        *,
        what: Literal["done", "again", "dead"],
        reason: str = "-",
        due: int = 0,
        duration_ms: int = 0,
    ) -> None:
        """Record what a sink did with a revision; `due` is the ms of its next try."""
        self._run(
            "handed",
            [keys.record(order), keys.trail(order), keys.holding(worker), keys.DEAD_SINKS, keys.DUE],
            [now, order.member, hand_on.sink, hand_on.revision, what, due, reason, duration_ms],
        )

    def tick(self, now: int) -> Ticked:
        """Give every order whose time has come a fresh job."""
        looked = pushed = broken = 0
        while True:
            seen, jobs, unreadable = self._run(
                "tick",
                [keys.DUE, queue_key(LIVE), queue_key(BACKFILL), QUEUES_KEY],
                [
                    now,
                    policy.GRACE,
                    policy.LONGEST_WAIT,
                    keys.PREFIX,
                    MOST_A_TICK,
                    LIVE,
                    BACKFILL,
                    policy.FARTHEST,
                    *self._template.fields(),
                    *self._sinks,
                ],
            )
            looked += seen
            pushed += jobs
            broken += unreadable
            if seen < MOST_A_TICK:
                return Ticked(looked, pushed, broken)

    def want(self, orders: Iterable[OrderKey], now: int, *, queue: Literal["live", "backfill"], why: str) -> int:
        """Owe the orders a fetch without an event; return how many jobs were pushed (the rest waits already)."""
        members = [part for order in orders for part in order]
        if not members:
            return 0
        outcomes = self._run(
            "want",
            [keys.DUE, queue_key(queue), QUEUES_KEY, keys.ORDERS, keys.DEAD],
            [now, policy.GRACE, keys.PREFIX, queue, LIVE, why, *self._template.fields(), *members],
        )
        return int(outcomes.count(0))

    def abandon(self, worker: str, now: int, how: Ending = "killed") -> OrderKey | None:
        """Let go of what an ended worker held, so that it is due now; return that order."""
        member = self._run("abandon", [keys.holding(worker), keys.DUE], [now, worker, keys.PREFIX, how])
        return OrderKey.of(_text(member)) if member else None

    def nudge(self, orders: Iterable[OrderKey], now: int) -> None:
        """Look at these orders now if they are owed anything: a job of theirs may be lost."""
        members = [order.member for order in orders]
        if members:
            self._run("nudge", [keys.DUE], [now, *members])

    def revive_sink(self, order: OrderKey, sink: str, now: int) -> bool:
        """Give a sink that was given up new tries from now on; return False if it was not given up (any more)."""
        revived = self._run(
            "revive_sink",
            [keys.record(order), keys.DUE, keys.trail(order), keys.DEAD_SINKS],
            [now, order.member, sink],
        )
        return bool(revived)

    def _run(self, name: str, key_names: list[str], arguments: list[Any]) -> Any:
        try:
            return self._script[name](keys=key_names, args=arguments)
        except ResponseError as error:
            raise newer_data(error) or error from None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class Drops:
    """Drops dead letters, one a call; raises NewerData for data of a newer version of ours."""

    def __init__(self, redis: Redis, *, order_days: int, sinks: Sequence[str] = ()) -> None:
        self._keep = order_days * policy.DAY
        self._sinks = tuple(sinks)
        self._script = redis.register_script(guarded(source("drop")))

    def drop(self, order: OrderKey, sink: str, now: int) -> bool:
        """Drop the order's fetch (`sink` is "") or one hand-on; return False if it was not given up (any more)."""
        key_names = (keys.record(order), keys.DUE, keys.DEAD, keys.trail(order), keys.DEAD_SINKS, keys.content(order))
        try:
            dropped: Any = self._script(keys=key_names, args=[now, order.member, sink, self._keep, *self._sinks])
        except ResponseError as error:
            raise newer_data(error) or error from None
        return bool(dropped)
