"""The help of every command shows how it is typed and how it ends."""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import Any, Final

import pytest
import typer.main
from typer.testing import CliRunner

from app.cli.main import COMMANDS as COMMANDS_OF_MAIN
from app.cli.main import cli

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


@pytest.mark.parametrize("name", COMMANDS_OF_MAIN)
def test_the_line_of_a_command_is_the_first_sentence_of_its_help(name: str) -> None:
    line = COMMANDS_OF_MAIN[name][1]

    assert (TREE[name].help or "").replace("\n", " ").startswith(line.removesuffix("."))


def test_help_imports_no_command_and_no_heavy_library() -> None:
    code = (
        "import sys\nfrom app.cli.main import main\nsys.argv = ['ota-receiver', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    print(*sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)

    heavy = {"rq", "redis", "httpx", "pydantic", "structlog", "rich", "starlette", "prometheus_client", "asyncio"}
    assert heavy & set(ended.stderr.split()) == set()
    assert "Commands:" in ended.stdout
