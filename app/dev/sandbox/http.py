"""HTTP as the Channel Manager speaks it: answers, and refusals with their codes."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import msgspec
from starlette.types import Send

T = TypeVar("T")

_HEADERS = [
    (b"x-npr-version", b"1.0.0.0"),
    (b"x-bc-platform-version", b"26.0.0.0"),
    (b"x-server-cache-id", b"1"),
]


class Answer(NamedTuple):
    """An answer; a fault clears `sound`, and with `breaks_off` the connection breaks in the middle of the body."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
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


class Refusal(Exception):
    """A call is answered with an error status.

    With a `code` the body is `{"code", "message"}`, as AL and the gateway write it. Without one it is plain text, as a
    proxy in front of the gateway answers.
    """

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    @property
    def answer(self) -> Answer:
        if self.code is None:
            return Answer(self.status, str(self).encode(), b"text/plain; charset=utf-8")
        return json({"code": self.code, "message": str(self)}, self.status)


def json(value: Any, status: int = 200) -> Answer:
    """Return `value` as JSON."""
    return Answer(status, msgspec.json.encode(value))


def bad_request(message: str) -> Refusal:
    """Return the 400 with which AL answers every error, its own included."""
    return Refusal(400, "generic_error", message)


def not_found(what: str) -> Refusal:
    """Return the 404 of AL, which adds words to the given text."""
    return Refusal(404, "resource_not_found", f"{what} Not Found")


def no_order(order_id: str) -> Refusal:
    """Return the 404 of an order; AL prints a GUID in braces and upper case."""
    return not_found(f"Order '{{{order_id.upper()}}}' not found")


def forbidden() -> Refusal:
    """Return the 403 of a key without the permission set of the Channel Manager."""
    return Refusal(403, "generic_error", "Missing permissions: NPR API Channel Mgr")


def decode(body: bytes, kind: type[T]) -> T:
    """Return the JSON in `body` as `kind`; raises Refusal (400)."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:
        raise bad_request(str(error)) from None
