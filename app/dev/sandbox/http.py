"""HTTP as the Channel Manager speaks it: answers, refusals with their codes, and whether the caller still listens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple, TypeVar

import msgspec

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")

_ENCODER = msgspec.json.Encoder()
_JSON, _TEXT = b"application/json", b"text/plain; charset=utf-8"
_HEADERS = [
    (b"x-npr-version", b"1.0.0.0"),
    (b"x-bc-platform-version", b"26.0.0.0"),
    (b"x-server-cache-id", b"1"),
]


class Refusal(Exception):
    """A call is answered with an error status.

    With a `code` the body is `{"code", "message"}`, as AL and the gateway write it. Without one it is plain text, as a
    proxy in front of the gateway answers.
    """

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class Answer(NamedTuple):
    """An answer; a fault clears `sound`, and with `breaks_off` the connection breaks in the middle of the body."""

    status: int
    body: bytes
    content_type: bytes = _JSON
    retry_after: str | None = None
    sound: bool = True
    breaks_off: bool = False

    async def send(self, send: Send) -> None:
        """Send the answer."""
        headers = [
            (b"content-type", self.content_type),
            (b"content-length", str(len(self.body)).encode()),
            *_HEADERS,
        ]
        if self.retry_after is not None:
            headers.append((b"retry-after", self.retry_after.encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        body = self.body[: len(self.body) // 2] if self.breaks_off else self.body
        await send({"type": "http.response.body", "body": body, "more_body": self.breaks_off})


def bad_request(message: str) -> Refusal:
    """Return the 400 with which AL answers every error, its own included."""
    return Refusal(400, "generic_error", message)


def not_found(what: str) -> Refusal:
    """Return the 404 of AL, which adds words to the given text."""
    return Refusal(404, "resource_not_found", f"{what} Not Found")


def no_order(order_id: str) -> Refusal:
    """Return the 404 of an order; AL prints a GUID in braces and upper case."""
    return not_found(f"Order '{{{order_id.upper()}}}' not found")


def json(value: Any, status: int = 200) -> Answer:
    """Return `value` as JSON."""
    return Answer(status, _ENCODER.encode(value))


def refused(refusal: Refusal) -> Answer:
    """Return the error body of a refusal."""
    if refusal.code is None:
        return Answer(refusal.status, refusal.message.encode(), _TEXT)
    return json({"code": refusal.code, "message": refusal.message}, refusal.status)


def decode(body: bytes, kind: type[T]) -> T:
    """Return the JSON in `body` as `kind`; raises Refusal (400)."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:
        raise bad_request(str(error)) from None


async def read_body(receive: Receive) -> bytes:
    """Return the whole body of a request."""
    whole = bytearray()
    while True:
        message = await receive()
        whole += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(whole)


async def disconnected(receive: Receive) -> None:
    """Return when the caller closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def connected_for(receive: Receive, seconds: float) -> bool:
    """Wait `seconds`; return early, and False, when the caller disconnects."""
    leaving = asyncio.ensure_future(disconnected(receive))
    done, _ = await asyncio.wait({leaving}, timeout=seconds)
    leaving.cancel()
    return not done
