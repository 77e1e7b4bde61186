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
