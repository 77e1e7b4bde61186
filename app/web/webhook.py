"""The endpoint of the subscription: limits on the body, the handshake, and the answers to refused requests."""

from __future__ import annotations

import asyncio
import re
from typing import Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ExceptionHandler, Receive, Scope, Send

from app import log
from app.errors import NotRecorded, RequestRefused
from app.intake.service import Intake

BODY_SECONDS: Final = 10.0
"""A body slower than this is answered 408."""

AT_ONCE: Final = 1000
"""POSTs under way at once; each may hold MAX_BODY_BYTES."""

RETRY_AFTER: Final = 5
"""Seconds a sender is asked to wait after a 503."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=%:-]{1,1024}")
_log = log.get()
_encode = msgspec.json.Encoder().encode


class Webhook:
    """Answers POSTs and the handshake; each method raises RequestRefused, which `refused` answers.

    `request.state` holds `request_id` and `line`, the fields of the request's log line.
    """

    def __init__(self, intake: Intake, max_body_bytes: int) -> None:
        self._intake = intake
        self._max_body_bytes = max_body_bytes
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a POST.

        An ASGI app and no function, since Starlette's wrapper of functions and two reads of `request.state` cost 6 µs
        of the 140 µs of CPU time that a POST of one event takes: 4 %.
        """
        self._under_way += 1
        try:
            if self._under_way > AT_ONCE:
                raise RequestRefused(503, "overloaded")
            response = await self._receive(Request(scope, receive))
        except asyncio.CancelledError:
            # Only the end of the process cancels a request (server.LAST_SECONDS); it may or may not be recorded.
            raise RequestRefused(503, "shutting_down") from None
        finally:
            self._under_way -= 1
        await response(scope, receive, send)

    async def handshake(self, request: Request) -> Response:
        """Answer a GET: return its validationToken; raises RequestRefused, or HTTPException if there is none."""
        token = request.query_params.get("validationToken")
        if token is None:
            raise HTTPException(405, headers={"allow": "POST"})
        return _echo(token)

    async def _receive(self, request: Request) -> Response:
        """Return 200 when everything valid in the body is recorded; raises RequestRefused, ClientDisconnect."""
        state = request.scope["state"]
        line = state["line"]
        body = await self._body(request)
        line["bytes"] = len(body)
        token = request.query_params.get("validationToken")
        if token is not None and not body.strip():
            return _echo(token)
        receipt = await self._intake.receive(body, state["request_id"])
        line["events"] = receipt.events
        for name in ("queued", "coalesced", "duplicates", "spooled", "erased", "ignored"):
            if count := getattr(receipt, name):
                line[name] = count
        if receipt.invalid_items:
            line["invalid_items"] = sum(receipt.invalid_items.values())
        return Response(_encode(receipt), media_type="application/json")

    async def _body(self, request: Request) -> bytes:
        """Return the body; the rest of one that is too large stays unread.

        Raises RequestRefused, ClientDisconnect.
        """
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_body_bytes:
            raise RequestRefused(413, "body_too_large")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._max_body_bytes:
                        raise RequestRefused(413, "body_too_large")
        except TimeoutError:
            raise RequestRefused(408, "body_too_slow") from None
        return bytes(body)


async def refused(request: Request, error: Exception) -> Response:
    """Return the status and the reason code of a RequestRefused."""
    assert isinstance(error, RequestRefused)
    request.state.line["reason"] = error.reason
    response = Response(
        _encode({"reason": error.reason, "request_id": request.state.request_id}),
        error.status,
        media_type="application/json",
    )
    if error.status == 503:
        response.headers["retry-after"] = str(RETRY_AFTER)
    if isinstance(error, NotRecorded):
        _log.error("intake.unavailable", error=error.cause)
    elif error.status in {408, 413, 503}:
        response.headers["connection"] = "close"
    return response


async def _disconnected(request: Request, error: Exception) -> Response:
    """Return an answer for the log line; the client has closed its connection."""
    _log.info("request.client_disconnected", path=request.url.path)
    return Response(status_code=400)


EXCEPTION_HANDLERS: Final[dict[type[Exception], ExceptionHandler]] = {
    RequestRefused: refused,
    ClientDisconnect: _disconnected,
}


def _echo(token: str) -> Response:
    if not _TOKEN.fullmatch(token):
        raise RequestRefused(400, "bad_validation_token")
    return PlainTextResponse(token, headers={"x-content-type-options": "nosniff"})
