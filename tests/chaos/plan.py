"""What is to happen in one run, drawn from a seed: the same seed draws the same events, kills and faults."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Final, Literal

Kind = Literal["web", "worker", "pool", "valkey", "freeze"]
KILLS: Final[tuple[Kind, ...]] = ("web", "worker", "pool", "valkey")

LARGEST_BATCH: Final = 20
TWICE: Final = 0.1
"""Share of the orders that settle a second time, with other content."""

REPEATED: Final = 0.1
"""Share of the events that come once more with the same timestamp, as a duplicate."""

_DOWN: Final[dict[Kind, tuple[float, float]]] = {
    "web": (0.05, 1.0),
    "worker": (0.0, 0.0),
    "pool": (0.05, 1.0),
    "valkey": (0.05, 2.0),
    "freeze": (0.5, 4.0),
}
_FIRST_BLOW: Final = 1.0
_KILLS_WITH_OUTAGE: Final = 20


@dataclass(frozen=True)
class Event:
    """One announced settlement; `forced`: the Channel Manager is made to settle the order so just before."""

    order_id: str
    status: str
    timestamp: str
    forced: bool = False


@dataclass(frozen=True)
class Batch:
    """One POST, `at` seconds after the start."""

    at: float
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Blow:
    """A SIGKILL, or SIGSTOP for `freeze`; `down` seconds until it is started again; `pick` chooses among workers."""

    at: float
    kind: Kind
    down: float
    pick: int


@dataclass(frozen=True)
class Plan:
    """`orders` are the ids by the status in which they begin; `outages` are (second, seconds) of 503 for all."""

    seed: int
    batches: tuple[Batch, ...]
    blows: tuple[Blow, ...]
    outages: tuple[tuple[float, float], ...]
    orders: dict[str, tuple[str, ...]]

    @property
    def events(self) -> frozenset[Event]:
        """Return every event once, however often it is sent."""
        return frozenset(event for batch in self.batches for event in batch.events)


def draw(seed: int, events: int, kills: int, seconds: float) -> Plan:
    """Return a plan of `events` different events and `kills` SIGKILLs, and a freeze for every six of these."""
    rng = random.Random(seed)
    blows = tuple(_blows(rng, kills, seconds))
    sent = _events(rng, events)
    begin: dict[str, list[str]] = {}
    for event in sent:
        if not event.forced:
            ids = begin.setdefault(event.status, [])
            ids.append(event.order_id)
    return Plan(
        seed=seed,
        batches=tuple(_batches(rng, sent, blows, seconds)),
        blows=blows,
        # One is enough: each opens the breaker for 15 s and more, and what is idle is not worth a kill.
        outages=((seconds * 0.4, rng.uniform(1, 3)),) if kills >= _KILLS_WITH_OUTAGE else (),
        orders={status: tuple(dict.fromkeys(ids)) for status, ids in begin.items()},
    )


def faults() -> list[dict[str, Any]]:
    """Return the faults of the Channel Manager that go on all the time; no rule strikes an order more than twice."""
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
    """Return the fault that answers 503 to everybody for a while."""
    return {"kind": "status", "operation": "getOrder", "status": 503, "lasts": seconds}


def _blows(rng: random.Random, kills: int, seconds: float) -> Iterator[Blow]:
    kinds: list[Kind] = [*islice(cycle(KILLS), kills), *["freeze" for _ in range(max(1, kills // 6))]]  # type: ignore[list-item]  # mypy takes the literal in a comprehension for str
    rng.shuffle(kinds)
    stretch = (seconds - _FIRST_BLOW) / len(kinds)
    for number, kind in enumerate(kinds):
        at = _FIRST_BLOW + (number + rng.random()) * stretch
        yield Blow(at, kind, rng.uniform(*_DOWN[kind]), rng.randrange(1000))


def _events(rng: random.Random, count: int) -> list[Event]:
    """Return the events in the order in which they are sent, repeats included."""
    placed: list[tuple[float, Event]] = []
    orders = round(count / (1 + TWICE))
    for number in range(orders):
        order_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        status = rng.choices(("Issued", "Draft", "Error"), (8, 1, 1))[0]
        at = rng.random()
        placed.append((at, Event(order_id, status, _timestamp(number))))
        if number < count - orders:
            placed.append((_later(rng, at), Event(order_id, "Issued", _timestamp(count + number), forced=True)))
    for at, event in rng.sample(placed, round(len(placed) * REPEATED)):
        placed.append((_later(rng, at), event))
    return [event for _, event in sorted(placed, key=lambda one: one[0])]


def _later(rng: random.Random, at: float) -> float:
    """Return a place further on: close behind, so that the two meet in the queue, or anywhere."""
    return at + (rng.expovariate(500) if rng.random() < 0.5 else rng.random() * (1 - at))


def _batches(rng: random.Random, events: list[Event], blows: tuple[Blow, ...], seconds: float) -> Iterator[Batch]:
    """Cut the events into POSTs: half of them at any moment, half around a blow, which strikes what is under way."""
    parts: list[tuple[Event, ...]] = []
    start = 0
    while start < len(events):
        size = rng.randint(1, LARGEST_BATCH)
        parts.append(tuple(events[start : start + size]))
        start += size
    moments = [
        rng.random() * seconds if rng.random() < 0.5 else rng.choice(blows).at + rng.gauss(-0.05, 0.1) for _ in parts
    ]
    for at, part in zip(sorted(moments), parts, strict=True):
        yield Batch(min(max(at, 0.0), seconds), part)


def _timestamp(number: int) -> str:
    return f"2026-05-15T09:30:05.{number:07}Z"
