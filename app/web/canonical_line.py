"""A request id for everything that is logged below, and one line a request."""

from __future__ import annotations

import os
from time import perf_counter
from typing import Any

from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from app import log

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
