"""The HTTP endpoints: the webhook of the subscription and the probes, with an id and a log line for each request."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from hmac import compare_digest
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from app import log
from app.errors import NotRecorded, ReceiverError, RequestRefused, Unauthenticated
from app.health import Health
from app.ids import parent_id, trace_id, traceparent
from app.intake.service import Intake
from app.metrics import CONTENT_TYPE
from app.traces import ExportingTracer
from app.web.requests import Proxies, RequestLog, peer

BODY_SECONDS: Final = 10.0
"""A body slower than this is answered 408."""

AT_ONCE: Final = 1000
"""POSTs under way at once; each may hold MAX_BODY_BYTES."""

RETRY_AFTER: Final = 5
"""Seconds a sender is asked to wait after a 503."""

NEAR_PATHS: Final = 20
"""Paths near the webhook's of which a process warns once each; anybody can invent others."""

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PROXY_ID: Final = re.compile(rb"[!-~]{1,128}")
_IDS: Final = frozenset({b"traceparent", b"x-request-id"})
_WORD: Final = re.compile("[a-z0-9]+")
_PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})
_log = log.get()
_encode = msgspec.json.Encoder().encode


def application(
    *,
    webhook_path: str,
    webhook: Webhook,
    probes: Probes,
    count: Callable[[int, float], None],
    trusted_proxies: Sequence[IPv4Network | IPv6Network],
    resources: Callable[[], AbstractAsyncContextManager[None]],
    tracer: ExportingTracer | None = None,
) -> ASGIApp:
    """Return the ASGI app.

    `count` gets status and seconds of each request for the webhook; `resources` are opened at start-up and closed at
    shutdown.
    """
    # A subscription whose URL ends with a slash is as good as one without.
    path = webhook_path.rstrip("/")
    paths = {path, f"{path}/"}
    app = Starlette(
        routes=[
            *[Route(path, webhook, methods=["POST"]) for path in paths],
            *[Route(path, webhook.handshake, methods=["GET"]) for path in paths],
            Route("/healthz", probes.live),
            Route("/readyz", probes.ready),
            Route("/metrics", probes.metrics),
        ],
        exception_handlers={RequestRefused: _refused, ClientDisconnect: _disconnected},
        lifespan=lambda _: resources(),
    )
    # A redirect would name the host that the request claims, and senders of events do not follow one.
    app.router.redirect_slashes = False
    traced = Traced(app, path, paths, tracer) if tracer else app
    return WebhookLog(traced, paths, count, Proxies(trusted_proxies))


class WebhookLog(RequestLog):
    """Logs and counts each request for the webhook.

    Probes are logged only when they fail. Anybody can send what is refused, handshakes and other paths: of those one
    line a second has the status, the sender and their number. A POST to a path that shares a word with the webhook's is
    counted as one for the webhook, and warned of once: a subscription may have that path.
    """

    def __init__(
        self, app: ASGIApp, webhook_paths: Set[str], count: Callable[[int, float], None], proxies: Proxies
    ) -> None:
        super().__init__(app, proxies)
        self._webhook_paths = webhook_paths
        self._words = _words("".join(webhook_paths))
        self._near: set[str] = set()
        self._count = count

    def open(self, scope: Scope, state: dict[str, Any]) -> None:
        state["line"], state["traceparent"] = self._given_ids(scope)
        if trace := state["traceparent"]:
            bind_contextvars(trace_id=trace_id(trace))

    def close(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        is_near = status == 404 and scope["method"] == "POST" and not self._words.isdisjoint(_words(path[:200]))
        if is_near or path in self._webhook_paths:
            self._count(status, seconds)
        if is_near:
            self._warn(path[:200])
        if self._is_logged(scope, status):
            line, duration_ms = scope["state"]["line"], round(seconds * 1000, 2)
            _log.info(
                "request", method=scope["method"], path=path[:200], status=status, duration_ms=duration_ms, **line
            )

    def path(self, scope: Scope) -> str:
        found: str = scope["path"]
        return found

    def _given_ids(self, scope: Scope) -> tuple[dict[str, Any], str]:
        """Return the ids of others as fields of the line, and the traceparent; none where one header is repeated."""
        given = [header for header in scope["headers"] if header[0] in _IDS]
        line: dict[str, Any] = {}
        trace = ""
        for name, value in given if len(dict(given)) == len(given) else ():
            if name == b"traceparent" and (trace := traceparent(value)):
                line["parent_id"] = parent_id(trace)
            if name == b"x-request-id" and _PROXY_ID.fullmatch(value) and self._proxies.trust(peer(scope)):
                line["proxy_request_id"] = value.decode()
        return line, trace

    def _warn(self, path: str) -> None:
        if path not in self._near and len(self._near) < NEAR_PATHS:
            self._near.add(path)
            advice = f"The webhook is {min(self._webhook_paths)}: correct the subscription's address, or WEBHOOK_PATH."
            _log.warning("request.near_webhook", path=path, advice=advice)

    def _is_logged(self, scope: Scope, status: int) -> bool:
        path = scope["path"]
        if path in self._webhook_paths and scope["method"] == "POST" and not 400 <= status < 500:
            return True
        return not (path in _PROBES and status < 400) and self.samples(scope, status)


class Traced:
    """Below WebhookLog, where there is a collector: the span of each POST for the webhook that is sampled.

    Its id is that of the events of the POST and of its log lines, instead of the sender's.
    """

    def __init__(self, app: ASGIApp, route: str, webhook_paths: Set[str], tracer: ExportingTracer) -> None:
        self._app = app
        self._route = route
        self._webhook_paths = webhook_paths
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._webhook_paths:
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        given = state["traceparent"]
        post = self._tracer.post(given, scope["headers"], self._route)
        if post is None:
            # Whatever the sender samples: what follows from its events is sampled as the POST is.
            state["traceparent"] = given and f"{given[:-2]}00"
            await self._app(scope, receive, send)
            return
        state["traceparent"] = post.traceparent
        bind_contextvars(trace_id=trace_id(post.traceparent), span_id=parent_id(post.traceparent))
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            post.end(state["request_id"], status, state["line"])


def _words(path: str) -> set[str]:
    """Return the words of a path, alike in singular and plural and in any case."""
    return {word.rstrip("s") for word in _WORD.findall(path.casefold())}


class Webhook:
    """Answers POSTs and the handshake; each method raises RequestRefused, which is answered with its status and reason.

    `request.state` holds `request_id`, `traceparent`, and `line`, the fields of the request's log line.
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
        receipt = await self._intake.receive(body, state["request_id"], state["traceparent"])
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
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding in {"gzip", "x-gzip"}:
            return _inflated(bytes(body), self._max_body_bytes)
        if encoding != "identity":
            raise RequestRefused(415, "unknown_encoding")
        return bytes(body)


async def _refused(request: Request, error: Exception) -> Response:
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
    if isinstance(error, Unauthenticated):
        request.state.line["company"] = error.company
    if isinstance(error, NotRecorded):
        _log.error("intake.unavailable", error=error.error, cause=error.cause or None)
    elif error.status == 415:
        response.headers["accept-encoding"] = "gzip"
    elif error.status in {408, 413, 503}:
        response.headers["connection"] = "close"
    return response


async def _disconnected(request: Request, error: Exception) -> Response:
    """Return an answer for the log line; the client has closed its connection."""
    _log.info("request.client_disconnected", path=request.url.path)
    return Response(status_code=400)


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
