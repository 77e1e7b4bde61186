"""The orders that the partner expects, from a CSV: lenient about its form, strict about its content."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Final

import msgspec

from app.errors import BadExpected
from app.ids import guid

_ORDER_ID: Final = "orderid"
_REFERENCES: Final = ("reference", "buyfromorderreference", "selltoorderreference")
_USED: Final = frozenset({_ORDER_ID, *_REFERENCES})
_LISTED: Final = 10


class Expected(msgspec.Struct, frozen=True):
    """One order of the file: a canonical `order_id` or "", and `references`; at least one of them is given."""

    line: int
    order_id: str
    references: tuple[str, ...]


def read(path: Path) -> list[Expected]:
    """Return the orders of the file; raises BadExpected."""
    try:
        # -sig: spreadsheets put a byte order mark first.
        return parse(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise BadExpected(f"{path}: is not UTF-8; save it as CSV UTF-8") from None
    except OSError as error:
        raise BadExpected(f"{path}: cannot be read ({type(error).__name__})") from None
    except BadExpected as bad:
        raise BadExpected("\n".join(f"{path}: {line}" for line in str(bad).splitlines())) from None


def parse(text: str) -> list[Expected]:
    """Return the orders of a CSV's text, separated by comma, semicolon or tab; raises BadExpected.

    The first line names the columns in any case: orderId, reference, buyFromOrderReference, sellToOrderReference. One
    of them is enough; other columns are ignored.
    """
    heading = next((line for line in text.splitlines() if line.strip()), None)
    if heading is None:
        raise BadExpected("is empty")
    separator = max(",;\t", key=lambda one: len(_USED & set(map(_name, heading.split(one)))))
    rows = _rows(text, separator)
    number, names = next(rows)
    columns = [_name(name) for name in names]
    if not _USED & set(columns):
        raise BadExpected(f"line {number}: names no column orderId or reference")
    found: list[Expected] = []
    problems: list[str] = []
    for line, cells in rows:
        values = {name: cell for name, cell in zip(columns, cells, strict=False) if cell}
        given = values.get(_ORDER_ID, "")
        order_id = guid(given) if given else ""
        references = tuple(dict.fromkeys(values[name] for name in _REFERENCES if name in values))
        if order_id is None:
            problems.append(f"line {line}: orderId {given[:50]!r} is not a GUID")
        elif not order_id and not references:
            problems.append(f"line {line}: has neither an orderId nor a reference")
        else:
            found.append(Expected(line, order_id, references))
    if problems:
        more = [f"and {len(problems) - _LISTED} more lines"] if len(problems) > _LISTED else []
        raise BadExpected("\n".join([*problems[:_LISTED], *more]))
    return found


def _rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row that is not blank, and the number of its first line."""
    reader = csv.reader(StringIO(text, newline=None), delimiter=separator, strict=True)
    line = 1
    try:
        for row in reader:
            if any(cells := [cell.strip() for cell in row]):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadExpected(f"line {line}: is not CSV ({error})") from None


def _name(cell: str) -> str:
    return re.sub(r"[\s_\"-]", "", cell).casefold()
