"""uvicorn's server with the limits that a process needs when no proxy stands before it, and a graceful drain.

Checked against uvicorn 0.54 and httptools 0.9. They limit neither the time nor the size of a head, queue pipelined
requests without bound, wait without end for a client that does not read its answer, close on a client that ends its
sending side, and drop requests under way at a second signal. What only a proxy does (lingering close, limits per
client) is in deploy/nginx.conf. A test in tests/integration/test_connections.py names each internal of uvicorn that is
used here.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from types import FrameType
from typing import Final, cast

import uvicorn
from httptools import HttpParserUpgrade, HttpRequestParser
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from app import log

CONNECTIONS: Final = 1200
"""Connections at once: more than requests at once (webhook.AT_ONCE), so that one request too many gets 503."""

STALL_SECONDS: Final = 10.0
"""For a whole head, from connecting or from the first byte of a later request, and for reading an answer."""

HEAD_BYTES: Final = 65_536
HEAD_FIELDS: Final = 100

AHEAD: Final = 16
"""Pipelined requests that may wait, each about 3 KB; with more of them the connection closes after these."""

OWN_FILES: Final = 100
"""File descriptors that are not connections of clients: Redis, logs, the event loop."""

KEEP_ALIVE_SECONDS: Final = 75
"""Longer than proxies keep an idle connection (nginx and AWS: 60 s), or they would send into a closing one."""

LINGER_SECONDS: Final = 1.0
"""After SIGTERM idle connections may send one more request, which is answered with `connection: close`."""

LAST_SECONDS: Final = 7
"""Then requests under way have so long; with the time-outs of Redis the end comes before the 10 s of `docker stop`."""

_CONTINUE: Final = b"HTTP/1.1 100 "
_log = log.get()


class Connections(ServerState):
    """All connections. `stalled` send no whole head, or do not read, since a time of the loop; `idle` await a request.

    Both in order of time, oldest first.
    """

    connections: set[Connection]  # type: ignore[assignment]  # of uvicorn's protocols only ours

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.stalled: dict[Connection, float] = {}
        self.idle: dict[Connection, None] = {}
        self.draining = False
        self.refused = log.Sampler(_log_refused)
        self._limit = limit

    def admit(self, connection: Connection, now: float) -> None:
        """Add a connection, which is stalled until its first head is complete.

        While there are too many, drop the oldest stalled connection, or else the oldest idle one, or else this one.
        """
        while len(self.connections) > self._limit:
            next(iter(self.stalled or self.idle or [connection])).drop()
        if connection in self.connections:
            self.stalled[connection] = now

    def expire(self, now: float) -> None:
        """Close connections that have been stalled for STALL_SECONDS."""
        for connection, since in [*self.stalled.items()]:
            if now - since < STALL_SECONDS:
                return
            connection.stalled_too_long()

    def forget(self, connection: Connection) -> None:
        self.stalled.pop(connection, None)
        self.idle.pop(connection, None)


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits. Needs `Connections` as the server's state."""

    server_state: Connections
    _in_head = False
    _in_body = False
    _in_one_head = False
    _refused = False
    _received = b""
    _head_bytes = 0
    _fault = HTTPStatus.BAD_REQUEST

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._answer = _Answer(transport)
        self.server_state.admit(self, self.loop.time())

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._in_one_head = not self._in_body
        self._received = data
        super().data_received(data)
        if self.transport.is_closing():
            return
        # In a chunk with the end of another request the start of a head does not count: that errs by one chunk.
        self._head_bytes = self._head_bytes + len(data) if self._in_head and self._in_one_head else 0
        if self._head_bytes > HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self._in_head or not self._is_answering():
            # Any byte stops uvicorn's keep-alive timer, also blank lines and the body of an answered request.
            self.server_state.stalled.setdefault(self, self.loop.time())

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio: True keeps the sending side open
        """Answer a client that has ended its sending side after a whole request; close any other."""
        if self._in_body or not self._is_answering():
            return None
        self.cycle.keep_alive = False
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self.server_state.stalled.setdefault(self, self.loop.time())

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._in_head:
            self.server_state.stalled.pop(self, None)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= AHEAD:
            raise ValueError  # it ends the parser, which raises an error of its own
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum([len(name) + len(value) + 4 for name, value in self.headers])
        if size > HEAD_BYTES or len(self.headers) > HEAD_FIELDS:
            self._fault = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise ValueError
        if self._is_upgrade():
            return
        super().on_headers_complete()
        self.cycle.transport = cast("asyncio.Transport", self._answer)
        self._in_head, self._in_body, self._in_one_head = False, True, False
        if not self.flow.write_paused:
            self.server_state.forget(self)
        if self.server_state.draining:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if self._in_body:  # the head of an upgrade is read a second time
            super().on_message_complete()
            self._in_body = False
            self.scope["state"]["is_whole"] = True

    def on_response_complete(self) -> None:
        self._answer.end()
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last:
            # Also when it closes: a client that does not read its answer keeps it open.
            self.server_state.idle[self] = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser cannot read; uvicorn calls this, after a line of its own (`_is_no_refusal`)."""
        self._refuse(self._fault)

    def _unsupported_upgrade_warning(self) -> None:
        """Read the request as one that asks for no other protocol (RFC 9110 7.8); uvicorn calls this.

        httptools leaves out the body of a request that asks for one, and stops after its head.
        """
        stopped = sys.exception()
        assert isinstance(stopped, HttpParserUpgrade)
        if not self._is_upgrade():
            # CONNECT: what follows is no HTTP.
            self._refused = True
            self.cycle.keep_alive = False
            return
        head = [self.parser.get_method() + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join([one for one in value.split(b",") if one.strip().lower() != b"upgrade"])
            if name != b"upgrade":
                head.append(name + b": " + value)
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._received = b"\r\n".join([*head, b"", self._received[stopped.args[0] :]])
        super().data_received(self._received)

    def _is_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def stalled_too_long(self) -> None:
        self.server_state.stalled.pop(self, None)
        if self.flow.write_paused:
            self.drop()
        elif self._in_head:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            # A client that sends its first byte now would take a 408 for the answer to its request.
            self.transport.close()

    def drop(self) -> None:
        """Close at once, without sending what is buffered."""
        self.server_state.forget(self)
        self.connections.discard(self)  # uvicorn does it in the next turn of the loop, and `admit` counts now
        self.transport.abort()

    def _refuse(self, status: HTTPStatus) -> None:
        """Read no more. Answer `status` and close, or close after the answers to earlier requests."""
        self._refused = True
        sender = self.client[0] if self.client else ""
        if self.server_state.refused.passes(status, sender):
            _log_refused(status, sender, 1)
        answering = self._is_answering()
        if answering and not self._in_body:
            self.cycle.keep_alive = False
            return
        if not self._in_body or (answering and not self.pipeline and not self.cycle.response_started):
            self.transport.write(STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class _Answer:
    """What uvicorn writes an answer to: it writes head and body apart, and each write would be a system call."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._head is None and not data.startswith(_CONTINUE):
            self._head = data
        else:
            self._transport.write((self._head or b"") + data)
            self._head = self._head and b""

    def end(self) -> None:
        """Write a head that has no body."""
        if self._head:
            self._transport.write(self._head)
        self._head = None

    def close(self) -> None:
        self.end()
        self._transport.close()


class Server(uvicorn.Server):
    """Serves `app` until SIGTERM or SIGINT, then answers the requests under way, however many signals come.

    A terminal and a supervisor both pass Ctrl-C on; at the second one uvicorn would drop requests under way.
    """

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            lifespan="on",
            server_header=False,
            reset_contextvars=True,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_is_no_refusal)
        self.server_state: Connections = Connections(_connection_limit())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the drain; a signal handler."""
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server shall end; uvicorn calls this each 0.1 s."""
        self.server_state.expire(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port and drain: the answer under way, or else the next one, is the last of its connection."""
        self.server_state.draining = True
        for connection in self.server_state.connections:
            if connection.cycle is not None:
                connection.cycle.keep_alive = False
        loop = asyncio.get_running_loop()
        accepted = partial(Connection, self.config, self.server_state, self.lifespan.state)
        for server in self.servers:
            for listener in server.sockets:
                # The kernel would reset the connections that wait to be accepted.
                with socket.socket(fileno=socket.dup(listener.fileno())) as own, suppress(OSError):
                    own.setblocking(False)
                    while True:
                        waiting, _ = own.accept()
                        await loop.connect_accepted_socket(accepted, waiting)
            server.close()
        deadline = loop.time() + LINGER_SECONDS
        while self.server_state.connections and loop.time() < deadline:  # noqa: ASYNC110  # uvicorn's set cannot be awaited
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def _log_refused(status: int, sender: str, requests: int) -> None:
    _log.info("request.unreadable", status=status, sender=sender, requests=requests)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    """Return whether a line of uvicorn is another than the one for each request that it cannot read."""
    return record.msg != "Invalid HTTP request received."


def listen(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address of the host; one on `::` takes IPv4 too, which asyncio's own would refuse.

    Raises OSError: the port is taken, the address is no address of this machine.
    """
    if host == "::" and socket.has_dualstack_ipv6():
        return [socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [socket.create_server(address[:2], family=family) for family, _, _, _, address in found]


def _connection_limit() -> int:
    """Return CONNECTIONS, or fewer if the hard limit of open files is lower; raises a soft limit that is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = CONNECTIONS + OWN_FILES
    if hard != resource.RLIM_INFINITY:
        files = min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(1, files - OWN_FILES)
