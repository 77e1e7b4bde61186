"""The caller's end of the line: whether it still listens while a call is kept waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def hung_up(receive: Receive) -> None:
    """Return when the caller closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def outlasts(receive: Receive, seconds: float) -> bool:
    """Wait `seconds`; return early, and False, when the caller hangs up."""
    gone = asyncio.ensure_future(hung_up(receive))
    done, _ = await asyncio.wait({gone}, timeout=seconds)
    gone.cancel()
    return not done


async def body(receive: Receive) -> bytes:
    """Return the whole body of a request."""
    whole = bytearray()
    while True:
        message = await receive()
        whole += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(whole)
