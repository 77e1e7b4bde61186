"""A stretch of network between two programs, which can be slow or lead elsewhere: what a failing over Redis shows."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator


class Relay:
    """Forwards a port of its own to `target`; a new target holds for new connections only, as a moved address does.

    The next answer that contains `cut_at` is lost with its connection.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay = 0.0
        self.cut_at = b""
        self._known = 0
        self._forgotten, self._answer = 0, b""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def forget(self, answer: bytes = b"") -> None:
        """Pass on nothing of the connections that are open now, and close none: so do routers after a quiet hour.

        With an `answer` they give it to everything, as a server that has another role by now.
        """
        self._forgotten, self._answer = self._known, answer

    def url(self, url: str) -> str:
        """Return the address of a Redis as it is seen through the relay."""
        return url.replace(f":{self.target}", f":{self.port}")

    def end(self) -> None:
        """Close the door, then every connection, and return when nothing of them is left."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for end in self._open:
            _hang_up(end)
        for thread in self._threads:
            thread.join()
        for end in self._open:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._open.append(near)
                self._forward(near)

    def _forward(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
        except OSError:
            _hang_up(near)
            return
        far.settimeout(None)
        self._open.append(far)
        self._known += 1
        for source, target in ((near, far), (far, near)):
            thread = threading.Thread(target=self._copy, args=(source, target, self._known))
            self._threads.append(thread)
            thread.start()

    def _copy(self, source: socket.socket, target: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                if number <= self._forgotten:
                    source.sendall(self._answer)
                    continue
                if self.cut_at and self.cut_at in part:
                    self.cut_at = b""
                    break
                time.sleep(self.delay)
                target.sendall(part)
        _hang_up(target)


class Proxy(Relay):
    """A relay that first takes a CONNECT, whatever the host; it asks for `authorization` unless it is "".

    `refusal` is what it answers instead of 200. `asked` are the heads that it got.
    """

    def __init__(self, target: int, authorization: str = "", refusal: str = "") -> None:
        self.authorization, self.refusal = authorization, refusal
        self.asked: list[str] = []
        super().__init__(target)

    def _forward(self, near: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n") and (part := near.recv(4096)):
            head += part
        self.asked.append(head.decode())
        answer = self.refusal or "200 Connection established"
        if f"proxy-authorization: {self.authorization}".lower() not in self.asked[-1].lower() and self.authorization:
            answer = "407 Proxy Authentication Required"
        near.sendall(f"HTTP/1.1 {answer}\r\n\r\n".encode())
        if answer.startswith("2"):
            super()._forward(near)
        else:
            _hang_up(near)


def _hang_up(end: socket.socket) -> None:
    """Tell the other side and wake the thread that reads here; the number stays taken until the relay ends."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def relay(target: int) -> Iterator[Relay]:
    """Run a relay to the port `target` until the block ends."""
    one = Relay(target)
    try:
        yield one
    finally:
        one.end()
