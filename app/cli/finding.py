"""One line of `check`: what was looked at, how it is, and what to do about it."""

from __future__ import annotations

from typing import Literal

import msgspec

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
