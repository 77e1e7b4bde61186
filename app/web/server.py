"""uvicorn's server as this service runs it: bounded connections, and an end that answers what was begun.

Who is connected, and who has to go when there are too many.

What a connection reads and writes through, where uvicorn's own way would lose something.

A time-out that can be set and lifted again and again, and counts from when it was first set.

One HTTP connection with bounds on what uvicorn leaves open: a head's size and time, requests ahead, idle ones.

Checked against uvicorn 0.54 and httptools 0.9: uvicorn has no time-out before the first answer, no limit on a head
(`h11_max_incomplete_event_size` is h11's), reads on while pipelined requests wait, waits for ever for a client that
does not read its answers, and answers a broken request before the ones that came ahead of it.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState


class Guest(Protocol):
    """What a connection has to do when it is told."""

    def drop(self) -> None: ...

    def last_request(self) -> None: ...


class Bounds(msgspec.Struct, frozen=True):
    """What connections may take; times in seconds.

    `seats`: connections at once, more than requests at once (webhook.AT_ONCE), so that who is one too many hears 503.
    `head`: from connecting, or from the first byte of a later request, to the end of its head.
    `flush`: a client that has not taken its answer by then never will.
    `parting`: after a refusal the rest is read and dropped so long, as closing on unread bytes destroys the answer.
    """

    seats: int = 1200
    head: float = 10
    flush: float = 10
    parting: float = 2


class Room(ServerState):
    """Who is connected. `silent` never sent a whole head, `resting` wait between requests; longest first."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__()
        self.connections: set[Guest] = set()  # type: ignore[assignment]  # of uvicorn's protocols only ours come
        self.bounds = bounds
        self.silent: dict[Guest, None] = {}
        self.resting: dict[Guest, None] = {}
        self.draining = False

    def drain(self) -> None:
        """Let every connection take no other request than the one under way, or one more."""
        self.draining = True
        for connection in self.connections:
            connection.last_request()

    def make_room(self) -> None:
        """Drop who has waited longest without a request while there are too many; who is being answered stays."""
        while len(self.connections) > self.bounds.seats and (waiting := self.silent or self.resting):
            next(iter(waiting)).drop()

    def forget(self, connection: Guest) -> None:
        self.silent.pop(connection, None)
        self.resting.pop(connection, None)


class InTurn(FlowControl):
    """Reads nothing while requests wait for their turn."""

    def __init__(self, transport: asyncio.Transport, waiting: deque[Any]) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class Exit:
    """What a request's answer is written to: closing it leaves the client time to read."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


class Deadline:
    """Calls `missed` when it was set and not lifted for `seconds`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, missed: Callable[[], None]) -> None:
        self._loop = loop
        self._missed = missed
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """Start counting, unless it counts already."""
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._over)

    def lift(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _over(self) -> None:
        self._timer = None
        self._missed()


if TYPE_CHECKING:
    from uvicorn.config import Config

HEAD_BYTES: Final = 65_536
HEADERS: Final = 100

AHEAD: Final = 16
"""Requests that may wait behind the one being answered; each costs about 3 KB, and no known sender sends any."""

PARTING_BYTES: Final = 4 * 1024 * 1024
"""Read and dropped after a refusal, at most."""


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, bounded. Needs a `Room` as the server's state."""

    server_state: Room

    def __init__(
        self,
        config: Config,
        server_state: Room,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bounds = server_state.bounds
        self._head_deadline = Deadline(self.loop, self._too_slow)
        self._end_deadline = Deadline(self.loop, self.drop)
        self._in_head = self._in_body = False
        self._head_bytes = 0
        self._fed = 0
        self._dropped = 0
        self._fault = HTTPStatus.BAD_REQUEST
        self._refusal: HTTPStatus | None = None
        self._deaf = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.flow = InTurn(transport, self.pipeline)
        self._exit = cast("asyncio.Transport", Exit(transport, self._leave))
        self.server_state.silent[self] = None
        self._head_deadline.set(self._bounds.head)
        self.server_state.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.forget(self)
        self._head_deadline.lift()
        self._end_deadline.lift()
        super().connection_lost(exc)

    def drop(self) -> None:
        """Close at once and leave the room at once: uvicorn would hear of it only in the next turn."""
        self.server_state.forget(self)
        self.connections.discard(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._dropped += len(data)
            if self._dropped > PARTING_BYTES:
                self.drop()
            return
        in_head_before = not self._in_body
        self._fed = self._head_bytes + len(data)
        super().data_received(data)
        if self._deaf or self.transport.is_closing():
            return
        if self._in_head and in_head_before:
            # A chunk that ended one request and began the next counts too: that errs by one chunk.
            self._head_bytes = self._fed
            if self._head_bytes > HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                return
        # What comes while nothing is being answered ended the keep-alive time-out: blank lines, an unwanted body.
        if self._in_head or self.cycle is None or self.cycle.response_complete:
            self._head_deadline.set(self._bounds.head)

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio lets it say that writing goes on
        """Answer who has ended its side after a whole request, and let others go."""
        if self._in_body or self.cycle is None or self.cycle.response_complete:
            return None
        self.cycle.keep_alive = False
        return True

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= AHEAD:
            self._fault = HTTPStatus.TOO_MANY_REQUESTS
            raise _Refused
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        if len(self.headers) > HEADERS or (self._fed > HEAD_BYTES and self._size_of_head() > HEAD_BYTES):
            self._fault = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise _Refused
        super().on_headers_complete()
        self.cycle.transport = self._exit
        self._in_head, self._in_body = False, True
        self._head_bytes = 0
        self._head_deadline.lift()
        self.server_state.forget(self)
        if self.server_state.draining:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if self.transport.is_closing() or not is_last:
            return
        if self._refusal is not None:
            self._say(self._refusal)
        elif self._deaf:
            self._unset_keepalive_if_required()
        else:
            self.server_state.resting[self] = None
            if self._in_body:
                self._head_deadline.set(self._bounds.head)

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser could not read; uvicorn calls this."""
        if not self._deaf:
            self._refuse(self._fault)

    def shutdown(self) -> None:
        """Close when what is being answered is answered, at once if nothing is; uvicorn calls this."""
        super().shutdown()
        if self.transport.is_closing():
            self._end_deadline.set(self._bounds.flush)

    def last_request(self) -> None:
        """Tell the client, with the answer under way, that this connection takes no other request."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_deadline.set(self._bounds.flush)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._deaf and not self.transport.is_closing():
            self._end_deadline.lift()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._end_deadline.set(self._bounds.flush)

    def _unsupported_upgrade_warning(self) -> None:
        """Answer as if nobody had asked for another protocol, and read no more of it (httptools stops there)."""
        self.last_request()
        self._deaf = True

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer `status` and close, in turn: earlier requests get their answers first."""
        self._deaf = True
        self._head_deadline.lift()
        if self._in_body and self.pipeline:
            self.pipeline.popleft()  # the newest, whose body cannot be read to its end
        elif self._in_body or self.cycle is None or self.cycle.response_complete:
            self._say(status)
            return
        self._refusal = status

    def _say(self, status: HTTPStatus) -> None:
        """Write an answer without a body and close, unless the answer has begun."""
        self._unset_keepalive_if_required()
        if self._in_body:
            if self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        lines = [STATUS_LINE[status]]
        lines += [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
        lines += [b"content-length: 0\r\nconnection: close\r\n\r\n"]
        self.transport.write(b"".join(lines))
        self._linger()

    def _leave(self) -> None:
        """Close after an answer; uvicorn calls this."""
        if self._in_body:
            self._linger()
        else:
            self.transport.close()
            self._end_deadline.set(self._bounds.flush)

    def _linger(self) -> None:
        """Send the end, read what still comes and drop it, and close when the other side does or time is up."""
        self._deaf = True
        self._head_deadline.lift()
        self._end_deadline.lift()
        self._end_deadline.set(self._bounds.parting)
        self.server_state.forget(self)
        self.server_state.silent[self] = None
        if not self.transport.is_closing():
            self.transport.write_eof()
            self.flow.resume_reading()

    def _too_slow(self) -> None:
        if self._in_head:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self._leave()

    def _size_of_head(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)


class _Refused(Exception):
    """Ends the parser, which hands it on as an error of its own."""


OWN_FILES: Final = 100
"""File descriptors that are no connection of a client: Redis, logs, the event loop."""

KEEP_ALIVE_SECONDS: Final = 75
"""Longer than proxies keep an idle connection (nginx and AWS: 60 s), or they would send into a closing one."""

LINGER_SECONDS: Final = 1.0
"""After SIGTERM idle connections may bring one more request, which is answered with `connection: close`."""

LAST_SECONDS: Final = 7
"""Then what is under way has so long; with the time-outs of Redis the end comes before the 10 s of `docker stop`."""

_POLL: Final = 0.02


class Server(uvicorn.Server):
    """Serves `app` until SIGTERM or SIGINT, then answers what it has begun. How often it is told makes no difference.

    A terminal and the program that runs this one both pass Ctrl-C on; uvicorn takes the second for impatience and
    drops requests under way.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, bounds: Bounds) -> None:
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
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        super().__init__(config)
        self.server_state: Room = Room(_within_open_files(bounds))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end; a signal handler."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server_state.drain()
        await self._close_the_door()
        clock = asyncio.get_running_loop().time
        deadline = clock() + LINGER_SECONDS
        while self.server_state.connections and clock() < deadline:  # noqa: ASYNC110  # uvicorn's set cannot be awaited
            await asyncio.sleep(_POLL)
        await super().shutdown(sockets)

    async def _close_the_door(self) -> None:
        """Stop listening, but take in who has connected already: the kernel would reset those."""
        knocked: list[socket.socket] = []
        for server in self.servers:
            for listener in server.sockets:
                with socket.socket(fileno=socket.dup(listener.fileno())) as door:
                    knocked += _accepted(door)
            server.close()
        loop = asyncio.get_running_loop()
        for one in knocked:
            await loop.connect_accepted_socket(self._connection, one)

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)


def _accepted(door: socket.socket) -> list[socket.socket]:
    """Return every connection that waits at a listening socket."""
    found: list[socket.socket] = []
    door.setblocking(False)
    while True:
        try:
            found.append(door.accept()[0])
        except OSError:
            return found


def _within_open_files(bounds: Bounds) -> Bounds:
    """Return bounds with as many seats as the limit of open files allows; a soft limit that is too low is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = bounds.seats + OWN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return bounds
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return msgspec.structs.replace(bounds, seats=max(1, soft - OWN_FILES))
