"""`python -m app.dev.sandbox`: one process on a loopback port, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from app.dev.sandbox.admin import Admin
from app.dev.sandbox.channel_manager import ChannelManager
from app.dev.sandbox.orders import Orders
from app.dev.sandbox.webhooks import Webhooks
from app.dev.sandbox.world import Settings, World

_BACKLOG = 1024


def application(settings: Settings, seed: int) -> Starlette:
    """Return the ASGI app of a new sandbox."""
    world = World(settings, seed)
    webhooks = Webhooks(world)
    orders = Orders(world, webhooks)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with webhooks.sending():
            yield

    admin = Mount("/_sandbox", routes=Admin(world, orders, webhooks).routes())
    return Starlette(routes=[admin, Mount("/", app=ChannelManager(world, orders, webhooks))], lifespan=lifespan)


def main() -> None:
    """Run until a signal, which ends the process with exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m app.dev.sandbox", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 (default): any free port")
    parser.add_argument("--seed", type=int, default=0, help="ids, numbers and faults depend on it")
    for field in msgspec.structs.fields(Settings):
        option = "--" + field.name.removesuffix("_ms").replace("_", "-")
        parser.add_argument(option, dest=field.name, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    port, seed = options.pop("port"), options.pop("seed")
    try:
        settings = msgspec.convert(options, Settings)
    except msgspec.ValidationError as error:
        parser.error(str(error))
    listener = socket.create_server(("127.0.0.1", port), backlog=_BACKLOG)
    config = uvicorn.Config(
        application(settings, seed),
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=0,
    )
    server = uvicorn.Server(config)
    logging.basicConfig(level=logging.WARNING)
    # uvicorn reports an answer that a `cut` fault breaks off, and calls that still hang at the end, as errors.
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: not server.should_exit and "without completing" not in record.getMessage()
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn shuts down and then raises the signal again.
        signal.signal(number, lambda *_: sys.exit(0))
    # The socket listens already, so a reader of this line can connect at once.
    url = "http://{}:{}".format(*listener.getsockname())
    sys.stdout.write(json.dumps({"url": url, "pid": os.getpid(), "seed": seed}) + "\n")
    sys.stdout.flush()
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
