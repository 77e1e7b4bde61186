"""The help of every command shows how it is typed and how it ends."""

from __future__ import annotations

import shlex
from typing import Any, Final

import pytest
import typer.main
from typer.testing import CliRunner

from app.cli.commands import cli

TREE: Final[dict[str, Any]] = dict(typer.main.get_command(cli).commands)  # type: ignore[attr-defined]  # it is a group
COMMANDS: Final = sorted(
    (name, *part)
    for name, command in TREE.items()
    for part in ([(one,) for one in command.commands] if hasattr(command, "commands") else [()])
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example_of_itself_and_its_exit_codes(words: tuple[str, ...]) -> None:
    """Each example is read by the command's own parser: an option that is gone must not be shown."""
    command = TREE[words[0]]
    command = command.commands[words[1]] if len(words) > 1 else command
    *examples, codes = (command.epilog or "").split("\n\n")

    assert codes.startswith("Exit codes: 0 ")
    assert "141" in codes
    assert examples
    for example in examples:
        assert example.startswith("Example: ")
        typed = shlex.split(example.removeprefix("Example: ").partition(" < ")[0])
        at = typed.index("ota-receiver") + 1
        assert typed[at : at + len(words)] == list(words)
        command.make_context("ota-receiver", typed[at + len(words) :])


def test_help_offers_shell_completion() -> None:
    """The README names the same option."""
    assert "--install-completion" in CliRunner().invoke(cli, ["--help"], env={"COLUMNS": "120"}).stdout
