"""uvicorn's server as this service runs it: bounded connections, and an end that answers what was begun."""

from __future__ import annotations

import asyncio
import resource
import socket
from types import FrameType
from typing import Final

import msgspec
import uvicorn
from starlette.types import ASGIApp

from app.web.connection import Connection
from app.web.room import Bounds, Room

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
