"""The Lua scripts of this folder, each with the shared parts that its first line names."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def source(name: str) -> str:
    """Return the text of the script `name`: the parts after `--! uses` first, then its own lines."""
    text = _text(name)
    first = text.partition("\n")[0]
    uses = first.removeprefix("--! uses ").split(", ") if first.startswith("--! uses ") else []
    return "\n".join([*map(_text, uses), text])


def _text(name: str) -> str:
    return files("app.store").joinpath(f"{name}.lua").read_text(encoding="utf-8")
