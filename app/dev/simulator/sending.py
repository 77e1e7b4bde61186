"""Sends the POSTs as a sender does that tries again when it is told to, and notes every answer and its time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, Final

import httpx
import msgspec

from app.dev.simulator.plan import Post

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
