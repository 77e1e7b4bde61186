"""The routes of the web process, the request id and the log line of each request, and the probes."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from hmac import compare_digest
from time import perf_counter
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from app import log
from app.errors import ReceiverError
from app.health import Health
from app.metrics import CONTENT_TYPE
from app.web.webhook import EXCEPTION_HANDLERS, Webhook

_PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})

_log = log.get()
_encode = msgspec.json.Encoder().encode


def application(
    *,
    webhook_path: str,
    webhook: Webhook,
    probes: Probes,
    count: Callable[[str, str, int], None],
    resources: Callable[[], AbstractAsyncContextManager[None]],
) -> ASGIApp:
    """Return the ASGI app.

    `count` adds to a metric with one label; `resources` are opened at start-up and closed at shutdown.
    """

    app = Starlette(
        routes=[
            Route(webhook_path, webhook, methods=["POST"]),
            Route(webhook_path, webhook.handshake, methods=["GET"]),
            Route("/healthz", probes.live),
            Route("/readyz", probes.ready),
            Route("/metrics", probes.metrics),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lambda _: resources(),
    )
    # A redirect would name the host that the request claims, and senders of events do not follow one.
    app.router.redirect_slashes = False
    return RequestLog(app, webhook_path, count)


class RequestLog:
    """The outermost layer: gives each request an id, one log line, and a count if it is for the webhook.

    Probes are logged only when they fail.
    """

    def __init__(self, app: ASGIApp, webhook_path: str, count: Callable[[str, str, int], None]) -> None:
        self._app = app
        self._webhook_path = webhook_path
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        request_id = os.urandom(8).hex()
        line: dict[str, Any] = {}
        scope["state"] |= {"request_id": request_id, "line": line}
        status = 500

        async def with_request_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        clear_contextvars()
        bind_contextvars(request_id=request_id)
        path = scope["path"]
        try:
            await self._app(scope, receive, with_request_id)
        except Exception as error:
            # Starlette has answered 500.
            _log.error("request.failed", path=path, error=type(error).__name__, trace=log.trace_of(error))
        finally:
            if path == self._webhook_path:
                self._count("requests", str(status), 1)
            if path not in _PROBES or status >= 400:
                duration_ms = round((perf_counter() - started) * 1000, 2)
                _log.info(
                    "request", method=scope["method"], path=path[:200], status=status, duration_ms=duration_ms, **line
                )


class Probes:
    """`/healthz`: the process runs. `/readyz`: events can be accepted. `/metrics`: with OPS_TOKEN only."""

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
        if not self._is_ops(request.headers):
            return PlainTextResponse(f"{state}\n", status)
        shown = [{"check": check.name, "ok": check.ok, "detail": check.detail} for check in checks]
        return Response(_encode({"state": state, "checks": shown}), status, media_type="application/json")

    async def metrics(self, request: Request) -> Response:
        if self._ops_token is None:
            return PlainTextResponse("not found\n", 404)
        if not self._is_ops(request.headers):
            return PlainTextResponse("bearer token needed\n", 401, {"www-authenticate": "Bearer"})
        try:
            return Response(await self._metrics(), headers={"content-type": CONTENT_TYPE})
        except ReceiverError:
            return PlainTextResponse("the counters cannot be read now\n", 503)

    def _is_ops(self, headers: Mapping[str, str]) -> bool:
        if self._ops_token is None:
            return False
        given = headers.get("authorization", "").encode("latin-1")
        return compare_digest(given, b"Bearer " + self._ops_token.encode())
