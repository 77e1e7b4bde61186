"""The connections to the Channel Manager and to https sinks, on which every call ends in time.

httpx's own time-outs start again with each byte: a server that sends a byte now and then would hold a worker for days.
So a call gets one deadline when it starts, and no connect, handshake, read or write waits beyond it. Only the look-up
of the host's name is outside: the system's resolver has its own limit.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from functools import cache
from time import monotonic
from typing import Any
from urllib.parse import unquote, urlsplit

import httpcore
import httpx
from pydantic import SecretStr

from app.errors import SettingsError

_CONNECTIONS = 10  # a worker process makes one call at a time; the rest is for threads of the CLI
_KEEP_ALIVE_SECONDS = 30.0
_WRITTEN_AT_ONCE = 16 * 1024  # one record of TLS; the system takes it in two parts at most


class DeadlineTransport(httpx.HTTPTransport):
    """httpx's transport for calls that take at most `timeout_seconds` each; close it after use.

    Without httpx.Client around it nothing but our settings decides where a secret goes: no redirects, no cookies, no
    proxies or .netrc from the environment. SSL_CERT_FILE is honoured, for a private authority. `backend` opens the
    connections, each to an address that was looked up before, or to the `proxy` (NP_PROXY). `connect_seconds` is the
    part of the time that connecting may take.
    """

    def __init__(
        self,
        timeout_seconds: float,
        backend: httpcore.NetworkBackend | None = None,
        proxy: SecretStr | None = None,
        connect_seconds: float | None = None,
    ) -> None:
        """Raise SettingsError for an SSL_CERT_FILE without a certificate."""
        super().__init__(verify=tls_context())
        self._seconds = timeout_seconds
        self._connect_seconds = min(connect_seconds or timeout_seconds, timeout_seconds)
        options: dict[str, Any] = {
            "ssl_context": tls_context(),
            "max_connections": _CONNECTIONS,
            "keepalive_expiry": _KEEP_ALIVE_SECONDS,
            "network_backend": _DeadlineBackend(backend or httpcore.SyncBackend(), is_proxied=proxy is not None),
        }
        # httpx 0.28 has no argument for a network backend; the version is pinned and a test drips headers.
        self._pool = httpcore.ConnectionPool(**options) if proxy is None else _proxied(proxy, options)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        now = monotonic()
        deadline = now + self._seconds
        times = {"connect": now + self._connect_seconds, "read": deadline, "write": deadline, "pool": self._seconds}
        request.extensions = {**request.extensions, "timeout": times}
        return super().handle_request(request)


def _proxied(proxy: SecretStr, options: dict[str, Any]) -> httpcore.HTTPProxy:
    parts = urlsplit(proxy.get_secret_value())
    user = (unquote(parts.username or "").encode(), unquote(parts.password or "").encode())
    address = httpcore.URL(scheme="http", host=parts.hostname or "", port=parts.port or 80, target="/")
    return httpcore.HTTPProxy(address, proxy_auth=user if any(user) else None, **options)


@cache
def tls_context() -> ssl.SSLContext:
    """Return the TLS context of this process, which all calls share.

    The certificates of the authorities take about 8 MB, which workers share if the pool calls this before it forks.
    Raises SettingsError for an SSL_CERT_FILE that cannot be read or holds no certificate.
    """
    try:
        return httpx.create_ssl_context()
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise SettingsError(f"SSL_CERT_FILE: cannot be read as certificates ({reason})") from None


def _left(deadline: float | None, too_late: type[httpcore.TimeoutException]) -> float:
    """Return the seconds until `deadline` (time.monotonic); raise `too_late` if it has passed."""
    seconds = 0.0 if deadline is None else deadline - monotonic()
    if seconds <= 0:
        raise too_late
    return seconds


class _DeadlineBackend(httpcore.NetworkBackend):
    """Opens sockets; here and in the stream, `timeout` is the deadline (time.monotonic), not a duration."""

    def __init__(self, backend: httpcore.NetworkBackend, *, is_proxied: bool) -> None:
        self._backend = backend
        self._error: type[Exception] = httpcore.ProxyError if is_proxied else httpcore.ConnectError

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of the host that answers; httpcore alone gives each address the whole time."""
        try:
            found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except OSError as error:
            raise self._error(type(error).__name__) from None
        for address in found[:-1]:
            left = _left(timeout, httpcore.ConnectTimeout)
            try:
                stream = self._backend.connect_tcp(str(address), port, left / 2, local_address, socket_options)
                return _DeadlineStream(stream)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        left = _left(timeout, httpcore.ConnectTimeout)
        try:
            return _DeadlineStream(self._backend.connect_tcp(str(found[-1]), port, left, local_address, socket_options))
        except httpcore.ConnectError as error:
            raise self._error(type(error).__name__) from None


class _DeadlineStream(httpcore.NetworkStream):
    """A connected socket."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # httpcore gives the whole time to each part that the system takes, and of a large body those are many.
        for at in range(0, len(buffer), _WRITTEN_AT_ONCE):
            part = buffer[at : at + _WRITTEN_AT_ONCE]
            self._stream.write(part, _left(timeout, httpcore.WriteTimeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _DeadlineStream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        self._stream.close()
