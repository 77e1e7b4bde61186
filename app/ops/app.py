"""The process of the ops page: its routes, who may use which, its errors as pages, and its log lines.

Redis is asked in threads, so a slow page holds one request and not the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl

from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import log
from app.audit import LONGEST_TEXT
from app.errors import StoreUnavailable
from app.explain.stores import Stores
from app.ledger.redis import Outage, Redis, cause, refuse_other_schema
from app.ops.access import Access, Refused, Role, User, refuse_other_origin
from app.ops.feeder import Feeder
from app.ops.pages import HEADERS, Pages
from app.settings import Settings
from app.web.requests import CallerLog, Proxies

LONGEST_BODY: Final = 8192
"""Bytes: a form holds a sentence that says why, and what it is about."""

BODY_SECONDS: Final = 10.0

RETRY_AFTER: Final = 5
"""Seconds that a reader is asked to wait while Redis is unavailable, or busy with the search of another one."""

_NOT_FOUND: Final = "There is no such page. Its address may be wrong, or the list that it was in has changed."
_log = log.get()


class Visit(NamedTuple):
    """One request of a known user.

    `stores` see the deployment as it is at this request. `here`: path and query. `query` and `form` hold each name
    once; `path` the parts of the address that vary. `line`: the fields of its log line, to which an answer may add
    such as `order_id`.
    """

    user: User
    stores: Stores
    here: str
    path: Mapping[str, str]
    query: Mapping[str, str]
    form: Mapping[str, str]
    line: dict[str, Any]

    def why(self) -> str:
        """Return why somebody acts; raises Refused without a reason, or for one that is too long."""
        found = self.form.get("why", "").strip()
        if not 0 < len(found) <= LONGEST_TEXT or not found.isprintable():
            detail = f"Say why, on one line of at most {LONGEST_TEXT} characters, for the audit. Nothing was done."
            raise Refused(HTTPStatus.BAD_REQUEST, "no_reason", "Why?", detail)
        return found


class Screen(NamedTuple):
    """What one address answers to one method: `answer` is called in a thread and may raise Refused.

    `parameters`: the names that its query, or its form, may have. `needs`: the role without which it is 403; those that
    need `act` are not there at all without OPS_ACT_TOKEN. A POST needs it always.
    """

    path: str
    answer: Callable[[Visit], Response]
    parameters: frozenset[str] = frozenset()
    method: str = "GET"
    needs: Role = "read"


def application(
    redis: Redis,
    settings: Settings,
    pages: Pages,
    screens: Sequence[Screen],
    access: Access,
    feeder: Feeder | None = None,
) -> ASGIApp:
    """Return the ASGI app; it closes `redis` at shutdown. `feeder` feeds plans while it runs."""
    proxies = Proxies(settings.trusted_proxies)
    gate = Gate(redis, settings, pages, access, proxies)
    by_path: dict[str, dict[str, Screen]] = {}
    for screen in screens:
        if settings.ops_act_token or (screen.needs == "read" and screen.method == "GET"):
            by_path.setdefault(screen.path, {})[screen.method] = screen
    app = Starlette(
        routes=[
            Route("/healthz", Public("/healthz", lambda _: PlainTextResponse("alive\n"))),
            Route("/static/{name}", Public("/static/{name}", lambda path: pages.file(path["name"]))),
            *[Route(path, Endpoint(path, methods, gate)) for path, methods in by_path.items()],
            # The last one, so that without a password no one learns which addresses there are.
            Route("/{path:path}", Endpoint("unknown", {}, gate)),
        ],
        exception_handlers={
            Refused: gate.refused,
            ClientDisconnect: _disconnected,
            RedisError: gate.unavailable,
            StoreUnavailable: gate.unavailable,
            Exception: gate.failed,
        },
        lifespan=lambda _: gate.open(feeder),
    )
    app.router.redirect_slashes = False
    return CallerLog(Secured(app), proxies, "user", _log_request)


def see_other(address: str) -> Response:
    """Return the answer of an action: the browser shows this address of ours, and a reload repeats nothing."""
    return RedirectResponse(address, HTTPStatus.SEE_OTHER)


class Endpoint:
    """One path. An ASGI app, so that Starlette passes every method, and 405 is a page too."""

    def __init__(self, path: str, methods: Mapping[str, Screen], gate: Gate) -> None:
        self._path = path
        self._methods = methods
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        line = scope["state"]["line"]
        line["path"] = self._path
        user = self._gate.admit(request)
        if not self._methods:
            raise Refused(HTTPStatus.NOT_FOUND, "not_found", "Not found", _NOT_FOUND)
        screen = self._methods.get("GET" if request.method == "HEAD" else request.method)
        if screen is None:
            raise _not_allowed(self._methods)
        if screen.method == "POST":
            refuse_other_origin(request.headers)
        if not user.may_act and (screen.needs == "act" or screen.method == "POST"):
            detail = "Your password allows to look only. To act, log in with the password that allows it."
            raise Refused(HTTPStatus.FORBIDDEN, "may_only_read", "You may only look", detail)
        query = _once(request.query_params.multi_items(), screen.parameters if screen.method == "GET" else frozenset())
        form = _once(await _form(request), screen.parameters) if screen.method == "POST" else MappingProxyType({})
        visit = partial(Visit, user, here=here(request), path=scope["path_params"], query=query, form=form, line=line)
        response = await run_in_threadpool(self._gate.answer, screen, visit)
        self._gate.outage.end()
        await response(scope, receive, send)


class Public:
    """A path that needs no password; what it answers is the same for everybody."""

    def __init__(self, path: str, answer: Callable[[Mapping[str, str]], Response | None]) -> None:
        self._path = path
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["line"]["path"] = self._path
        if scope["method"] not in {"GET", "HEAD"}:
            raise _not_allowed(("GET",))
        response = self._answer(scope["path_params"])
        if response is None:
            raise Refused(HTTPStatus.NOT_FOUND, "not_found", "Not found", _NOT_FOUND)
        await response(scope, receive, send)


class Gate:
    """Lets users in, and answers with a page whatever fails. `outage`: whether Redis answers."""

    def __init__(self, redis: Redis, settings: Settings, pages: Pages, access: Access, proxies: Proxies) -> None:
        self._redis = redis
        self._settings = settings
        self._pages = pages
        self._access = access
        self._proxies = proxies
        self.outage = Outage("ops", redis)

    def admit(self, request: Request) -> User:
        """Return who sends the request, and note it; raises Refused."""
        sender = self._proxies.sender(request.scope)
        user = self._access.admit(request.headers.get("authorization", ""), sender)
        request.state.user = user
        request.state.line["user"] = user.who
        return user

    def answer(self, screen: Screen, visit: Callable[..., Visit]) -> Response:
        """Return what a screen answers to a visit, which lacks the `stores`.

        Raises Refused, OtherSchema, and what redis-py raises.
        """
        refuse_other_schema(self._redis)
        return screen.answer(visit(stores=Stores(self._redis, self._settings)))

    async def refused(self, request: Request, error: Exception) -> Response:
        """Return the page of a Refused."""
        assert isinstance(error, Refused)
        return self._error(request, error)

    async def unavailable(self, request: Request, error: Exception) -> Response:
        """Return 503: Redis does not answer, or holds data of another version."""
        self.outage.begin(error)
        detail = str(error) if isinstance(error, StoreUnavailable) else cause(error, self._redis)
        headers = {"retry-after": str(RETRY_AFTER)}
        if request.method == "POST":
            then = "Whether the action was done is not known: look before you repeat it."
        else:
            # The browser does it, with and without JavaScript.
            headers |= {"refresh": str(RETRY_AFTER)}
            then = f"This page tries again every {RETRY_AFTER} s."
        title = "Redis cannot be used now"
        refusal = Refused(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", title, f"{detail}. {then}", headers)
        return self._error(request, refusal)

    async def failed(self, request: Request, error: Exception) -> Response:
        """Return 500; the frame of the request log has logged the error."""
        detail = f"Please report it, with the id {request.state.request_id}, which is in the log."
        return self._error(
            request, Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", "Internal error", detail)
        )

    @asynccontextmanager
    async def open(self, feeder: Feeder | None) -> AsyncIterator[None]:
        if feeder:
            feeder.start()
        yield
        if feeder:
            feeder.stop()
        self._redis.close()

    def _error(self, request: Request, error: Refused) -> Response:
        request.state.line["reason"] = error.reason
        user = getattr(request.state, "user", None)
        values = {"title": error.title, "detail": error.detail, "request_id": request.state.request_id}
        return self._pages.page("error.html", user, here(request), error.status, error.headers, **values)


class Secured:
    """Gives every answer the headers of HEADERS that it has not itself, also one that Starlette makes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = {name.encode(): value.encode() for name, value in HEADERS.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, partial(self._send, send))

    async def _send(self, send: Send, message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*(self._headers | dict(message["headers"])).items()]
        await send(message)


def here(request: Request) -> str:
    """Return path and query of a request, as a link to the same page."""
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def _once(given: Sequence[tuple[str, str]], known: frozenset[str]) -> Mapping[str, str]:
    """Return names and values; raises Refused (400) for a name that is unknown, which would have no effect, or twice.

    An empty value is left out: a form sends all its fields.
    """
    names = {name for name, _ in given}
    if names - known or len(names) < len(given):
        takes = f"This page takes {', '.join(sorted(known))}, each once." if known else "This page takes none."
        raise Refused(HTTPStatus.BAD_REQUEST, "bad_parameter", "The address has a wrong filter", takes)
    return {name: value for name, value in given if value.strip()}


async def _form(request: Request) -> list[tuple[str, str]]:
    """Return the fields of a form; raises Refused for a body that is none, is too large, or too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > LONGEST_BODY:
                    raise _bad_body(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large")
        if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
            raise _bad_body(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "no_form")
        return parse_qsl(body.decode(), keep_blank_values=True, errors="strict")
    except TimeoutError:
        raise _bad_body(HTTPStatus.REQUEST_TIMEOUT, "body_too_slow") from None
    except ValueError:
        raise _bad_body(HTTPStatus.BAD_REQUEST, "bad_form") from None


def _bad_body(status: HTTPStatus, reason: str) -> Refused:
    detail = f"It must be a form of this page, of at most {LONGEST_BODY} bytes, and come within {BODY_SECONDS:.0f} s."
    return Refused(status, reason, "The form cannot be read", detail, {"connection": "close"})


def _not_allowed(methods: Sequence[str] | Mapping[str, Screen]) -> Refused:
    allowed = ", ".join("GET, HEAD" if method == "GET" else method for method in methods)
    detail = f"This address takes {allowed}."
    return Refused(HTTPStatus.METHOD_NOT_ALLOWED, "method_not_allowed", "Not like this", detail, {"allow": allowed})


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)


def _log_request(method: str, status: int, duration_ms: float, line: Mapping[str, Any]) -> None:
    _log.info("ops.request", method=method, status=int(status), duration_ms=duration_ms, **line)
