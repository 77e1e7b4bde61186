"""The HTTP endpoints: the webhook of the subscription and the probes, with an id and a log line for each request."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from hmac import compare_digest
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from app import log
from app.errors import ReceiverError, RequestRefused
from app.health import Health
from app.ids import parent_id, trace_id, traceparent
from app.metrics import CONTENT_TYPE
from app.traces import ExportingTracer
from app.web.requests import Proxies, RequestLog, peer
from app.web.webhook import Webhook, refused

NEAR_PATHS: Final = 20
"""Paths near the webhook's of which a process warns once each; anybody can invent others."""

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
        exception_handlers={RequestRefused: _refused},
        lifespan=lambda _: resources(),
    )
    # A redirect would name the host that the request claims, and senders of events do not follow one.
    app.router.redirect_slashes = False
    events: ASGIApp = EventsFirst(webhook, paths, app)
    traced = Traced(events, path, paths, tracer) if tracer else events
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
        self._write = log.writer("request")

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
            known = {"method": scope["method"], "path": path[:200], "status": status, "duration_ms": duration_ms}
            self._write(known | line)

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


class EventsFirst:
    """Passes each POST for the webhook to it, and every other request to the app that also knows its paths."""

    def __init__(self, webhook: ASGIApp, webhook_paths: Set[str], app: ASGIApp) -> None:
        self._webhook = webhook
        self._webhook_paths = webhook_paths
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        is_event = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._webhook_paths
        return (self._webhook if is_event else self._app)(scope, receive, send)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestRefused)
    return refused(request.scope, error)


def _words(path: str) -> set[str]:
    """Return the words of a path, alike in singular and plural and in any case."""
    return {word.rstrip("s") for word in _WORD.findall(path.casefold())}


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
