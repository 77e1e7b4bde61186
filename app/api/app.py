"""The endpoints of the API: who may call them, what they answer, and their log lines.

Redis is asked in threads, so a slow answer holds one request and not the others. Every answer but that of the two
public paths needs a key; whatever is wrong is answered as a problem (RFC 9457).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app import log
from app.api import openapi
from app.api.answers import Refused, problem
from app.api.keys import ApiKeys, Caller
from app.api.keys import Scope as KeyScope
from app.api.orders import Call, Orders
from app.errors import StoreUnavailable
from app.ledger.redis import Outage, Redis
from app.web.requests import CallerLog, Proxies

LONGEST_BODY: Final = 4096
"""Bytes: an acknowledgement is a cursor."""

BODY_SECONDS: Final = 10.0

RETRY_AFTER: Final = 5
"""Seconds a caller is asked to wait while Redis is unavailable."""

_log = log.get()


class Operation(NamedTuple):
    """What one path does: its method, the scope that a key needs, the query parameters, and what answers it."""

    method: str
    scope: KeyScope
    parameters: frozenset[str]
    answer: Callable[[Call], Response]

    @property
    def allowed(self) -> str:
        return "GET, HEAD" if self.method == "GET" else self.method


def application(
    redis: Redis,
    orders: Orders,
    *,
    requests_per_min: int,
    proxies: Proxies,
    webhook_path: str,
) -> ASGIApp:
    """Return the ASGI app; it closes `redis` at shutdown. `webhook_path` is that of web, for the description."""
    access = Access(redis, requests_per_min)
    paths = {
        "/orders": Operation("GET", "orders:read", orders.LIST, orders.listed),
        "/orders/{order_id}": Operation("GET", "orders:read", orders.ONE, orders.show),
        "/orders/{order_id}/history": Operation("GET", "orders:read", orders.ONE, orders.history),
        "/feed": Operation("GET", "feed", orders.FEED, orders.feed),
        "/feed/ack": Operation("POST", "feed", frozenset(), orders.acknowledge),
    }
    description = openapi.description(webhook_path)
    app = Starlette(
        routes=[
            *[Route(path, Endpoint(path, operation, access)) for path, operation in paths.items()],
            Route("/healthz", Public("/healthz", PlainTextResponse("alive\n"))),
            Route("/openapi.json", Public("/openapi.json", Response(description, media_type="application/json"))),
        ],
        exception_handlers={
            Refused: _refused,
            HTTPException: _no_such_path,
            ClientDisconnect: _disconnected,
            RedisError: access.unavailable,
            StoreUnavailable: access.unavailable,
            Exception: _failed,
        },
        lifespan=lambda _: access.open(),
    )
    app.router.redirect_slashes = False
    return CallerLog(app, proxies, "key", _log_request)


class Endpoint:
    """One path. An ASGI app, so that Starlette passes every method, and 405 has the form of all problems."""

    def __init__(self, path: str, operation: Operation, access: Access) -> None:
        self._path = path
        self._operation = operation
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        line = scope["state"]["line"]
        line["path"] = self._path
        operation = self._operation
        if request.method not in operation.allowed.split(", "):
            raise _not_allowed(operation.allowed)
        caller = await run_in_threadpool(self._access.admit, request.headers.get("authorization", ""), line)
        if operation.scope not in caller.scopes:
            raise Refused("missing_scope", f"This needs a key with the scope {operation.scope}.")
        query = _query(request, operation.parameters)
        body = await _body(request) if operation.method == "POST" else b""
        call = Call(caller, scope["path_params"], query, request.headers.get("if-none-match", ""), body, line)
        response = await run_in_threadpool(operation.answer, call)
        self._access.outage.end()
        await response(scope, receive, send)


class Public:
    """A path that needs no key and always has the same answer."""

    def __init__(self, path: str, response: Response) -> None:
        self._path = path
        self._response = response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["line"]["path"] = self._path
        if scope["method"] not in {"GET", "HEAD"}:
            raise _not_allowed("GET, HEAD")
        await self._response(scope, receive, send)


class Access:
    """Lets requests in by their keys. `outage`: whether Redis answers."""

    def __init__(self, redis: Redis, requests_per_min: int) -> None:
        self._redis = redis
        self._keys = ApiKeys(redis)
        self._requests_per_min = requests_per_min
        self.outage = Outage("api", redis)

    def admit(self, authorization: str, line: dict[str, Any]) -> Caller:
        """Return who calls; raises Refused, OtherSchema, and what redis-py raises."""
        kind, _, text = authorization.partition(" ")
        caller = self._keys.admit(text.strip(), self._requests_per_min) if kind.lower() == "bearer" else None
        if caller is None:
            advice = "Send the header `Authorization: Bearer` with a key of `ota-receiver keys create`."
            raise Refused("unauthorized", advice, {"www-authenticate": "Bearer"})
        line["key"], line["consumer"] = caller.key_id, caller.name
        if caller.wait_s:
            most = f"A key may make {self._requests_per_min} requests a minute."
            raise Refused("too_many_requests", most, {"retry-after": str(caller.wait_s)})
        return caller

    async def unavailable(self, request: Request, error: Exception) -> Response:
        """Return 503: Redis does not answer, or holds data of another version."""
        self.outage.begin(error)
        return problem(request, "unavailable", "Redis cannot be used now.", {"retry-after": str(RETRY_AFTER)})

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Log at the start if there is no valid key; one may be made at any time."""
        try:
            keys = await run_in_threadpool(self._keys.all)
            if all(key.revoked_at for key in keys.values()):
                _log.warning("api.no_keys", advice="Make one: ota-receiver keys create --name NAME --scope feed")
        except RedisError as error:
            self.outage.begin(error)
        yield
        self._redis.close()


def _log_request(method: str, status: int, duration_ms: float, line: Mapping[str, Any]) -> None:
    _log.info("api.request", method=method, status=status, duration_ms=duration_ms, **line)


def _query(request: Request, known: frozenset[str]) -> dict[str, str]:
    """Return the query parameters; raises Refused for one that is unknown, which would have no effect, or repeated."""
    given = request.query_params.multi_items()
    found = dict(given)
    if unknown := found.keys() - known:
        takes = f"It takes {', '.join(sorted(known))}." if known else "It takes none."
        raise Refused("bad_parameter", f"{len(unknown)} query parameter(s) are unknown. {takes}")
    if len(found) < len(given):
        raise Refused("bad_parameter", "A query parameter is given twice.")
    return found


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > LONGEST_BODY:
                    raise Refused("body_too_large", f"The body may have {LONGEST_BODY} bytes.", {"connection": "close"})
    except TimeoutError:
        raise Refused("body_too_slow", "", {"connection": "close"}) from None
    return bytes(body)


def _not_allowed(allowed: str) -> Refused:
    return Refused("method_not_allowed", f"This path takes {allowed}.", {"allow": allowed})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return problem(request, error.reason, error.detail, error.headers)


async def _no_such_path(request: Request, error: Exception) -> Response:
    return problem(request, "no_such_path", "The paths are in /openapi.json.")


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)


async def _failed(request: Request, error: Exception) -> Response:
    return problem(request, "internal_error", "Please report it, with the request id.")
