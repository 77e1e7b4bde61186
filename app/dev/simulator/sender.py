"""Sends POSTs, repeats those that fail, and keeps the answer and the time of every attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from threading import Event as Flag
from time import monotonic, time
from typing import Any, Final, Literal

import httpx
import msgspec

from app.dev.sandbox.values import Shape, guid
from app.dev.sandbox.webhooks import Event, Payload, envelope

Kind = Literal["genuine", "duplicate", "forged"]

_TIMEOUT: Final = 10.0
_STOP_LOOK: Final = 0.2
_HEADERS: Final = {"content-type": "application/json"}


class Origin(msgspec.Struct, frozen=True):
    """The company of the events, and the clientState they carry."""

    company_id: str
    company: str
    client_state: str

    def event(
        self, order_id: str, reference: str, status: str, timestamp: str, client_state: str | None = None
    ) -> Event:
        """Return an event of an order; `client_state` replaces the right one."""
        return Event(
            client_state=self.client_state if client_state is None else client_state,
            company_id=self.company_id,
            company_name=self.company,
            initiating_user_aad_object_id=guid("user", self.company_id),
            payload=Payload(order_id, reference, status),
            timestamp=timestamp,
        )


class Shot(msgspec.Struct, frozen=True):
    """One event of a POST."""

    kind: Kind
    event: Event

    @property
    def order_id(self) -> str:
        return self.event.payload.order_id


class Post(msgspec.Struct, frozen=True):
    """One POST, `at` seconds after the start; `shape` is the wrapper, of which three are documented."""

    shots: tuple[Shot, ...]
    shape: Shape
    at: float = 0.0

    @property
    def body(self) -> bytes:
        return envelope(tuple(shot.event for shot in self.shots), self.shape)

    @property
    def forged(self) -> bool:
        """Return whether all its events are forged."""
        return all(shot.kind == "forged" for shot in self.shots)


class Answer(msgspec.Struct, frozen=True):
    """The result of one try.

    `result` is the status, or the name of the error without one; `sent_at` is a Unix time; `receipt` is the body if it
    is a JSON object.
    """

    post: Post
    result: str
    sent_at: float
    seconds: float
    receipt: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Return whether the POST was acknowledged (2xx)."""
        return self.result.startswith("2")

    @property
    def final(self) -> bool:
        """Return whether a sender stops here: any status but 408, 429 and 5xx."""
        return self.result.isdecimal() and self.result not in {"408", "429"} and self.result < "500"


@dataclass
class Sender:
    """Sends posts, each at its time or as soon after as one of `connections` is free.

    A POST without a final answer is repeated after `pause` seconds, `tries` times in all (None: without limit).
    `before` is called with each post before its first try, in the order in which the posts start.
    """

    url: str
    posts: Sequence[Post]
    _: KW_ONLY
    connections: int = 32
    tries: int | None = 5
    pause: float = 0.5
    before: Callable[[Post], None] | None = None
    #: The answers of all tries so far.
    answers: list[Answer] = field(default_factory=list, init=False)
    _stop: Flag = field(default_factory=Flag, init=False)

    def send(self, sent: Callable[[int], None] = lambda _: None) -> list[Answer]:
        """Send all and return the answers; `sent` is called with the number of events of each finished post."""
        asyncio.run(self._send_all(sent))
        return self.answers

    @contextmanager
    def sending(self) -> Iterator[Callable[[], bool]]:
        """Send in a thread as long as the block lasts; yield a function that returns whether something is left.

        That function raises what ended the sending.
        """
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(self.send)

            def busy() -> bool:
                if running.done():
                    running.result()
                return not running.done()

            try:
                yield busy
            finally:
                self._stop.set()

    async def _send_all(self, sent: Callable[[int], None]) -> None:
        turns = iter(self.posts)
        limits = httpx.Limits(max_connections=self.connections, max_keepalive_connections=self.connections)
        started = monotonic()

        async def one(http: httpx.AsyncClient) -> None:
            for post in turns:
                await self._sleep_until(started + post.at)
                if self.before is not None and not self._stop.is_set():
                    self.before(post)
                await self._send(http, post)
                sent(len(post.shots))

        # No proxy of the environment: the events go to the URL that was given.
        async with (
            httpx.AsyncClient(limits=limits, headers=_HEADERS, trust_env=False, timeout=_TIMEOUT) as http,
            asyncio.TaskGroup() as senders,
        ):
            for _ in range(self.connections):
                senders.create_task(one(http))

    async def _send(self, http: httpx.AsyncClient, post: Post) -> None:
        tries = 0
        while not self._stop.is_set():
            answer = await _try(http, self.url, post)
            self.answers.append(answer)
            tries += 1
            if answer.final or tries == self.tries:
                return
            await self._sleep_until(monotonic() + self.pause)

    async def _sleep_until(self, moment: float) -> None:
        while (left := moment - monotonic()) > 0 and not self._stop.is_set():  # noqa: ASYNC110  # another thread sets it
            await asyncio.sleep(min(left, _STOP_LOOK))


async def _try(http: httpx.AsyncClient, url: str, post: Post) -> Answer:
    sent_at, started = time(), monotonic()
    try:
        response = await http.post(url, content=post.body)
    except httpx.HTTPError as error:
        return Answer(post, type(error).__name__, sent_at, monotonic() - started, {})
    return Answer(post, str(response.status_code), sent_at, monotonic() - started, _object(response.content))


def _object(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (ValueError, RecursionError):
        return {}
