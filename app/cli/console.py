"""What commands print, ask and end with: JSON lines or tables on stdout, everything else on stderr.

Values of upstream and of senders are shown as plain text: neither markup nor a terminal's control codes work.
rich is loaded when a table or a progress bar is drawn.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
import typer

from app import times
from app.cli.command import FOUND, INTERRUPTED, UNREAD, Stop, flags
from app.texts import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

WIDTH: Final = 80
"""Columns of text for people."""

_PIPED_WIDTH: Final = 200
"""Columns of a table when stdout is no terminal: rich's 80 would break GUIDs in two."""

_GAP: Final = 3
"""Columns between two columns of a table; its two edges take one less."""

_COMMAND: Final = re.compile(r"(ota-receiver .*?)(?:\. (?=If )|$)")

_encoder = msgspec.json.Encoder(decimal_format="number")

_MARKS: Final = "=?#@"

Column = str | tuple[str, str | Callable[[Any], object]]
"""A column of a list: its heading (see `table`), and the field of the view, or the function, that gives its cells.

A heading alone is a field too.
"""


def json_line(value: Any) -> None:
    """Print one object on one line, at once; ends the program when the output pipe is closed."""
    line = _encoder.encode(value).decode()
    # What stdout cannot encode must not become a question mark in a value.
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    _write(line if is_unicode else re.sub(r"[^ -~]", lambda found: json.dumps(found[0])[1:-1], line))


def say(text: str) -> None:
    """Print a line for people on stdout, nothing with --json."""
    if not flags().as_json:
        _write(printable(text))


def remark(text: str) -> None:
    """Print a line for people on stderr, where it disturbs no pipe."""
    print(printable(text), file=sys.stderr)  # noqa: T201  # this is where commands print


def result(text: str | Iterable[str], value: Any) -> None:
    """Print the result of a command: a line or lines for people, or one object with --json."""
    if flags().as_json:
        json_line(value)
    for line in [text] if isinstance(text, str) else text:
        say(line)


def listing(
    found: Sequence[Any],
    columns: Sequence[Column],
    view: Callable[[Any], Mapping[str, object]] = msgspec.structs.asdict,
    *,
    title: str = "",
    nothing: str = "",
) -> None:
    """Print the result of a list command: a table (see `table`), or with --json the `view` of each, one a line.

    Raises Stop with the text `nothing` when there is nothing and the text is not empty.
    """
    if not found and nothing:
        raise Stop(nothing, FOUND)
    if flags().as_json:
        for one in found:
            json_line(view(one))
    elif found:
        pairs = [(one, one.lstrip(_MARKS)) if isinstance(one, str) else one for one in columns]
        viewed = zip(found, map(view, found), strict=True)
        rows = ([cell(one) if callable(cell) else fields[cell] for _, cell in pairs] for one, fields in viewed)
        table(title, [heading for heading, _ in pairs], rows)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their headings, which may begin with marks; nothing with --json.

    `=` is a column of ids, which are never broken: people copy them. `?` may be hidden where the terminal is too
    narrow, the last one first. `#` holds numbers, and may be hidden too. `@` holds times, shown as local ones.
    """
    if flags().as_json:
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = [heading.lstrip(_MARKS) for heading in columns]
    marks = [heading.removesuffix(name) for heading, name in zip(columns, names, strict=True)]
    cells = [[_cell(value, mark) for value, mark in zip(row, marks, strict=True)] for row in rows]
    zone = datetime.now(UTC).astimezone().tzname() or "local"
    names = [f"{name} ({zone})" if "@" in mark else name for name, mark in zip(names, marks, strict=True)]
    kept = _fitting(marks, names, cells) if sys.stdout.isatty() else range(len(columns))
    shown = Table(title=_title(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for at in kept:
        justify: Any = "right" if "#" in marks[at] else "left"
        shown.add_column(names[at], justify=justify, overflow="fold", no_wrap="=" in marks[at])
    for row in cells:
        shown.add_row(*(Text(row[at]) for at in kept))
    _draw(shown)
    if hidden := [name for at, name in enumerate(names) if at not in kept]:
        remark(f"Hidden, as the terminal is too narrow: {', '.join(hidden)}. --json shows all.")


def facts(title: str, rows: Mapping[str, object], value: Any) -> None:
    """Print the result of a command: names and values, without those that are empty, or one object with --json."""
    if flags().as_json:
        json_line(value)
        return
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=_title(title), title_justify="left", box=None, show_header=False, pad_edge=False)
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, cell in rows.items():
        if text := _cell(cell):
            shown.add_row(name, Text(text))
    _draw(shown)


def wrapped(text: str, first: str = "", further: str = "") -> list[str]:
    """Return the text on lines of 80 columns; a command stands unbroken on a line of its own, to be copied."""
    found: list[str] = []
    for part in filter(None, map(str.strip, _COMMAND.split(text))):
        is_command = part.startswith("ota-receiver ")
        found += [f"  {part}"] if is_command else wrap(part, further if found else first, further)
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


def confirm(question: str) -> None:
    """Return if the answer is yes, or --yes is given; raises Stop when it is no, or when there is no terminal."""
    if flags().yes:
        return
    if not sys.stdin.isatty():
        raise Stop(f"{question} Not a terminal: pass --yes.")
    try:
        agreed = typer.confirm(printable(question), err=True)
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
        close()
        raise SystemExit(UNREAD) from None


def _cell(value: object, mark: str = "") -> str:
    if isinstance(value, int) and "#" in mark:
        value = f"{value:,}"
    elif isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, tuple):
        value = ", ".join(value)
    elif isinstance(value, datetime):
        value = times.short(value)
    return "" if value is None else printable(str(value))


def _title(text: str) -> Text | None:
    from rich.text import Text

    return Text(printable(text)) if text else None


def _draw(shown: Table) -> None:
    from rich.console import Console

    out = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
    with out.capture() as drawn:
        out.print(shown)
    # Not by rich: it ends with 1 when the pipe is closed, which of `orders explain` means "not complete".
    _write(drawn.get().removesuffix("\n"))


def _fitting(marks: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the columns that fit side by side on the terminal, or that must stay though they do not."""
    from rich.cells import cell_len
    from rich.console import Console

    width = Console().width
    needed = [max([len(name), *(cell_len(row[at]) for row in rows)]) for at, name in enumerate(names)]
    kept = list(range(len(names)))
    for at in reversed(kept[:]):
        if sum(needed[one] + _GAP for one in kept) - 1 > width and set(marks[at]) & {"?", "#"}:
            kept.remove(at)
    return kept
