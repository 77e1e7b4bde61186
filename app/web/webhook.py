"""The endpoint of the subscription: limits on the body, the handshake, and ONE table from errors to answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, Final

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from app import log
from app.errors import BodyTooLarge, BodyTooSlow, MalformedEnvelope, NotRecorded, RequestRefused, TryLater
from app.intake.service import Intake, Receipt

BODY_SECONDS: Final = 10.0
"""A body slower than this is answered 408."""

AT_ONCE: Final = 1000
"""Requests under way at once; each may hold MAX_BODY_BYTES."""

RETRY_AFTER: Final = 5
"""Seconds a sender is asked to wait when nothing could hold its events."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=%:-]{1,1024}")
_log = log.get()
_encode = msgspec.json.Encoder().encode


class Webhook:
    """The endpoint of the subscription."""

    def __init__(
        self,
        intake: Intake,
        count: Callable[[str, str, int], None],
        max_body_bytes: int,
        body_seconds: float = BODY_SECONDS,
        at_once: int = AT_ONCE,
    ) -> None:
        self._intake = intake
        self._count = count
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds
        self._at_once = at_once
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI app of its own: Starlette's wrapping of functions is a tenth of a small request."""
        request = Request(scope, receive)
        fields, request_id = scope["state"]["line"], scope["state"]["request_id"]
        answer = {"POST": self._receive, "GET": self._handshake}.get(request.method, _not_allowed)
        self._under_way += 1
        try:
            if self._under_way > self._at_once:
                raise TryLater("overloaded")
            response = await answer(request, fields, request_id)
        except RequestRefused as refusal:
            fields["reason"] = refusal.reason
            response = refused(refusal, request_id)
        except asyncio.CancelledError:
            # Only the end of this process cancels a request (server.LAST_SECONDS); it is not recorded for certain.
            fields["reason"] = "shutting_down"
            response = refused(TryLater("shutting_down"), request_id)
        except ClientDisconnect:
            _log.info("request.client_disconnected", path=request.url.path)
            response = Response(status_code=400)
        finally:
            self._under_way -= 1
        self._count("requests", str(response.status_code), 1)
        await response(scope, receive, send)

    async def _receive(self, request: Request, fields: dict[str, Any], request_id: str) -> Response:
        """Return 200 when everything good in the body is recorded; raises RequestRefused, ClientDisconnect."""
        body = await self._body(request)
        fields["bytes"] = len(body)
        token = request.query_params.get("validationToken")
        if token is not None and not body.strip():
            return _echo(token)
        receipt = await self._intake.receive(body, request_id)
        _describe(fields, receipt)
        return Response(_encode(receipt), media_type="application/json")

    async def _handshake(self, request: Request, fields: dict[str, Any], request_id: str) -> Response:
        """Return the validationToken of the sender's GET; raises MalformedEnvelope."""
        token = request.query_params.get("validationToken")
        return _echo(token) if token is not None else await _not_allowed(request, fields, request_id)

    async def _body(self, request: Request) -> bytes:
        """Return the body; the rest of one too large is left unread.

        Raises BodyTooLarge, BodyTooSlow, ClientDisconnect.
        """
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_body_bytes:
            raise BodyTooLarge
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > self._max_body_bytes:
                        raise BodyTooLarge
                    chunks.append(chunk)
        except TimeoutError:
            raise BodyTooSlow from None
        return b"".join(chunks)


def refused(refusal: RequestRefused, request_id: str) -> Response:
    """Return the answer of the table for a refused request: its status and its reason code."""
    response = Response(
        _encode({"reason": refusal.reason, "request_id": request_id}),
        refusal.status,
        media_type="application/json",
    )
    if isinstance(refusal, NotRecorded | TryLater):
        response.headers["retry-after"] = str(RETRY_AFTER)
    if isinstance(refusal, NotRecorded):
        _log.error("intake.unavailable", error=refusal.cause)
    if isinstance(refusal, BodyTooLarge | BodyTooSlow | TryLater):
        response.headers["connection"] = "close"
    return response


def _echo(token: str) -> Response:
    if not _TOKEN.fullmatch(token):
        raise MalformedEnvelope("bad_validation_token")
    return PlainTextResponse(token, headers={"x-content-type-options": "nosniff"})


async def _not_allowed(request: Request, fields: dict[str, Any], request_id: str) -> Response:
    return PlainTextResponse("POST events here\n", 405, {"allow": "POST"})


def _describe(fields: dict[str, Any], receipt: Receipt) -> None:
    fields["events"] = receipt.events
    for name in ("queued", "coalesced", "duplicates", "spooled", "erased", "ignored"):
        if count := getattr(receipt, name):
            fields[name] = count
    if receipt.invalid_items:
        fields["invalid_items"] = sum(receipt.invalid_items.values())
