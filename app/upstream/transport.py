"""A warm HTTP client whose every call ends in time: httpx's own time-outs begin anew with each byte that comes.

A server that drips one byte of a header now and then would hold a worker for days. So a call gets one deadline when it
starts, and no connect, handshake, read or write may wait beyond it. Only the look-up of the host's name is outside:
the system's resolver has its own limit.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.metadata import version
from time import monotonic
from typing import Any

import httpcore
import httpx

_CONNECTIONS = 10  # a worker process makes one call at a time; the rest is for threads of the CLI
_KEEP_ALIVE_SECONDS = 30.0


@cache
def tls_context() -> ssl.SSLContext:
    """Return the TLS context of this process, which all clients share.

    The certificates of the authorities take about 8 MB, which workers share if the pool calls this before it forks.
    """
    return httpx.create_ssl_context()


def open_http(timeout_seconds: float) -> httpx.Client:
    """Return a client for the Channel Manager; a whole call may take `timeout_seconds`. The caller closes it.

    Nothing but our settings decides where an API key goes: no redirects, no proxies or .netrc from the environment,
    no cookies carried from one company's call to another's. SSL_CERT_FILE is honoured, for a private authority.
    """
    return httpx.Client(
        transport=_DeadlineTransport(tls_context()),
        timeout=timeout_seconds,
        headers={"user-agent": f"ota-receiver/{version('ota-receiver')}", "accept-encoding": "gzip"},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        follow_redirects=False,
        trust_env=False,
    )


class _DeadlineTransport(httpx.HTTPTransport):
    """httpx's transport, which hands the deadline down to the sockets in the place of time-outs."""

    def __init__(self, ssl_context: ssl.SSLContext) -> None:
        super().__init__(verify=ssl_context)
        # httpx 0.28 has no argument for a network backend; the version is pinned and a test drips headers.
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl_context,
            max_connections=_CONNECTIONS,
            keepalive_expiry=_KEEP_ALIVE_SECONDS,
            network_backend=_DeadlineBackend(),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        seconds: float = request.extensions["timeout"]["pool"]
        deadline = monotonic() + seconds
        moments = {"connect": deadline, "read": deadline, "write": deadline, "pool": seconds}
        request.extensions = {**request.extensions, "timeout": moments}
        return super().handle_request(request)


def _left(deadline: float | None, too_late: type[httpcore.TimeoutException]) -> float:
    """Return the seconds until `deadline`, a moment of the monotonic clock; raise `too_late` if it has passed."""
    seconds = 0.0 if deadline is None else deadline - monotonic()
    if seconds <= 0:
        raise too_late
    return seconds


class _DeadlineBackend(httpcore.NetworkBackend):
    """Opens sockets; here and in the stream, `timeout` is the moment by which all must be over."""

    def __init__(self) -> None:
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        return _DeadlineStream(self._first_that_answers(host, port, timeout, local_address, socket_options))

    def _first_that_answers(
        self,
        host: str,
        port: int,
        deadline: float | None,
        local_address: str | None,
        socket_options: Iterable[Any] | None,
    ) -> httpcore.NetworkStream:
        """Connect to one of the host's addresses; left to itself, the library gives each the whole time."""
        try:
            found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except OSError as error:
            raise httpcore.ConnectError(type(error).__name__) from None
        for address in found[:-1]:
            left = _left(deadline, httpcore.ConnectTimeout)
            try:
                return self._sockets.connect_tcp(str(address), port, left / 2, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        left = _left(deadline, httpcore.ConnectTimeout)
        return self._sockets.connect_tcp(str(found[-1]), port, left, local_address, socket_options)


class _DeadlineStream(httpcore.NetworkStream):
    """A connected socket."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(timeout, httpcore.WriteTimeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _DeadlineStream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        self._stream.close()
