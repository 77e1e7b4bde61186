"""What commands print: JSON lines or tables on stdout, everything else on stderr.

Values of upstream and of senders are shown as plain text: neither markup nor a terminal's control codes work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from app.cli.exits import FOUND, INTERRUPTED, Stop

T = TypeVar("T")

_PIPED_WIDTH: Final = 200
"""Columns when stdout is no terminal: rich's 80 would break GUIDs in two."""

_encoder = msgspec.json.Encoder(decimal_format="number")


def json_line(value: Any) -> None:
    """Print one object on one line, at once; ends the program, as rich does, when nobody reads any more."""
    try:
        sys.stdout.write(_encoder.encode(value).decode() + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer is written at the end: not into the pipe that is gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FOUND) from None


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their headings; a column whose heading starts with `#` holds numbers."""
    shown = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in columns:
        numbers = heading.startswith("#")
        shown.add_column(heading.removeprefix("#"), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(_plain(cell) for cell in row))
    _out().print(shown)


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


def _plain(value: object) -> Text:
    text = "" if value is None else str(value)
    return Text("".join(one if one.isprintable() else "�" for one in text))


def _out() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


def _err() -> Console:
    return Console(stderr=True, highlight=False)
