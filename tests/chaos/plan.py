"""The events, kills and faults of one run, drawn from a seed."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, cycle, islice
from typing import Any, Final, Literal

from app.dev import stack
from app.dev.sandbox.values import company_id
from app.dev.sandbox.webhooks import Event
from app.dev.simulator.sender import Origin, Post, Shot

Kind = Literal["web", "worker", "pool", "valkey", "freeze", "outage"]
KILL_KINDS: Final[tuple[Kind, ...]] = ("web", "worker", "pool", "valkey")

_LARGEST_BATCH: Final = 20
_TWICE: Final = 0.1
"""Share of the orders that settle a second time, with other content."""

_REPEATED: Final = 0.1
"""Share of the events that are sent again with the same timestamp."""

_DOWN: Final[dict[Kind, tuple[float, float]]] = {
    "web": (0.05, 1.0),
    "worker": (0.0, 0.0),
    "pool": (0.05, 1.0),
    "valkey": (0.05, 2.0),
    "freeze": (0.5, 4.0),
}
_ORIGIN: Final = Origin(company_id(stack.TENANT, stack.ENVIRONMENT, stack.COMPANY), stack.COMPANY, stack.CLIENT_STATE)
_FIRST_KILL: Final = 1.0
_KILLS_WITH_OUTAGE: Final = 20
"""One outage is enough: it opens the breaker for 15 s and more, and a kill of an idle process tests nothing."""


@dataclass(frozen=True)
class Kill:
    """A SIGKILL, a SIGSTOP (`freeze`), or 503 for all getOrders (`outage`); `down` seconds until that ends.

    `victim`, from 0 to 1, chooses among the processes of the pool, of which `worker` kills one.
    """

    at: float
    kind: Kind
    down: float
    victim: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The POSTs and the kills of a run."""

    seed: int
    posts: tuple[Post, ...]
    kills: tuple[Kill, ...]

    @cached_property
    def settlements(self) -> dict[str, tuple[Event, ...]]:
        """Return the different events of each order in the order in which they are first sent."""
        found: dict[str, tuple[Event, ...]] = {}
        for shot in chain.from_iterable(post.shots for post in self.posts):
            events = found.get(shot.order_id, ())
            found[shot.order_id] = events if shot.event in events else (*events, shot.event)
        return found

    @property
    def events(self) -> int:
        """Return the number of different events."""
        return sum(map(len, self.settlements.values()))


def draw(seed: int, events: int, kills: int, seconds: float) -> Plan:
    """Return a plan of `events` different events and `kills` SIGKILLs, and a freeze for every six of these."""
    rng = random.Random(seed)
    drawn = tuple(_kills(rng, kills, seconds))
    posts = tuple(_posts(rng, _shots(rng, events), drawn, seconds))
    outages = (Kill(seconds * 0.4, "outage", rng.uniform(1, 3)),) if kills >= _KILLS_WITH_OUTAGE else ()
    return Plan(seed, posts, drawn + outages)


def faults() -> list[dict[str, Any]]:
    """Return the faults of the Channel Manager for the whole run; a rule strikes an order at most twice."""
    common: dict[str, Any] = {"operation": "getOrder", "first": 2}
    return [
        common | {"kind": "status", "status": 500, "rate": 0.01},
        common | {"kind": "status", "status": 503, "rate": 0.01},
        common | {"kind": "status", "status": 429, "rate": 0.001, "retry_after": 1},
        common | {"kind": "hang", "seconds": 8, "rate": 0.003},
        common | {"kind": "cut", "rate": 0.005},
        common | {"kind": "truncated", "rate": 0.005},
    ]


def outage(seconds: float) -> dict[str, Any]:
    """Return the fault that answers every getOrder with 503 for a while."""
    return {"kind": "status", "operation": "getOrder", "status": 503, "lasts": seconds}


def _kills(rng: random.Random, kills: int, seconds: float) -> Iterator[Kill]:
    freeze: Kind = "freeze"
    kinds = [*islice(cycle(KILL_KINDS), kills), *[freeze] * max(1, kills // 6)]
    rng.shuffle(kinds)
    stretch = (seconds - _FIRST_KILL) / len(kinds)
    for number, kind in enumerate(kinds):
        at = _FIRST_KILL + (number + rng.random()) * stretch
        yield Kill(at, kind, rng.uniform(*_DOWN[kind]), rng.random())


def _shots(rng: random.Random, count: int) -> list[Shot]:
    """Return the events in the order of sending, with repeats."""
    placed: list[tuple[float, Shot]] = []
    orders = round(count / (1 + _TWICE))
    for number in range(orders):
        order_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        status = rng.choices(("Issued", "Draft", "Error"), (8, 1, 1))[0]
        at = rng.random()
        placed.append((at, Shot("genuine", _ORIGIN.event(order_id, "CM-1", status, _timestamp(number)))))
        if number < count - orders:
            again = _ORIGIN.event(order_id, "CM-1", "Issued", _timestamp(count + number))
            placed.append((_later(rng, at), Shot("genuine", again)))
    for at, shot in rng.sample(placed, round(len(placed) * _REPEATED)):
        placed.append((_later(rng, at), Shot("duplicate", shot.event)))
    return [shot for _, shot in sorted(placed, key=lambda one: one[0])]


def _later(rng: random.Random, at: float) -> float:
    """Return a later place: half of them close behind, so that both events wait in the queue together."""
    return at + (rng.expovariate(500) if rng.random() < 0.5 else rng.random() * (1 - at))


def _posts(rng: random.Random, shots: list[Shot], kills: tuple[Kill, ...], seconds: float) -> Iterator[Post]:
    """Return the events in POSTs: half of them at any time, half around a kill, which then strikes open requests."""
    parts = []
    while shots:
        size = rng.randint(1, _LARGEST_BATCH)
        parts.append(tuple(shots[:size]))
        shots = shots[size:]
    times = [
        rng.random() * seconds if rng.random() < 0.5 else rng.choice(kills).at + rng.gauss(-0.05, 0.1) for _ in parts
    ]
    for at, part in zip(sorted(times), parts, strict=True):
        yield Post(part, "values", min(max(at, 0.0), seconds))


def _timestamp(number: int) -> str:
    return f"2026-05-15T09:30:05.{number:07}Z"
