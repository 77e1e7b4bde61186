"""What commands print, ask and end with: JSON lines or tables on stdout, everything else on stderr.

Values of upstream and of senders are shown as plain text: neither markup nor a terminal's control codes work.
rich is loaded when a progress bar is drawn.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

import msgspec
import typer

from app import times
from app.cli.command import FOUND, INTERRUPTED, UNREAD, Stop, flags
from app.texts import commands_apart, printable

WIDTH: Final = 80
"""Columns of text for people."""

_GAP: Final = "  "
"""Between two columns of a table."""

_LONGEST_WORD: Final = 44
"""A word up to this length stays on one line: a GUID, a reference, the name of a sink."""

_encoder = msgspec.json.Encoder(decimal_format="number")

_MARKS: Final = "=?#@>"

Column = str | tuple[str, str | Callable[[Any], object]]
"""A column of a list: its heading (see `table`), and the field of the view, or the function, that gives its cells.

A heading alone is a field too.
"""


def json_line(value: Any) -> None:
    """Print one object on one line, at once; ends the program when the output pipe is closed.

    All times have one form, as in the logs: UTC, with six digits after the second.
    """
    line = _encoder.encode(_plain(msgspec.to_builtins(value, builtin_types=(datetime, Decimal)))).decode()
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

    If there is nothing, only the text `nothing` is printed, on stderr.
    """
    if flags().as_json:
        for one in found:
            json_line(view(one))
    elif found:
        pairs = [(one, one.lstrip(_MARKS)) if isinstance(one, str) else one for one in columns]
        viewed = zip(found, map(view, found), strict=True)
        rows = ([cell(one) if callable(cell) else fields[cell] for _, cell in pairs] for one, fields in viewed)
        table(title, [heading for heading, _ in pairs], rows)
    if not found and nothing:
        remark(nothing)


class _Column:
    """A column of a table while it is laid out: how many characters a line of it has, and the least without which words
    are broken, or ids.
    """

    def __init__(self, marks: str, name: str, cells: Sequence[str]) -> None:
        self.marks, self.name, self.cells = marks, name, cells
        longest_word = max(map(_longest_word, [name, *cells]))
        self.width = max(_longest_word(name), *map(_columns_of, cells))
        self.least = self.width if "=" in marks else min(self.width, longest_word, _LONGEST_WORD)


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their headings, which may begin with marks; nothing with --json. Empty columns are left out.

    What does not fit on the terminal yields, from left to right: `?` and `#` (numbers) are hidden, and `>` gets a line
    of its own below each row. If the others do not fit either, they are folded between words. `=` is a column of ids,
    which are never broken, since people copy them. `@` holds times, shown as local ones, of today without date.
    """
    if flags().as_json:
        return
    zone = datetime.now(UTC).astimezone().tzname() or "local"
    columns = []
    for heading, values in zip(headings, zip(*rows, strict=True), strict=True):
        name = heading.lstrip(_MARKS)
        marks, cells = heading.removesuffix(name), [_cell(value, heading) for value in values]
        name = f"{name} ({zone})" if "@" in marks else name
        if any(cells):
            columns.append(_Column(marks, name, cells))
    room = _room()
    beside, below, hidden = _arranged(columns, room)
    # No word is broken: it may be an id.
    apart = textwrap.TextWrapper(room, "    ", "      ", break_on_hyphens=False, break_long_words=False)
    lines = [printable(title)] * bool(title) + _lines(beside, [one.name for one in beside])
    lines.append("─" * _excess(beside, 0))
    for at in range(len(columns[0].cells)):
        lines += _lines(beside, [one.cells[at] for one in beside])
        for one in below:
            if one.cells[at]:
                lines += apart.wrap(f"{one.name}: {one.cells[at]}")
    _write("\n".join(lines))
    if hidden:
        remark(f"Hidden for lack of room: {', '.join(hidden)}. --json shows all.")


def facts(title: str, rows: Mapping[str, object], value: Any) -> None:
    """Print the result of a command: names and values, without those that are empty, or one object with --json.

    The values of a list stand below each other.
    """
    if flags().as_json:
        json_line(value)
        return
    shown = []
    for name, cell in rows.items():
        texts = filter(None, map(_cell, cell if isinstance(cell, list) else [cell]))
        shown += [("" if at else name, text) for at, text in enumerate(texts)]
    columns = [_Column("=", "", [name for name, _ in shown]), _Column("", "", [text for _, text in shown])]
    beside, _, _ = _arranged(columns, _room())
    lines = [line for row in shown for line in _lines(beside, row)]
    _write("\n".join((_folded(printable(title), _room()) if title else []) + lines))


def wrapped(text: str, first: str = "", further: str = "") -> list[str]:
    """Return the text on lines of 80 columns; a command stands unbroken on a line of its own, to be copied."""
    found: list[str] = []
    for part in commands_apart(text):
        is_command = part.startswith("ota-receiver ")
        found += [f"  {part}"] if is_command else wrap(part, further if found else first, further)
    return found


def wrap(text: str, first: str, further: str) -> list[str]:
    """Return the text on lines of 80 columns, the first of which begins with `first`, the others with `further`."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=further, break_on_hyphens=False)


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


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _cell(value: object, marks: str = "") -> str:
    if isinstance(value, int) and "#" in marks:
        value = f"{value:,}"
    elif isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, tuple):
        value = ", ".join(value)
    elif isinstance(value, datetime):
        value = times.short(value).removeprefix(f"{times.now().astimezone():%m-%d} " if "@" in marks else "")
    return "" if value is None else printable(str(value))


def _room() -> int:
    """Return how many characters fit side by side; in a pipe there is no limit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def _columns_of(text: str) -> int:
    """Return how many columns of a terminal the text takes: some characters take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _longest_word(text: str) -> int:
    return max(map(_columns_of, text.split()), default=0)


def _arranged(columns: Sequence[_Column], room: int) -> tuple[list[_Column], list[_Column], list[str]]:
    """Return the columns that stand side by side, those below each row, and the names of the hidden ones."""
    beside = [one for one in columns if not set(one.marks) & {*"?#>"}]
    for one in columns:
        if one not in beside and _excess([*beside, one], room) <= 0:
            beside.append(one)
    while (excess := _excess(beside, room)) > 0 and (foldable := [one for one in beside if one.width > one.least]):
        widest = max(foldable, key=lambda one: one.width)
        widest.width = max(widest.least, widest.width - max(1, excess // len(foldable)))
    rest = [one for one in columns if one not in beside]
    beside.sort(key=columns.index)
    return beside, [one for one in rest if ">" in one.marks], [one.name for one in rest if ">" not in one.marks]


def _excess(columns: Sequence[_Column], room: int) -> int:
    """Return how many characters the columns are wider than the room."""
    return sum(one.width + len(_GAP) for one in columns) - len(_GAP) - room


def _lines(columns: Sequence[_Column], cells: Sequence[str]) -> list[str]:
    """Return the lines of one row."""
    folded = [_folded(text, one.width) for one, text in zip(columns, cells, strict=True)]
    found = []
    for at in range(max(map(len, folded))):
        parts = []
        for one, lines in zip(columns, folded, strict=True):
            text = lines[at] if at < len(lines) else ""
            blank = " " * (one.width - _columns_of(text))
            parts.append(blank + text if set(one.marks) & {"#", "@"} else text + blank)
        found.append(_GAP.join(parts).rstrip())
    return found


def _folded(text: str, width: int) -> list[str]:
    return [text] if _columns_of(text) <= width else textwrap.wrap(text, width, break_on_hyphens=False)
