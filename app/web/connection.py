"""One HTTP connection with bounds on what uvicorn leaves open: a head's size and time, requests ahead, idle ones.

Checked against uvicorn 0.54 and httptools 0.9: uvicorn has no time-out before the first answer, no limit on a head
(`h11_max_incomplete_event_size` is h11's), reads on while pipelined requests wait, waits for ever for a client that
does not read its answers, and answers a broken request before the ones that came ahead of it.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.web.deadline import Deadline
from app.web.flow import Exit, InTurn
from app.web.room import Room

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
