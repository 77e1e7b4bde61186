"""A Redis client of one socket, without pool and retry: the property test makes half a million small calls.

Redis's own client takes three times as long for each, and the test is about the server.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import hiredis
from redis import Redis
from redis.exceptions import NoScriptError, ResponseError


class SocketRedis(Redis):
    """Sends a command and waits for its answer; texts are bytes.

    The commands given to `follow` go with every script in one round trip; `followed` has their latest answers.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()
        self._following, self._followers = b"", 0
        self.followed: list[Any] = []
        self.execute_command("AUTH", address.password)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Return the raw answer; raises redis.ResponseError."""
        name, *values = args
        is_script = name == "EVALSHA"
        command = hiredis.pack_command((*name.split(), *values))
        self._socket.sendall(command + self._following if is_script else command)
        answer = self._answer()
        if is_script:
            self.followed = [self._answer() for _ in range(self._followers)]
        if isinstance(answer, hiredis.ReplyError):
            text = str(answer)
            raise NoScriptError(text) if text.startswith("NOSCRIPT") else ResponseError(text)
        return answer

    def follow(self, commands: Sequence[tuple[Any, ...]]) -> None:
        """Send these commands after every script from now on."""
        self._following, self._followers = b"".join(hiredis.pack_command(one) for one in commands), len(commands)

    def _answer(self) -> Any:
        while (answer := self._reader.gets()) is False:
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionError("the server closed the connection")
            self._reader.feed(received)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self.close()
