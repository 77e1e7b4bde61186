"""What load balancers, container platforms and Prometheus ask."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hmac import compare_digest
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from app.errors import ReceiverError
from app.health import Check, Health
from app.store.counters import CONTENT_TYPE

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
