"""How a command is declared: its examples, its exit codes, and the options that mean the same in every command.

No command passes the values of these options on: what prints, asks or writes to the audit reads `flags()`.
"""

from __future__ import annotations

import functools
import inspect
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import typer
from typer.core import TyperGroup

from app.errors import ReceiverError

DONE: Final = 0
FOUND: Final = 1
USAGE: Final = 2
AWAY: Final = 3
OTHER_SCHEMA: Final = 4
OTHER_DEPLOYMENT: Final = 5
NO_ANSWER: Final = 6
INTERRUPTED: Final = 130
UNREAD: Final = 141
"""As shells report a program that SIGPIPE ended."""

_CODES: Final = {
    DONE: "done",
    FOUND: "a problem, or not found",
    USAGE: "wrong usage or settings, or confirmation needed without a terminal",
    AWAY: "Redis unavailable, or too old",
    OTHER_SCHEMA: "Redis holds data of another schema version",
    INTERRUPTED: "interrupted",
    UNREAD: "output pipe closed",
}
NO_REDIS: Final = {AWAY: "", OTHER_SCHEMA: "", INTERRUPTED: ""}
"""For `epilog`: a command that itself neither fails without Redis nor is interrupted."""

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})

F = TypeVar("F", bound=Callable[..., None])


class Stop(ReceiverError):
    """The command ends with `text` on stderr and the exit code `code`."""

    def __init__(self, text: str, code: int = USAGE) -> None:
        super().__init__(text)
        self.code = code


def _audited(option: typer.CallbackParam, text: str) -> str:
    """Return the text of --who or --why; the default of --who is user@host."""
    from app.audit import LONGEST_TEXT  # here: `--help` and `health` load no redis

    if option.name == "who" and not text:
        user = os.environ.get("USER") or os.environ.get("LOGNAME") or f"uid{os.getuid()}"
        text = f"{user}@{socket.gethostname()}"
    if len(text) > LONGEST_TEXT or not text.isprintable():
        raise Stop(f"--{option.name} must be one line of at most {LONGEST_TEXT} printable characters.")
    return text


@dataclass(frozen=True)
class Flags:
    """The shared options of the command that runs. `who` and `why` are one short line each."""

    company: Annotated[str | None, typer.Option("--company", "-c", help="Slug or GUID of the company.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would happen; change nothing.")] = False
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False
    who: Annotated[str, typer.Option("--who", callback=_audited, help="Name for the audit, instead of user@host.")] = ""
    why: Annotated[str, typer.Option("--why", callback=_audited, help="Reason for the audit; one line.")] = ""
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False


_OPTIONS: Final = inspect.signature(Flags, eval_str=True).parameters
_flags: Final[ContextVar[Flags]] = ContextVar("flags")


def flags() -> Flags:
    """Return the shared options of the command that runs."""
    return _flags.get()


Panel = Literal["Run", "Look", "Repair", "Try"]
"""What a command is for; its place in the help."""


class Panels(TyperGroup):
    """A group whose help lists its commands by panel, in plain text: it loads in half the time of rich's."""

    def lines(self, width: int) -> Iterator[tuple[Panel, str, str]]:
        """Return of each command its panel, its name and its line, of at most `width` characters."""
        for name, found in self.commands.items():
            # What a person puts their name to, or may try without effect, changes something.
            panel: Panel = "Repair" if {"who", "dry_run"} & {one.name for one in found.params} else "Look"
            yield panel, name, found.get_short_help_str(width)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        lines = list(self.lines(formatter.width - max(map(len, self.commands)) - 6))
        for panel in get_args(Panel):
            if shown := [(name, line) for of, name, line in lines if of == panel]:
                with formatter.section(panel):
                    formatter.write_dl(shown)


def commands(*, cls: type[Panels] = Panels, **options: Any) -> typer.Typer:
    """Return an empty group of commands."""
    return typer.Typer(
        cls=cls,
        context_settings={"help_option_names": ["-h", "--help"]},
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        **options,
    )


def command(
    group: typer.Typer, *examples: str, options: str = "", codes: Mapping[int, str] | None = None
) -> Callable[[F], F]:
    """Return the decorator that adds a function to the group, as the command of its name.

    `options` names the shared options that the command has besides --json, in the order of its help. `examples` and
    `codes` as in `epilog`.
    """
    if "yes" not in options.split():
        codes = {USAGE: "wrong usage or settings"} | dict(codes or {})

    def declare(function: F) -> F:
        own = inspect.signature(function, eval_str=True)
        shared = [_OPTIONS[name] for name in (*options.split(), "as_json")]

        @functools.wraps(function)
        def run(**given: Any) -> None:
            _flags.set(Flags(**{one.name: given.pop(one.name) for one in shared}))
            function(**given)

        vars(run)["__signature__"] = own.replace(parameters=[*own.parameters.values(), *shared])
        group.command(function.__name__.strip("_"), epilog=epilog(*examples, codes=codes))(run)
        return function

    return declare


def epilog(*examples: str, codes: Mapping[int, str] | None = None) -> str:
    """Return the end of a command's help: examples and exit codes.

    `codes` replaces meanings of exit codes; "" leaves one out.
    """
    shown = [f"Example: {example}" for example in examples]
    meanings = " · ".join(f"{code} {text}" for code, text in sorted((_CODES | dict(codes or {})).items()) if text)
    return "\n\n".join([*shown, f"Exit codes: {meanings}"])
