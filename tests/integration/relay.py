"""A stretch of network between two programs, which can be slow or lead elsewhere: what a failing over Redis shows."""

from __future__ import annotations

import asyncio
import contextlib
import threading
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
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def forget(self, answer: bytes = b"") -> None:
        """Pass on nothing of the connections that are open now, and close none: so do routers after a quiet hour.

        With an `answer` they give it to everything, as a server that has another role by now.
        """
        self._forgotten, self._answer = self._known, answer

    def url(self, url: str) -> str:
        """Return the address of a Redis as it is seen through the relay."""
        return url.replace(f":{self.target}", f":{self.port}")

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _forward(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            far, far_out = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            near_out.close()
            return
        self._known += 1
        for one, other, back in ((near, far_out, near_out), (far, near_out, far_out)):
            task = asyncio.create_task(self._copy(one, other, back, self._known))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _copy(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, back: asyncio.StreamWriter, number: int
    ) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while part := await source.read(65536):
                if number <= self._forgotten:
                    back.write(self._answer)
                    continue
                if self.cut_at and self.cut_at in part:
                    self.cut_at = b""
                    break
                await asyncio.sleep(self.delay)
                target.write(part)
                await target.drain()
        target.close()

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks)


@contextlib.contextmanager
def relay(target: int) -> Iterator[Relay]:
    """Run a relay to the port `target` until the block ends."""
    one = Relay(target)
    one._loop.run_until_complete(one._serve())
    thread = threading.Thread(target=one._loop.run_forever, daemon=True)
    thread.start()
    try:
        yield one
    finally:
        asyncio.run_coroutine_threadsafe(one._end(), one._loop).result(5)
        one._loop.call_soon_threadsafe(one._loop.stop)
        thread.join(5)
        one._loop.close()
