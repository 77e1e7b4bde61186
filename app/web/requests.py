"""What the three HTTP processes share: an id and a log line for each request, and the address that it came from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from time import perf_counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from app import log
from app.ids import request_ids

_log = log.get()


class RequestLog(ABC):
    """The outermost layer: gives each request an id, and a log line if a subclass writes one.

    `scope["state"]` holds `request_id`, `line`, the fields of the log line, and what `open` adds.
    """

    def __init__(self, app: ASGIApp, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies
        self._sampled = log.Sampler(_log_rest)
        self._new_id = request_ids()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, request_id, status = perf_counter(), self._new_id(), 500
        state = scope["state"]
        state["request_id"] = request_id
        bind_contextvars(request_id=request_id)
        self.open(scope, state)

        async def with_request_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # A list of its own: some answers are one object for all requests.
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, with_request_id)
        except Exception as error:
            # Starlette has answered 500.
            path = self.path(scope)
            _log.error("request.failed", path=path, error=type(error).__name__, trace=log.trace_of(error))
        finally:
            self.close(scope, status, perf_counter() - started)

    @abstractmethod
    def open(self, scope: Scope, state: dict[str, Any]) -> None:
        """Set `line` in the state of a request that begins."""

    @abstractmethod
    def close(self, scope: Scope, status: int, seconds: float) -> None:
        """Write the line of a request that has ended, unless it needs none."""

    @abstractmethod
    def path(self, scope: Scope) -> str:
        """Return the path of a request as a log line may show it."""

    def samples(self, scope: Scope, status: int) -> bool:
        """Name the sender in the line of what anybody can send; return whether it is written, or only counted."""
        sender = scope["state"]["line"]["sender"] = self._proxies.sender(scope)
        return self._sampled.passes(status, sender)


class CallerLog(RequestLog):
    """One line for each request of a known caller, with the template of its path instead of what the caller wrote.

    Anybody can send what has no caller: of those, one line a second has the status, the sender and their number.
    `write` gets method, status, milliseconds and the other fields of a line. `caller`: the field that a line has
    only if the caller is known.
    """

    def __init__(
        self, app: ASGIApp, proxies: Proxies, caller: str, write: Callable[[str, int, float, Mapping[str, Any]], None]
    ) -> None:
        super().__init__(app, proxies)
        self._caller = caller
        self._write = write

    def open(self, scope: Scope, state: dict[str, Any]) -> None:
        state["line"] = {"path": "unknown"}

    def close(self, scope: Scope, status: int, seconds: float) -> None:
        line = scope["state"]["line"]
        if self._caller in line or (status >= 400 and self.samples(scope, status)):
            self._write(scope["method"], status, round(seconds * 1000, 2), line)

    def path(self, scope: Scope) -> str:
        found: str = scope["state"]["line"]["path"]
        return found


class Proxies:
    """The proxies whose headers are believed: TRUSTED_PROXIES."""

    def __init__(self, networks: Sequence[IPv4Network | IPv6Network]) -> None:
        self._networks = networks
        self.trust = lru_cache(1024)(self._trust)

    def sender(self, scope: Scope) -> str:
        """Return the address that the request came from: the last one that is no trusted proxy's.

        An IPv4 address is written as one, also where a socket of IPv6 takes both: else all of them were one network.
        """
        sender = str(_address(peer(scope)) or peer(scope))
        headers = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        hops = b",".join(headers).decode("latin-1").split(",") if headers else []
        while hops and self.trust(sender):
            hop = _address(hops.pop())
            if hop is None:
                break
            sender = str(hop)
        return sender

    def _trust(self, address: str) -> bool:
        found = _address(address)
        return found is not None and any(found in network for network in self._networks)


def peer(scope: Scope) -> str:
    """Return the address at the other end of the connection, "" for a socket without one."""
    return scope["client"][0] if scope["client"] else ""


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Return an IP address, None for anything else; some proxies write a port after it.

    Without its zone: after a `%` Python takes any text of any length for one.
    """
    text = text.strip().partition("%")[0]
    for form in (text, text.rpartition(":")[0].strip("[]")):
        with suppress(ValueError):
            found = ip_address(form)
            return getattr(found, "ipv4_mapped", None) or found
    return None


def _log_rest(status: int, sender: str, requests: int) -> None:
    _log.info("requests.unlogged", status=status, sender=sender, requests=requests)
