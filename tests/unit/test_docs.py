"""The documentation names what there is: every setting, command and answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer.main

from app.cli.app import cli
from app.settings import Company, Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name.upper() for name in Settings.model_fields])
def test_readme_explains_every_setting(name: str) -> None:
    """A setting that is not in the table cannot be found."""
    assert f"`{name}`" in README


@pytest.mark.parametrize(
    "name", [name for name in Company.model_fields if name not in {"slug", "client_state_previous"}]
)
def test_the_example_of_companies_file_shows_every_field(name: str) -> None:
    """The example can be copied and filled in."""
    assert name in (ROOT / "companies.example.toml").read_text(encoding="utf-8")


def test_readme_lists_every_command() -> None:
    """`ota-receiver --help` and the README agree."""
    commands = typer.main.get_command(cli).commands  # type: ignore[attr-defined]  # a group has commands
    names = [
        f"{name} {part}" if part else name
        for name, command in commands.items()
        for part in (getattr(command, "commands", None) or [""])
    ]

    assert [name for name in names if f"`{name}`" not in README] == []


def test_readmes_two_commands_stand_alone_on_their_lines() -> None:
    """They are copied as they stand."""
    lines = README.splitlines()

    assert "python3 -m pip install uv && uv run ota-receiver demo" in lines
    assert "python3 -m pip install uv && uv run pytest" in lines


def test_every_mentioned_file_exists() -> None:
    """A link that leads nowhere is worse than none."""
    targets = [part.partition(")")[0] for part in README.split("](")[1:]]

    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []
