"""The routes of the web process, put together.

A request id for everything that is logged below, and one line a request.

What load balancers, container platforms and Prometheus ask.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from hmac import compare_digest
from time import perf_counter
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from app import log
from app.errors import ReceiverError
from app.health import Check, Health
from app.metrics import CONTENT_TYPE
from app.web.webhook import Webhook

_log = log.get()


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


_encode = msgspec.json.Encoder().encode


class Probes:
    """`/healthz` process lives, `/readyz` invariant 1 can be kept, `/metrics` for those who hold OPS_TOKEN."""

    def __init__(self, health: Health, metrics: Callable[[], Awaitable[bytes]], ops_token: str | None) -> None:
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
        try:
            return Response(await self._metrics(), headers={"content-type": CONTENT_TYPE})
        except ReceiverError:
            return PlainTextResponse("the counters cannot be read now\n", 503)

    def _is_ops(self, request: Request) -> bool:
        if self._ops_token is None:
            return False
        given = request.headers.get("authorization", "").encode("latin-1")
        return compare_digest(given, b"Bearer " + self._ops_token.encode())


def _shown(check: Check) -> dict[str, Any]:
    return {"check": check.name, "ok": check.ok, "detail": check.detail}


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
