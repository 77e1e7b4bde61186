"""A Channel Manager whose every answer a test writes, down to the bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import parse_qs, urlsplit

Reply = Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Asked:
    """One request as received."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.target).query).items()}


@dataclass
class Upstream:
    """A server that gives the `replies` in turn and repeats the last one."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    callers: set[tuple[str, int]] = field(default_factory=set)
    over: Event = field(default_factory=Event)

    @property
    def port(self) -> str:
        return self.url.rpartition(":")[2]

    def will(self, *replies: Reply) -> None:
        self.replies[:] = replies

    def slowly(self, *first: bytes, then: bytes, every: float) -> Reply:
        """Send `first` at once, and `then` again and again each `every` seconds, a hundred times."""

        def pieces() -> Iterator[bytes]:
            yield from first
            for _ in range(100):
                if self.over.wait(every):
                    return
                yield then

        return pieces


def says(status: int = 200, body: bytes = b"", **headers: str) -> Reply:
    """Reply with a complete answer; a header named `retry_after` is sent as `retry-after`."""
    lines = [f"HTTP/1.1 {status} Because", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def raw(*pieces: bytes) -> Reply:
    return lambda: pieces


def says_json(tree: object, status: int = 200, **headers: str) -> Reply:
    return says(status, json.dumps(tree).encode(), **headers)


@contextmanager
def running() -> Iterator[Upstream]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client closes the connection of an answer that it refuses
                super().handle()

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            fake.asked.append(Asked(self.command, self.path, headers, body))
            fake.callers.add(self.client_address)
            reply = fake.replies.pop(0) if len(fake.replies) > 1 else fake.replies[0]
            self.close_connection = True  # whatever is not a complete answer ends with the connection
            with suppress(OSError):
                for piece in reply():
                    self.wfile.write(piece)
                    self.close_connection = b"\r\ncontent-length: " not in piece  # as `says` writes it

        do_GET = do_POST = do_DELETE = answer  # noqa: N815  # names that http.server looks for

        def log_message(self, *_: object) -> None:
            """Write nothing to the output of the test."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake = Upstream(f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        fake.over.set()
        server.shutdown()
        thread.join()
