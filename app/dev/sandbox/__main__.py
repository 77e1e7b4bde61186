"""`python -m app.dev.sandbox`: one process on a loopback port, until SIGTERM, SIGINT, or its parent's death."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any, get_args

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from app.dev.sandbox.admin import Admin
from app.dev.sandbox.gateway import Gateway
from app.dev.sandbox.settings import Settings, Shape
from app.dev.sandbox.world import World

_BACKLOG = 1024
_PARENT_LOOK = 0.5


class _Server(uvicorn.Server):
    """Leaves the signals to us: uvicorn would raise them again at the end, and the exit code would not be 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def application(world: World) -> Starlette:
    """Return the ASGI app over a world."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with world.run():
            yield

    routes = [Mount("/_sandbox", routes=Admin(world).routes()), Mount("/", app=Gateway(world))]
    return Starlette(routes=routes, lifespan=lifespan)


def main() -> int:
    """Run until told to stop; return the exit code."""
    # Taken first: a parent that dies later is noticed by the change.
    parent = os.getppid()
    parser = _parser()
    options = parser.parse_args()
    try:
        settings = Settings().changed({name: getattr(options, name) for name in Settings.__struct_fields__})
    except msgspec.ValidationError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.WARNING)
    # A line that a fault breaks off is meant; uvicorn takes it for a mistake.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing" not in record.getMessage())
    listener = socket.create_server(("127.0.0.1", options.port), backlog=_BACKLOG)
    config = uvicorn.Config(
        application(World(settings, options.seed)),
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=0,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(_Server(config), listener, options.seed, parent))
    return 0


async def _serve(server: _Server, listener: socket.socket, seed: int, parent: int) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True
        # Calls that still hang are cut off now; that is what they are for, and no error to be told of.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    def look_for_parent() -> None:
        if os.getppid() == parent:
            loop.call_later(_PARENT_LOOK, look_for_parent)
        else:
            stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    look_for_parent()
    host, port = listener.getsockname()
    # The socket listens already: who connects on reading this is served, if a moment later.
    sys.stdout.write(json.dumps({"url": f"http://{host}:{port}", "pid": os.getpid(), "seed": seed}) + "\n")
    sys.stdout.flush()
    await server.serve(sockets=[listener])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.dev.sandbox", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 (default): any that is free")
    parser.add_argument("--seed", type=int, default=0, help="what ids, numbers and faults follow from")
    names = {"latency_ms": "--latency"}
    for field in msgspec.structs.fields(Settings):
        flag = names.get(field.name, f"--{field.name.replace('_', '-')}")
        extra: dict[str, Any] = {"dest": field.name, "default": field.default}
        if field.type is bool:
            parser.add_argument(flag, action="store_true", **extra)
        elif field.name == "shape":
            parser.add_argument(flag, choices=get_args(Shape), **extra)
        else:
            parser.add_argument(flag, type=type(field.default), **extra)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
