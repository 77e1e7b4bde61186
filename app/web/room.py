"""Who is connected, and who has to go when there are too many."""

from __future__ import annotations

from typing import Protocol

import msgspec
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
