"""The POSTs of one simulation: events of settled orders, repeated, late and forged as the options say, in batches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from app.dev.sandbox.values import Shape, event_timestamp, guid
from app.dev.simulator.sender import Origin, Post, Shot

_LONGEST_STATE: Final = 50


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How much of each misbehaviour: shares are of the orders, 0 to 1; `rate` in events a second, None: all at once."""

    orders: int
    duplicates: float
    late: float
    bad_secret: float
    batch: int
    rate: float | None
    seed: int


class Settled(msgspec.Struct, frozen=True):
    """An order of the sandbox, in the status in which it has settled."""

    order_id: str
    reference: str
    status: str


class Plan(msgspec.Struct, frozen=True):
    """All POSTs: the first wave, and those sent when every order is fetched."""

    settled: tuple[Settled, ...]
    first: tuple[Post, ...]
    late: tuple[Post, ...]

    @property
    def shots(self) -> list[Shot]:
        return [shot for post in (*self.first, *self.late) for shot in post.shots]

    @property
    def repeats(self) -> Counter[str]:
        """Return how often each order's event is repeated."""
        return Counter(shot.order_id for shot in self.shots if shot.kind == "duplicate")

    @property
    def ghosts(self) -> set[str]:
        """Return the ids that only forged events name."""
        return {shot.order_id for shot in self.shots} - {order.order_id for order in self.settled}


def make(options: Options, settled: Sequence[Settled], origin: Origin) -> Plan:
    """Return the POSTs; each share above 0 makes at least one event.

    Half of the repeats come late, when their order is fetched. So does every other forged event, which then names a
    real order: accepting it costs a getOrder that can be counted. The others name orders that do not exist.
    """
    dice = random.Random(options.seed)  # noqa: S311  # a plan that the seed repeats, no secret
    genuine = {
        order.order_id: Shot("genuine", origin.event(order.order_id, order.reference, order.status, event_timestamp()))
        for order in settled
    }
    late_ids = _drawn(dice, genuine, options.late)
    first = [shot for order_id, shot in genuine.items() if order_id not in late_ids]
    late = [genuine[order_id] for order_id in late_ids]
    for number, order_id in enumerate(_drawn(dice, genuine, options.duplicates)):
        repeat = Shot("duplicate", genuine[order_id].event)
        (late if number % 2 or order_id in late_ids else first).append(repeat)
    alone: list[Post] = []
    for number, order_id in enumerate(_drawn(dice, genuine, options.bad_secret)):
        if number % 2:
            late.append(_forged(number, order_id, origin))
            continue
        ghost = _forged(number, guid(options.seed, "ghost", number), origin)
        if alone:
            first.append(ghost)
        else:  # the first one comes by itself: only then does the answer show that it was refused
            alone.append(Post((ghost,), "values"))
    dice.shuffle(first)
    dice.shuffle(late)
    return Plan(
        tuple(settled),
        _timed([*alone, *_batches(dice, first, options.batch)], options.rate),
        _timed(_batches(dice, late, options.batch), options.rate),
    )


def _drawn(dice: random.Random, ids: Iterable[str], share: float) -> list[str]:
    known = list(ids)
    return dice.sample(known, min(len(known), max(round(share * len(known)), 1 if share else 0)))


def _forged(number: int, order_id: str, origin: Origin) -> Shot:
    """Return an event with a clientState that is nearly right, or none."""
    right = origin.client_state
    wrong = (f"not-{right}"[:_LONGEST_STATE], "", right.swapcase(), right[:-1], f"{right} "[-_LONGEST_STATE:])
    event = origin.event(order_id, "CM-FORGED", "Issued", event_timestamp(), wrong[number % len(wrong)])
    return Shot("forged", event)


def _batches(dice: random.Random, shots: Sequence[Shot], batch: int) -> list[Post]:
    """Return the shots in POSTs of 1 to `batch`, in all documented shapes."""
    posts: list[Post] = []
    at = 0
    while at < len(shots):
        some = tuple(shots[at : at + dice.randint(1, batch)])
        shapes: tuple[Shape, ...] = ("values", "value", "bare") if len(some) == 1 else ("values", "value")
        posts.append(Post(some, dice.choice(shapes)))
        at += len(some)
    return posts


def _timed(posts: Sequence[Post], rate: float | None) -> tuple[Post, ...]:
    """Return the posts with the seconds at which they are sent."""
    timed, events = [], 0
    for post in posts:
        timed.append(msgspec.structs.replace(post, at=events / rate if rate else 0.0))
        events += len(post.shots)
    return tuple(timed)
