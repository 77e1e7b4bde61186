"""`python -m app.dev.sandbox`: one process on a loopback port, until SIGTERM or SIGINT."""

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
from app.dev.sandbox.channel_manager import ChannelManager
from app.dev.sandbox.settings import Settings, Shape
from app.dev.sandbox.world import World

_BACKLOG = 1024


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which raise the signal again at the end: the exit code would not be 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def application(world: World) -> Starlette:
    """Return the ASGI app over a world."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with world.webhooks.sending():
            yield

    routes = [Mount("/_sandbox", routes=Admin(world).routes()), Mount("/", app=ChannelManager(world))]
    return Starlette(routes=routes, lifespan=lifespan)


def main() -> int:
    """Run until a signal; return the exit code."""
    parser = _parser()
    options = parser.parse_args()
    try:
        settings = msgspec.convert({name: getattr(options, name) for name in Settings.__struct_fields__}, Settings)
    except msgspec.ValidationError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.WARNING)
    # A `cut` fault breaks off an answer on purpose; uvicorn reports it as an error.
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
        runner.run(_serve(_Server(config), listener, options.seed))
    return 0


async def _serve(server: _Server, listener: socket.socket, seed: int) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True
        # Calls that hang on purpose are cut off now; uvicorn would report each as an error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    host, port = listener.getsockname()
    # The socket listens already, so a reader of this line can connect at once.
    sys.stdout.write(json.dumps({"url": f"http://{host}:{port}", "pid": os.getpid(), "seed": seed}) + "\n")
    sys.stdout.flush()
    await server.serve(sockets=[listener])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.dev.sandbox", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 (default): any free port")
    parser.add_argument("--seed", type=int, default=0, help="ids, numbers and faults depend on it")
    names = {"latency_ms": "--latency"}
    for field in msgspec.structs.fields(Settings):
        flag = names.get(field.name, f"--{field.name.replace('_', '-')}")
        extra: dict[str, Any] = {"dest": field.name, "default": field.default}
        if field.name == "shape":
            parser.add_argument(flag, choices=get_args(Shape), **extra)
        else:
            parser.add_argument(flag, type=type(field.default), **extra)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
