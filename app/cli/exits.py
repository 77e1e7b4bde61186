"""How a command ends: the exit codes, and the error that ends one with a sentence for the person who typed it."""

from __future__ import annotations

from typing import Final

from app.errors import ReceiverError

DONE: Final = 0
FOUND: Final = 1
USAGE: Final = 2
AWAY: Final = 3
NEWER: Final = 4
INTERRUPTED: Final = 130

CODES: Final = (
    "Exit codes: 0 done · 1 something is wrong, or nothing was found · 2 usage or settings, or a question that nobody"
    " could answer · 3 Redis does not answer · 4 its data is of a newer version · 130 interrupted"
)
"""Shown below the help of every command."""


class Stop(ReceiverError):
    """End the command with `text` on stderr and `code`."""

    def __init__(self, text: str, code: int = USAGE) -> None:
        super().__init__(text)
        self.code = code
