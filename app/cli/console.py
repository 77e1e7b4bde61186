"""What commands print, ask and end with: JSON lines or tables on stdout, everything else on stderr.

Values of upstream and of senders are shown as plain text: neither markup nor a terminal's control codes work.
rich is loaded when a table or a progress bar is drawn.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import msgspec
import typer

from app.errors import ReceiverError

if TYPE_CHECKING:
    from rich.console import Console

DONE: Final = 0
FOUND: Final = 1
USAGE: Final = 2
AWAY: Final = 3
NEWER: Final = 4
INTERRUPTED: Final = 130
UNREAD: Final = 141
"""As shells report a program that SIGPIPE ended."""

_CODES: Final = {
    DONE: "done",
    FOUND: "a problem, or nothing found",
    USAGE: "wrong usage or settings, or confirmation needed without a terminal",
    AWAY: "Redis unavailable",
    NEWER: "Redis holds data of another version",
    INTERRUPTED: "interrupted",
    UNREAD: "output pipe closed",
}

WIDTH: Final = 80
"""Columns of text for people."""

_PIPED_WIDTH: Final = 200
"""Columns of a table when stdout is no terminal: rich's 80 would break GUIDs in two."""

_GAP: Final = 3
"""Columns between two columns of a table; its two edges take one less."""

_COMMAND: Final = re.compile(r"(ota-receiver .*?)(?:\. (?=If )|$)")

_encoder = msgspec.json.Encoder(decimal_format="number")

T = TypeVar("T")


class Stop(ReceiverError):
    """The command ends with `text` on stderr and the exit code `code`."""

    def __init__(self, text: str, code: int = USAGE) -> None:
        super().__init__(text)
        self.code = code


def commands(**options: Any) -> typer.Typer:
    """Return an empty group of commands, whose help is plain text: it loads in half the time."""
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, **options)


def epilog(*examples: str, codes: Mapping[int, str] | None = None) -> str:
    """Return the end of a command's help: examples and exit codes.

    `codes` replaces meanings of exit codes; "" leaves one out.
    """
    shown = [f"Example: {example}" for example in examples]
    meanings = " · ".join(f"{code} {text}" for code, text in sorted((_CODES | dict(codes or {})).items()) if text)
    return "\n\n".join([*shown, f"Exit codes: {meanings}"])


def json_line(value: Any) -> None:
    """Print one object on one line, at once; ends the program when the output pipe is closed."""
    _write(_encoder.encode(value).decode())


def say(text: str) -> None:
    """Print a line for people on stdout."""
    _write(_printable(text))


def remark(text: str) -> None:
    """Print a line for people on stderr, where it disturbs no pipe."""
    print(_printable(text), file=sys.stderr)  # noqa: T201  # this is where commands print


def result(text: str | Iterable[str], value: Any, as_json: bool) -> None:
    """Print the result of a command: a line or lines for people, or one object."""
    if as_json:
        json_line(value)
        return
    for line in [text] if isinstance(text, str) else text:
        say(line)


def listing(
    found: Sequence[T],
    as_json: bool,
    *,
    columns: Sequence[str],
    row: Callable[[T], Sequence[object]],
    view: Callable[[T], object],
    title: str = "",
    nothing: str = "",
) -> None:
    """Print the result of a list command: a table (see `table`), or one object a line.

    Raises Stop with the text `nothing` when there is nothing and the text is not empty.
    """
    if not found and nothing:
        raise Stop(nothing, FOUND)
    if as_json:
        for one in found:
            json_line(view(one))
    elif found:
        table(title, columns, map(row, found))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their headings, of which the first letter may be a mark.

    `=` is a column of ids, which are never broken: people copy them. `?` may be hidden where the terminal is too
    narrow, the last one first. `#` holds numbers, and may be hidden too.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = _out()
    cells = [["" if cell is None else _printable(str(cell)) for cell in row] for row in rows]
    marks = [heading[0] if heading[:1] in {"=", "?", "#"} else "" for heading in columns]
    names = [heading.removeprefix(mark) for heading, mark in zip(columns, marks, strict=True)]
    kept = _fitting(marks, names, cells, out.width) if sys.stdout.isatty() else range(len(columns))
    shown = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for at in kept:
        justify: Any = "right" if marks[at] == "#" else "left"
        shown.add_column(names[at], justify=justify, overflow="fold", no_wrap=marks[at] == "=")
    for row in cells:
        shown.add_row(*(Text(row[at]) for at in kept))
    out.print(shown)
    if hidden := [name for at, name in enumerate(names) if at not in kept]:
        remark(f"Hidden, as the terminal is too narrow: {', '.join(hidden)}. --json shows all.")


def facts(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, without those that are empty."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title or None, title_justify="left", box=None, show_header=False, pad_edge=False)
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in rows:
        if value not in ("", None):
            shown.add_row(name, Text(_printable(str(value))))
    _out().print(shown)


def wrapped(text: str, first: str = "", further: str = "") -> list[str]:
    """Return the text on lines of 80 columns; a command stands on a line of its own, to be copied."""
    found: list[str] = []
    for part in filter(None, map(str.strip, _COMMAND.split(text))):
        is_command = part.startswith("ota-receiver ")
        indent = "  " if is_command else further
        found += wrap(part, indent if found else first, "    " if is_command else further)
    return found


def wrap(text: str, first: str, further: str) -> list[str]:
    """Return the text on lines of 80 columns, the first of which begins with `first`, the others with `further`."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=further, break_on_hyphens=False)


def many(count: int, noun: str) -> str:
    """Return `1 order`, `2,000 orders`, `3 companies`, `4 crashes`."""
    if count == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith(("ry", "ny")) else f"{noun}es" if noun.endswith("sh") else f"{noun}s"
    return f"{count:,} {plural}"


def zone() -> str:
    """Return the name of the local time zone, for the heading of a column of times."""
    return datetime.now(UTC).astimezone().tzname() or "local"


def confirm(question: str, yes: bool) -> None:
    """Return if the answer is yes; raises Stop when it is no, or when it is needed and there is no terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Stop(f"{question} Not a terminal: pass --yes.")
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        raise typer.Exit(INTERRUPTED) from None
    if not agreed:
        raise Stop("Nothing was changed.", FOUND)


@contextmanager
def progress(task: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the block runs, if that is a terminal; yields what takes the size of each step.

    Without `total` it counts.
    """
    if not sys.stderr.isatty():
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    count = [TextColumn("{task.completed:,.0f}")] if total is None else [BarColumn(), MofNCompleteColumn()]
    text = TextColumn("{task.description}", markup=False)
    with Progress(SpinnerColumn(), text, *count, console=Console(stderr=True), transient=True) as bar:
        number = bar.add_task(task, total=total)
        yield lambda steps: bar.advance(number, steps)


def close() -> None:
    """Throw the rest of stdout's buffer away: Python would try to write it once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(line: str) -> None:
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _end_unread()


def _end_unread() -> NoReturn:
    close()
    raise SystemExit(UNREAD) from None


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def _out() -> Console:
    from rich.console import Console

    class Out(Console):
        """Ends with UNREAD where rich ends with 1, which of `orders explain` means "not complete"."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            _end_unread()

    return Out(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


def _fitting(marks: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the columns that fit side by side, or that must stay though they do not."""
    from rich.cells import cell_len

    needed = [max([len(name), *(cell_len(row[at]) for row in rows)]) for at, name in enumerate(names)]
    kept = list(range(len(names)))
    for at in reversed(kept[:]):
        if sum(needed[one] + _GAP for one in kept) - 1 > width and marks[at] in {"?", "#"}:
            kept.remove(at)
    return kept
