"""Texts from outside: how a terminal or a log shows them, and what stands around or hides in a value."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_COMMAND: Final = re.compile(r"(ota-receiver .*?)(?:\. (?=If )|$)")


def printable(text: str) -> str:
    """Return the text with a replacement for each control code: no terminal may obey one."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def cleaned(value: str) -> str:
    """Return a value without the blanks and the pair of quotes that editors and `docker --env-file` leave around it."""
    text = value.strip().strip("\ufeff").strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def invisible(value: str) -> str | None:
    """Return the name of the first character that no one sees in an editor, None if there is none."""
    found = (one for one in value if one != " " and unicodedata.category(one) in {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})
    return next((f"U+{ord(one):04X}" for one in found), None)


def commands_apart(text: str) -> list[str]:
    """Return the parts of a text, of which those that begin with `ota-receiver ` are commands."""
    return [*filter(None, map(str.strip, _COMMAND.split(text)))]
