"""What will be sent: events of settled orders, repeated, held back and forged as wished, gathered into POSTs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from app.dev.sandbox.event import Event, Payload, wrapped
from app.dev.sandbox.mint import guid, timestamp
from app.dev.sandbox.settings import Shape

_DIGITS: Final = 7
_LONGEST_STATE: Final = 50

Kind = Literal["genuine", "duplicate", "forged"]


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted: shares are of the orders, 0 to 1; `rate` in events a second, None: all at once."""

    orders: int
    duplicates: float
    late: float
    bad_secret: float
    batch: int
    rate: float | None
    seed: int


class Sender(msgspec.Struct, frozen=True):
    """Whose events these are, and the clientState they carry."""

    company_id: str
    company: str
    client_state: str


class Settled(msgspec.Struct, frozen=True):
    """An order that the sandbox has, in the status it has settled in."""

    order_id: str
    reference: str
    status: str


class Shot(msgspec.Struct, frozen=True):
    """One event on its way."""

    kind: Kind
    event: Event

    @property
    def order_id(self) -> str:
        return self.event.payload.order_id


class Post(msgspec.Struct, frozen=True):
    """One POST; `shape` is the wrapper, of which three are documented."""

    shots: tuple[Shot, ...]
    shape: Shape

    @property
    def body(self) -> bytes:
        return wrapped(tuple(shot.event for shot in self.shots), self.shape)

    @property
    def forged(self) -> bool:
        """Return whether nothing in it is genuine."""
        return all(shot.kind == "forged" for shot in self.shots)


class Plan(msgspec.Struct, frozen=True):
    """All POSTs: those of the first wave, and those that come when everything seems to be over."""

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


def make(wish: Wish, settled: Sequence[Settled], sender: Sender) -> Plan:
    """Return the POSTs; each share above 0 makes at least one.

    Half of the repeats come late too, when the order is home. So does every other forged event, which then names a
    real order: whoever believes it pays a getOrder too many. The others name orders that do not exist.
    """
    dice = random.Random(wish.seed)  # noqa: S311  # a plan that the seed repeats, no secret
    genuine = {order.order_id: _genuine(order, sender) for order in settled}
    late_ids = _drawn(dice, genuine, wish.late)
    first = [shot for order_id, shot in genuine.items() if order_id not in late_ids]
    late = [genuine[order_id] for order_id in late_ids]
    for number, order_id in enumerate(_drawn(dice, genuine, wish.duplicates)):
        repeat = Shot("duplicate", genuine[order_id].event)
        (late if number % 2 or order_id in late_ids else first).append(repeat)
    alone: list[Post] = []
    for number, order_id in enumerate(_drawn(dice, genuine, wish.bad_secret)):
        if number % 2:
            late.append(_forged(number, order_id, sender))
            continue
        ghost = _forged(number, guid(wish.seed, "ghost", number), sender)
        if alone:
            first.append(ghost)
        else:  # the first one comes by itself: only there can the answer tell that it was refused
            alone.append(Post((ghost,), "values"))
    dice.shuffle(first)
    dice.shuffle(late)
    return Plan(tuple(settled), (*alone, *_gathered(dice, first, wish.batch)), _gathered(dice, late, wish.batch))


def _drawn(dice: random.Random, ids: Iterable[str], share: float) -> list[str]:
    known = list(ids)
    return dice.sample(known, min(len(known), max(round(share * len(known)), 1 if share else 0)))


def _genuine(order: Settled, sender: Sender) -> Shot:
    return Shot("genuine", _event(order.order_id, order.reference, order.status, sender, sender.client_state))


def _forged(number: int, order_id: str, sender: Sender) -> Shot:
    """Return an event with a clientState that is nearly right, or none."""
    right = sender.client_state
    wrong = (f"not-{right}"[:_LONGEST_STATE], "", right.swapcase(), right[:-1], f"{right} "[-_LONGEST_STATE:])
    return Shot("forged", _event(order_id, "CM-FORGED", "Issued", sender, wrong[number % len(wrong)]))


def _event(order_id: str, reference: str, status: str, sender: Sender, client_state: str) -> Event:
    return Event(
        client_state=client_state,
        company_id=sender.company_id,
        company_name=sender.company,
        initiating_user_aad_object_id=guid("user", sender.company_id),
        payload=Payload(order_id, reference, status),
        timestamp=timestamp(_DIGITS),
    )


def _gathered(dice: random.Random, shots: Sequence[Shot], batch: int) -> tuple[Post, ...]:
    """Return the shots in POSTs of 1 to `batch`, in all documented shapes."""
    posts: list[Post] = []
    at = 0
    while at < len(shots):
        some = tuple(shots[at : at + dice.randint(1, batch)])
        shapes: tuple[Shape, ...] = ("values", "value", "bare") if len(some) == 1 else ("values", "value")
        posts.append(Post(some, dice.choice(shapes)))
        at += len(some)
    return tuple(posts)
