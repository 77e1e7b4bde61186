"""A client of one socket, without pool and retry: a property test makes half a million small calls.

Redis's own client takes three times as long for each, and what is tested is what the server does.
"""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import hiredis
from redis import Redis
from redis.exceptions import NoScriptError, ResponseError


class Wire(Redis):
    """Sends a command, waits for its answer; texts are bytes.

    What `follow` names goes with every script in one round trip; its latest answer stands in `followed`.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()
        self._following = b""
        self.followed: Any = None
        self.execute_command("AUTH", address.password)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Return the raw answer; raises redis.ResponseError."""
        name, *values = args
        following = self._following if name == "EVALSHA" else b""
        self._socket.sendall(hiredis.pack_command((*name.split(), *values)) + following)
        answer = self._answer()
        if following:
            self.followed = self._answer()
        if isinstance(answer, hiredis.ReplyError):
            text = str(answer)
            raise NoScriptError(text) if text.startswith("NOSCRIPT") else ResponseError(text)
        return answer

    def follow(self, *command: Any) -> None:
        """Send this after every script from now on; without arguments nothing."""
        self._following = hiredis.pack_command(command) if command else b""

    def _answer(self) -> Any:
        while (answer := self._reader.gets()) is False:
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionError("the server hung up")
            self._reader.feed(received)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self.close()
