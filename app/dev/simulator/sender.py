"""Sends the POSTs as a sender does that tries again when it is told to, and notes every answer and its time.

What will be sent: events of settled orders, repeated, held back and forged as wished, gathered into POSTs.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any, Final, Literal

import httpx
import msgspec

from app.dev.sandbox.events import Event, Payload, wrapped
from app.dev.sandbox.settings import Shape, guid, timestamp

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


_CONNECTIONS: Final = 32
_TRIES: Final = 5
_AGAIN: Final = 0.5
"""Seconds between the tries of a POST that was answered 408, 429 or 5xx, or not at all."""
_TIMEOUT: Final = 10.0
_HEADERS: Final = {"content-type": "application/json"}


class Answer(msgspec.Struct, frozen=True):
    """What one try got: the status, or the name of what prevented one; `receipt` is the body if it is an object."""

    post: Post
    said: str
    seconds: float
    receipt: dict[str, Any]

    @property
    def well(self) -> bool:
        return self.said.startswith("2")

    @property
    def final(self) -> bool:
        """Return whether a sender leaves it at that: any answer but 408, 429 and 5xx."""
        return self.said.isdecimal() and self.said not in {"408", "429"} and self.said < "500"


def send(url: str, posts: Iterable[Post], rate: float | None, sent: Callable[[int], None]) -> list[Answer]:
    """Send the posts, at `rate` events a second or all at once, and return the answer of every try.

    `sent` is called with the number of events of each POST that is done with.
    """
    return asyncio.run(_send_all(url, list(posts), rate, sent))


async def _send_all(url: str, posts: list[Post], rate: float | None, sent: Callable[[int], None]) -> list[Answer]:
    answers: list[Answer] = []
    turns = iter(_timed(posts, rate))
    limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    begun = monotonic()

    async def one(http: httpx.AsyncClient) -> None:
        for at, post in turns:
            await asyncio.sleep(max(0.0, begun + at - monotonic()))
            for _ in range(_TRIES):
                answer = await _try(http, url, post)
                answers.append(answer)
                if answer.final:
                    break
                await asyncio.sleep(_AGAIN)
            sent(len(post.shots))

    # Proxies of the environment are none of ours: the events go where they were told to.
    async with (
        httpx.AsyncClient(limits=limits, headers=_HEADERS, trust_env=False, timeout=_TIMEOUT) as http,
        asyncio.TaskGroup() as senders,
    ):
        for _ in range(_CONNECTIONS):
            senders.create_task(one(http))
    return answers


def _timed(posts: list[Post], rate: float | None) -> Iterable[tuple[float, Post]]:
    """Return each post with the second at which its turn is."""
    events = 0
    for post in posts:
        yield events / rate if rate else 0.0, post
        events += len(post.shots)


async def _try(http: httpx.AsyncClient, url: str, post: Post) -> Answer:
    begun = monotonic()
    try:
        response = await http.post(url, content=post.body)
    except httpx.HTTPError as error:
        return Answer(post, type(error).__name__, monotonic() - begun, {})
    return Answer(post, str(response.status_code), monotonic() - begun, _object(response.content))


def _object(body: bytes) -> dict[str, Any]:
    try:
        tree = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
