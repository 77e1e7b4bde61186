"""One HTTP answer, and how refusals and faults become one.

What is not done, and in which words: the Channel Manager's error codes and texts.

The caller's end of the line: whether it still listens while a call is kept waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

import msgspec

from app.dev.sandbox.faults import Fault


class Refusal(Exception):
    """A call is answered with an error status.

    With a `code` the body is `{"code", "message"}`, as AL and the gateway write it; without one it is plain text, as
    what stands before the gateway answers.
    """

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def bad_request(message: str) -> Refusal:
    """Return the 400 that AL answers to everything it does not like, its own errors included."""
    return Refusal(400, "generic_error", message)


def not_found(what: str) -> Refusal:
    """Return the 404 of AL; it adds its own words to those it is given."""
    return Refusal(404, "resource_not_found", f"{what} Not Found")


def no_order(order_id: str) -> Refusal:
    """Return the 404 of an order; AL prints a GUID in braces and upper case."""
    return not_found(f"Order '{{{order_id.upper()}}}' not found")


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def hung_up(receive: Receive) -> None:
    """Return when the caller closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def outlasts(receive: Receive, seconds: float) -> bool:
    """Wait `seconds`; return early, and False, when the caller hangs up."""
    gone = asyncio.ensure_future(hung_up(receive))
    done, _ = await asyncio.wait({gone}, timeout=seconds)
    gone.cancel()
    return not done


async def read_body(receive: Receive) -> bytes:
    """Return the whole body of a request."""
    whole = bytearray()
    while True:
        message = await receive()
        whole += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(whole)


_ENCODER = msgspec.json.Encoder()
_JSON, _TEXT = b"application/json", b"text/plain; charset=utf-8"
_ALWAYS = [
    (b"x-npr-version", b"1.0.0.0"),
    (b"x-bc-platform-version", b"26.0.0.0"),
    (b"x-server-cache-id", b"1"),
]
_RUBBISH = b"<html><body><h1>The service is not there</h1></body></html>"


class Answer(NamedTuple):
    """An answer; `sound` is False once a fault has spoilt it, `breaks_off` when the line breaks in its middle."""

    status: int
    body: bytes
    content_type: bytes = _JSON
    retry_after: str | None = None
    sound: bool = True
    breaks_off: bool = False

    async def give(self, send: Send) -> None:
        """Send it."""
        headers = [
            (b"content-type", self.content_type),
            (b"content-length", str(len(self.body)).encode()),
            *_ALWAYS,
        ]
        if self.retry_after is not None:
            headers.append((b"retry-after", self.retry_after.encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        if self.breaks_off:
            half = self.body[: len(self.body) // 2]
            await send({"type": "http.response.body", "body": half, "more_body": True})
            return
        await send({"type": "http.response.body", "body": self.body})


def json(value: Any, status: int = 200) -> Answer:
    """Return `value` as JSON."""
    return Answer(status, _ENCODER.encode(value))


def refused(refusal: Refusal) -> Answer:
    """Return the error body of a refusal."""
    if refusal.code is None:
        return Answer(refusal.status, refusal.message.encode(), _TEXT)
    return json({"code": refusal.code, "message": refusal.message}, refusal.status)


def faulty(fault: Fault, order_id: str) -> Answer:
    """Return the answer of a `status` fault; 403 and 404 without words of their own get upstream's."""
    if fault.code is None and fault.message is None and fault.status == 404:
        answer = refused(no_order(order_id))
    elif fault.code is None and fault.message is None and fault.status == 403:
        answer = refused(Refusal(403, "generic_error", "Missing permissions: NPR API Channel Mgr"))
    else:
        answer = refused(Refusal(fault.status, fault.code, fault.message or f"Status {fault.status}"))
    return answer if fault.retry_after is None else answer._replace(retry_after=str(fault.retry_after))


def spoilt(answer: Answer, fault: Fault, order_id: str, other_id: str) -> Answer:
    """Return a good answer as a fault leaves it."""
    match fault.kind:
        case "truncated":
            return answer._replace(body=answer.body[: len(answer.body) // 2], sound=False)
        case "cut":
            return answer._replace(sound=False, breaks_off=True)
        case "rubbish":
            return answer._replace(body=_RUBBISH, content_type=b"text/html", sound=False)
        case "wrong_order":
            body = answer.body.replace(order_id.encode(), other_id.encode())
            return answer._replace(body=body, sound=False)
    return answer
