"""The HTTP endpoint: limits on the body, the sender's handshake, probes, and ONE table from errors to answers."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from hmac import compare_digest
from time import perf_counter
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from app import log
from app.errors import BodyTooLarge, BodyTooSlow, MalformedEnvelope, NotRecorded, RequestRefused
from app.health import Check, Health
from app.intake import Intake, Receipt

BODY_SECONDS: Final = 10.0
"""A body slower than this is answered 408."""

RETRY_AFTER: Final = 5
"""Seconds a sender is asked to wait when nothing could hold its events."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=%:-]{1,1024}")
_log = log.get()
_encode = msgspec.json.Encoder().encode


class Webhook:
    """The endpoint of the subscription."""

    def __init__(self, intake: Intake, max_body_bytes: int, body_seconds: float = BODY_SECONDS) -> None:
        self._intake = intake
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI app of its own: Starlette's wrapping of functions is a tenth of a small request."""
        request = Request(scope, receive)
        fields, request_id = scope["state"]["line"], scope["state"]["request_id"]
        answer = {"POST": self._receive, "GET": self._handshake}.get(request.method, _not_allowed)
        try:
            response = await answer(request, fields, request_id)
        except RequestRefused as refusal:
            fields["reason"] = refusal.reason
            response = refused(refusal, request_id)
        except ClientDisconnect:
            _log.info("request.client_gone", path=request.url.path)
            response = Response(status_code=400)
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
    if isinstance(refusal, NotRecorded):
        response.headers["retry-after"] = str(RETRY_AFTER)
        _log.error("intake.unavailable", error=refusal.cause)
    if isinstance(refusal, BodyTooLarge | BodyTooSlow):
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
    for name in ("queued", "coalesced", "duplicates", "ignored"):
        if count := getattr(receipt, name):
            fields[name] = count
    if receipt.put_aside:
        fields["put_aside"] = sum(receipt.put_aside.values())


class Probes:
    """`/healthz` process lives, `/readyz` invariant 1 can be kept, `/metrics` for those who hold OPS_TOKEN."""

    def __init__(self, health: Health, metrics: Callable[[], Any], ops_token: str | None) -> None:
        self._health = health
        self._metrics = metrics
        self._ops_token = ops_token

    async def live(self, request: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def ready(self, request: Request) -> Response:
        checks = await self._health.checks()
        state = Health.state(checks)
        status = 503 if state == "not ready" else 200
        if not self._is_ops(request):
            return PlainTextResponse(f"{state}\n", status)
        return Response(
            _encode({"state": state, "checks": [_shown(c) for c in checks]}),
            status,
            media_type="application/json",
        )

    async def metrics(self, request: Request) -> Response:
        if self._ops_token is None:
            return PlainTextResponse("not found\n", 404)
        if not self._is_ops(request):
            return PlainTextResponse("bearer token needed\n", 401, {"www-authenticate": "Bearer"})
        content, content_type = await self._metrics()
        return Response(content, headers={"content-type": content_type})

    def _is_ops(self, request: Request) -> bool:
        if self._ops_token is None:
            return False
        given = request.headers.get("authorization", "").encode("latin-1")
        return compare_digest(given, b"Bearer " + self._ops_token.encode())


def _shown(check: Check) -> dict[str, Any]:
    return {"check": check.name, "ok": check.ok, "detail": check.detail}


class CanonicalLine:
    """Outermost ASGI layer: a request id for everything that is logged below, and one line a request."""

    def __init__(self, app: ASGIApp, quiet: frozenset[str]) -> None:
        self._app = app
        self._quiet = quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        request_id = os.urandom(8).hex()
        fields: dict[str, Any] = {}
        state = scope.setdefault("state", {})
        state["request_id"], state["line"] = request_id, fields
        status: int | None = None

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        clear_contextvars()
        bind_contextvars(request_id=request_id)
        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            _log.error("request.failed", path=scope["path"], error=type(error).__name__, trace=log.trace_of(error))
            # Starlette answers 500 before it raises; a second answer would be an error of its own.
            if status is None:
                await _internal_error()(scope, receive, noting)
        finally:
            if scope["path"] not in self._quiet or status is None or status >= 400:
                _log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"][:200],
                    status=status or 500,
                    duration_ms=round((perf_counter() - started) * 1000, 2),
                    **fields,
                )


def _internal_error() -> Response:
    return PlainTextResponse("internal error\n", 500)


def application(
    *,
    webhook_path: str,
    webhook: Webhook,
    probes: Probes,
    resources: Callable[[], AbstractAsyncContextManager[None]],
) -> ASGIApp:
    """Return the ASGI app; `resources` are opened at start-up and closed at shutdown."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with resources():
            yield

    app = Starlette(
        routes=[
            Route(webhook_path, webhook),
            Route("/healthz", probes.live),
            Route("/readyz", probes.ready),
            Route("/metrics", probes.metrics),
        ],
        lifespan=lifespan,
    )
    # A redirect would name the host that the request claims, and senders of events do not follow one.
    app.router.redirect_slashes = False
    return CanonicalLine(app, quiet=frozenset({"/healthz", "/readyz", "/metrics"}))
