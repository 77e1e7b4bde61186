"""JSON bodies of the other side, with what its writers put into them: one odd value must not cost a paid order."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable
from typing import TypeVar

_ODD = re.compile(rb"\\u[dD][89a-fA-F]|NaN|Infinity|\d{19}|[eE]\+?\d{3}")
"""What _repaired can repair; a body without it is not parsed twice."""

T = TypeVar("T")


def decoded(decode: Callable[[bytes], T], body: bytes) -> T:
    """Return what `decode` makes of the body, or else of the body with its odd values repaired.

    A byte order mark is ignored: .NET writers may put one. UTF-16 and UTF-32 become UTF-8. Business Central cuts texts
    by UTF-16 length, so a name may end in half an emoji: it becomes a question mark. NaN and Infinity become null, too
    large a number a text.
    Raises ValueError, RecursionError.
    """
    body = body.removeprefix(BOM_UTF8)
    try:
        return decode(body)
    except (ValueError, RecursionError):
        encoding = json.detect_encoding(body)
        if encoding != "utf-8":
            body = body.decode(encoding, "surrogatepass").encode("utf-8", "replace")
        elif not _ODD.search(body):
            raise
    return decode(_repaired(body))


def _repaired(body: bytes) -> bytes:
    whole = json.loads(body, parse_constant=lambda _: None, parse_float=str, parse_int=_integer)
    return json.dumps(whole, ensure_ascii=False).encode("utf-8", "replace")


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) < 19 else digits
