"""The path that every event takes through web: a POST for the webhook, from its scope to its answer.

It does without the router, middleware, Request and Response of Starlette, which serve all other requests: with them,
two writes an answer and a time-out for every body, a POST of one event took 1.3 times the CPU time.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from typing import Any, Final

import msgspec
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from app import log
from app.errors import NotRecorded, RequestRefused, Unauthenticated
from app.intake.service import Intake, Receipt

BODY_SECONDS: Final = 10.0
"""A body slower than this is answered 408."""

AT_ONCE: Final = 1000
"""POSTs under way at once; each may hold MAX_BODY_BYTES."""

RETRY_AFTER: Final = 5
"""Seconds a sender is asked to wait after a 503."""

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_OUTCOMES: Final = ("queued", "coalesced", "duplicates", "spooled", "erased", "ignored")
_JSON: Final = (b"content-type", b"application/json")
_log = log.get()
_encode = msgspec.json.Encoder().encode


class Webhook:
    """Answers POSTs, as an ASGI app, and the handshake.

    `scope["state"]` holds `request_id`, `traceparent`, `line`, the fields of the request's log line, and, where the
    server knows that the whole body has arrived, `is_whole`.
    """

    def __init__(self, intake: Intake, max_body_bytes: int) -> None:
        self._intake = intake
        self._max_body_bytes = max_body_bytes
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a POST; raises what no part of the service expects, after the answer 500."""
        self._under_way += 1
        try:
            if self._under_way > AT_ONCE:
                raise RequestRefused(503, "overloaded")
            answer: Response = await self._receive(scope, receive)
        except RequestRefused as refusal:
            answer = refused(scope, refusal)
        except ClientDisconnect:
            # The answer is for the log line.
            _log.info("request.client_disconnected", path=scope["path"])
            answer = Response(status_code=400)
        except asyncio.CancelledError:
            # Only the end of the process cancels a request (server.LAST_SECONDS); it may or may not be recorded.
            answer = refused(scope, RequestRefused(503, "shutting_down"))
        except Exception:
            await PlainTextResponse("Internal Server Error", 500)(scope, receive, send)
            raise
        finally:
            self._under_way -= 1
        await answer(scope, receive, send)

    async def handshake(self, request: Request) -> Response:
        """Answer a GET: return its validationToken; raises RequestRefused, or HTTPException if there is none."""
        token = request.query_params.get("validationToken")
        if token is None:
            raise HTTPException(405, headers={"allow": "POST"})
        return _echo(token)

    async def _receive(self, scope: Scope, receive: Receive) -> Response:
        """Return 200 when everything valid in the body is recorded; raises RequestRefused, ClientDisconnect."""
        state = scope["state"]
        line = state["line"]
        body = await self._body(scope, receive)
        line["bytes"] = len(body)
        token = QueryParams(scope["query_string"]).get("validationToken") if scope["query_string"] else None
        if token is not None and not body.strip():
            return _echo(token)
        receipt = await self._intake.receive(body, state["request_id"], state["traceparent"])
        line["events"] = receipt.events
        for name in _OUTCOMES:
            if count := getattr(receipt, name):
                line[name] = count
        if receipt.invalid_items:
            line["invalid_items"] = sum(receipt.invalid_items.values())
        return _Accepted(receipt)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body; the rest of one that is too large stays unread.

        Raises RequestRefused, ClientDisconnect.
        """
        length, encodings = b"", []
        for name, value in scope["headers"]:
            if name == b"content-length":
                length = value
            elif name == b"content-encoding":
                encodings.append(value.strip().lower())
        # A header that is repeated is one list (RFC 9110 5.3): of a body that is encoded twice nothing is guessed.
        encoding = b", ".join(encodings) if encodings else b"identity"
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            raise RequestRefused(413, "body_too_large")
        if "is_whole" in scope["state"]:
            body = await self._read(receive)
        else:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await self._read(receive)
            except TimeoutError:
                raise RequestRefused(408, "body_too_slow") from None
        if encoding in {b"gzip", b"x-gzip"}:
            return _inflated(body, self._max_body_bytes)
        if encoding != b"identity":
            raise RequestRefused(415, "unknown_encoding")
        return body

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message["body"]
            if len(body) > self._max_body_bytes:
                raise RequestRefused(413, "body_too_large")
            if not message["more_body"]:
                return bytes(body)


class _Accepted(Response):
    """The answer 200. Starlette's own constructor and its headers cost 3 % of the CPU time of a POST of one event."""

    def __init__(self, receipt: Receipt) -> None:
        self.status_code = 200
        self.background = None
        self.body = _encode(receipt)
        self.raw_headers = [(b"content-length", b"%d" % len(self.body)), _JSON]


def refused(scope: Scope, error: RequestRefused) -> Response:
    """Return the answer with its status and reason code; the request's log line gets the reason."""
    state: dict[str, Any] = scope["state"]
    state["line"]["reason"] = error.reason
    response = Response(
        _encode({"reason": error.reason, "request_id": state["request_id"]}),
        error.status,
        media_type="application/json",
    )
    if error.status == 503:
        response.headers["retry-after"] = str(RETRY_AFTER)
    if isinstance(error, Unauthenticated):
        state["line"]["company"] = error.company
    if isinstance(error, NotRecorded):
        _log.error("intake.unavailable", error=error.error, cause=error.cause or None)
    elif error.status == 415:
        response.headers["accept-encoding"] = "gzip"
    elif error.status in {408, 413, 503}:
        response.headers["connection"] = "close"
    return response


def _inflated(body: bytes, at_most: int) -> bytes:
    """Return what a gzip body holds; raises RequestRefused: 413 above `at_most` bytes, 400 if it is damaged."""
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        whole = inflate.decompress(body, at_most + 1)
    except zlib.error:
        raise RequestRefused(400, "not_gzip") from None
    if len(whole) > at_most:
        raise RequestRefused(413, "body_too_large")
    if not inflate.eof or inflate.unused_data:
        raise RequestRefused(400, "not_gzip")
    return whole


def _echo(token: str) -> Response:
    if not token or _CONTROL.search(token):
        raise RequestRefused(400, "bad_validation_token")
    return PlainTextResponse(token, headers={"x-content-type-options": "nosniff"})
