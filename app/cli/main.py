"""The program `ota-receiver`: its commands by name, and its exit codes.

The module of a command is imported when the command runs: `--help` and `health` load few of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from typing import Annotated, Any, Final

import typer

from app.cli import console
from app.cli.command import (
    AWAY,
    FOUND,
    INTERRUPTED,
    NO_ANSWER,
    OTHER_DEPLOYMENT,
    OTHER_SCHEMA,
    USAGE,
    Panel,
    Panels,
    Stop,
    commands,
    epilog,
)
from app.errors import BrokenRecord, NotKnown, OtherSchema, SettingsError, StoreUnavailable

COMMANDS: Final = {
    "serve": ("serve", "Receive events: run the HTTP endpoint (the `web` process)."),
    "worker": ("serve", "Fetch orders: run the pool of worker processes and its dispatcher (the `worker` process)."),
    "api": ("serve", "Serve orders and the feed to your own services: run the API (the `api` process)."),
    "ops": ("serve", "Show people their orders in a browser: run the ops page (the `ops` process)."),
    "keys": ("keys", "Keys of the API: who may read orders and the feed."),
    "check": ("check", "Check the settings, Redis and its durability, and each company's API and subscription."),
    "health": (
        "health",
        "Check that the web process, the worker pool, the API or the ops page of this machine (or container) works.",
    ),
    "status": ("status", "Show the backlog and its expected end, failures, worker pools and alerts."),
    "events": ("events", "Events received from the Channel Manager."),
    "orders": ("orders", "Orders: fetched, pending and failed."),
    "audit": ("status", "Show who changed something by hand, when, what and why."),
    "dead": ("dead", "Dead letters: orders and deliveries that failed for good."),
    "replays": ("replay", "Replays, made by `events replay` or on the ops page."),
    "sinks": ("sinks", "Sinks: where fetched orders are delivered."),
    "subscription": ("subscription", "The webhook subscription at the Channel Manager."),
    "reconcile": ("reconcile", "Compare the Channel Manager's order list with ours, and show the differences."),
    "demo": ("dev", "Send sample orders through real processes and show what arrived."),
    "dev": ("dev", "Run everything on a laptop until Ctrl-C, with an embedded Valkey and a simulated Channel Manager."),
    "simulate": ("dev", "Send late, duplicate, batched and forged events, and check the outcome of every order."),
}
"""Name -> its module, and its line in `--help`: the first sentence of its own help."""

_PANELS: Final[dict[Panel, tuple[str, ...]]] = {
    "Run": ("serve", "worker", "api", "ops", "keys", "check", "health"),
    "Look": ("status", "events", "orders", "audit"),
    "Repair": ("dead", "replays", "sinks", "subscription", "reconcile"),
    "Try": ("demo", "dev", "simulate"),
}

_FROM_SOURCE: Final = frozenset({"demo", "dev"})
"""Commands of an installation with app.dev; the image has none."""


_CODES: Final = {
    OTHER_DEPLOYMENT: "another deployment uses this Redis",
    NO_ANSWER: "no usable answer from the Channel Manager",
}


class _Loaded(Mapping[str, Any]):
    """The commands that are installed, by name; each is loaded when it is read."""

    def __getitem__(self, name: str) -> Any:
        if name not in list(self):
            raise KeyError(name)
        group: Any = typer.main.get_group(import_module(f"app.cli.{COMMANDS[name][0]}").cli)
        return group.commands.get(name, group)

    def __iter__(self) -> Iterator[str]:
        has_dev = find_spec("app.dev") is not None
        return (name for name in COMMANDS if has_dev or name not in _FROM_SOURCE)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Program(Panels):
    """The root group: lists its commands without loading them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Loaded()  # type: ignore[assignment]  # nothing adds commands

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def lines(self, width: int) -> Iterator[tuple[Panel, str, str]]:
        installed = list(self.commands)
        return ((of, name, COMMANDS[name][1]) for of, names in _PANELS.items() for name in names if name in installed)


cli = commands(
    cls=_Program,
    name="ota-receiver",
    invoke_without_command=True,
    epilog=epilog("ota-receiver orders explain CM-4711", codes=_CODES),
    help="Receives NaviPartner OTA Channel Manager webhooks, fetches each settled order once, and loses none.",
)


@cli.callback()
def _options(show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if show:
        from importlib.metadata import version  # here: it loads slowly

        typer.echo(version("ota-receiver"))
        raise typer.Exit


def main() -> None:
    """Run `ota-receiver`; an error that a person can cause ends in one sentence and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        cli()
    except Stop as stop:
        _end(str(stop), stop.code)
    except SettingsError as error:
        lines = [f"  {line}" for line in str(error).splitlines()]
        _end("\n".join(["The settings are incomplete or wrong:", *lines]), USAGE)
    except (BrokenRecord, NotKnown) as error:
        _end(str(error), FOUND)
    except StoreUnavailable as error:
        _end(str(error), OTHER_SCHEMA if isinstance(error, OtherSchema) else AWAY)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            console.close()
            _end(f"Cannot write the output: {error.strerror}.", FOUND)
        raise


def _end(text: str, code: int) -> None:
    for line in text.split("\n"):
        console.remark(line)
    raise SystemExit(code) from None
