"""What commands print: JSON lines or tables on stdout, everything else on stderr.

Values of upstream and of senders are shown as plain text: neither markup nor a terminal's control codes work.

One line of `check`: what was looked at, how it is, and what to do about it.

How a command ends: the exit codes, and the error that ends one with a sentence for the person who typed it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, Literal, NoReturn, TypeVar

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from app.errors import ReceiverError

DONE: Final = 0
FOUND: Final = 1
USAGE: Final = 2
AWAY: Final = 3
NEWER: Final = 4
INTERRUPTED: Final = 130
UNREAD: Final = 141
"""As shells say it of a program that SIGPIPE ended: whoever read stdout has left."""

CODES: Final = (
    "Exit codes: 0 done · 1 something is wrong, or nothing was found · 2 usage or settings, or a question that nobody"
    " could answer · 3 Redis does not answer, or refuses · 4 its data is of a newer version · 130 interrupted"
)
"""Of most commands; shown below their help."""


def epilog(*examples: str, codes: str = CODES) -> str:
    """Return what stands below the help of a command: how it may be typed, and its exit codes."""
    shown = [f"Example: {example}" for example in examples]
    return "\n\n".join([*shown, f"{codes} · {UNREAD} nobody reads its output any more"])


class Stop(ReceiverError):
    """End the command with `text` on stderr and `code`."""

    def __init__(self, text: str, code: int = USAGE) -> None:
        super().__init__(text)
        self.code = code


T = TypeVar("T")

_PIPED_WIDTH: Final = 200
"""Columns when stdout is no terminal: rich's 80 would break GUIDs in two."""

_GAP: Final = 3
"""Columns of the terminal between two of a table; its two edges take one less."""

_encoder = msgspec.json.Encoder(decimal_format="number")


def json_line(value: Any) -> None:
    """Print one object on one line, at once; ends the program when nobody reads any more."""
    try:
        sys.stdout.write(_encoder.encode(value).decode() + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _unread()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their headings, of which the first letter may be a mark.

    `=` is a column of ids, never broken: they are copied. `?` may be left out where the terminal is too narrow, the
    last of them first. `#` holds numbers, and may be left out too.
    """
    out = _out()
    cells = [[_plain(cell) for cell in row] for row in rows]
    kept = _fitting(columns, cells, out.width) if sys.stdout.isatty() else range(len(columns))
    shown = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for at in kept:
        mark, name = _marked(columns[at])
        shown.add_column(name, justify="right" if mark == "#" else "left", overflow="fold", no_wrap=mark == "=")
    for row in cells:
        shown.add_row(*(row[at] for at in kept))
    out.print(shown)
    if left_out := [_marked(heading)[1] for at, heading in enumerate(columns) if at not in kept]:
        remark(f"Left out, as this terminal is narrow: {', '.join(left_out)}. --json has all.")


def facts(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, leaving out those that are empty."""
    shown = Table(title=title or None, title_justify="left", box=None, show_header=False, pad_edge=False)
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in rows:
        if value not in ("", None):
            shown.add_row(name, _plain(value))
    _out().print(shown)


def say(text: str) -> None:
    """Print a sentence for people on stdout."""
    _out().print(_plain(text), soft_wrap=True)


def tell(text: str, value: Any, as_json: bool) -> None:
    """Print the end of a command: the sentence for people, or the same as an object."""
    if as_json:
        json_line(value)
    else:
        say(text)


def tell_lines(lines: Iterable[str], value: Any, as_json: bool) -> None:
    """Print the end of a command: several lines for people, or the same as one object."""
    if as_json:
        json_line(value)
        return
    for line in lines:
        say(line)


def many(count: int, noun: str) -> str:
    """Return `1 order`, `2,000 orders`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def remark(text: str) -> None:
    """Print a sentence on stderr, where it disturbs no pipe."""
    _err().print(_plain(text), soft_wrap=True)


def zone() -> str:
    """Return the name of the local zone, for the heading of a column of times."""
    return datetime.now(UTC).astimezone().tzname() or "local"


def confirm(question: str, yes: bool) -> None:
    """Return if the answer is yes.

    Raises Stop when it is no, or when there is neither `--yes` nor anybody to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Stop(f"{question} Nobody is here to answer: say --yes.")
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        raise typer.Exit(INTERRUPTED) from None
    if not agreed:
        raise Stop("Nothing was changed.", FOUND)


@contextmanager
def progress(task: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the block runs, if a terminal is there; call what it yields with each step's size.

    Without `total` it counts.
    """
    console = _err()
    count = [TextColumn("{task.completed:,.0f}")] if total is None else [BarColumn(), MofNCompleteColumn()]
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        *count,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        number = bar.add_task(task, total=total)
        yield lambda steps: bar.advance(number, steps)


def counted(items: Iterable[T], task: str) -> Iterator[T]:
    """Return the items, counting them on stderr as they come."""
    with progress(task) as step:
        for item in items:
            step(1)
            yield item


def _marked(heading: str) -> tuple[str, str]:
    return (heading[0], heading[1:]) if heading[:1] in {"=", "?", "#"} else ("", heading)


def _fitting(columns: Sequence[str], rows: Sequence[Sequence[Text]], width: int) -> list[int]:
    """Return which columns fit side by side, or which must stay though they do not."""
    marks, names = zip(*map(_marked, columns), strict=True)
    needed = [max([len(name), *(row[at].cell_len for row in rows)]) for at, name in enumerate(names)]
    kept = list(range(len(columns)))
    for at in reversed(kept[:]):
        if sum(needed[one] + _GAP for one in kept) - 1 > width and marks[at] in {"?", "#"}:
            kept.remove(at)
    return kept


def _plain(value: object) -> Text:
    text = "" if value is None else str(value)
    return Text("".join(one if one.isprintable() else "�" for one in text))


def _out() -> Console:
    return _Out(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


class _Out(Console):
    """Ends with a code of its own where rich says 1, which of `orders explain` means "not complete"."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _unread()


def _unread() -> NoReturn:
    close()
    raise SystemExit(UNREAD) from None


def close() -> None:
    """Let what is left in stdout's buffer go nowhere: written at the end, it would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _err() -> Console:
    return Console(stderr=True, highlight=False)


Level = Literal["good", "note", "todo", "wrong"]
"""`note`: worth knowing, nothing must be done. `todo`: events or orders do not come home, or may be lost, until it is
done. `wrong`: a setting, without which the service does not start."""


class Finding(msgspec.Struct, frozen=True):
    """`about` is settings, redis, or the slug of a company; `advice` is "" where nothing is to be done."""

    about: str
    what: str
    level: Level
    detail: str
    advice: str = ""
