"""A package with a sink of its own, examples/sqlite-sink, works with the wheel that is built from this tree."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.command import without_settings

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "sqlite-sink"
UV = os.environ.get("UV", "uv")
"""As `uv run` names it."""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a program; return its stdout. Raises AssertionError with its output if it fails."""
    ended = subprocess.run(
        command,
        cwd=cwd,
        env=without_settings(os.environ) | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def uv(*arguments: str | Path, cwd: Path) -> None:
    """Run uv with what it has downloaded before, else with the package index."""
    try:
        run(UV, "--offline", *arguments, cwd=cwd)
    except AssertionError:
        run(UV, *arguments, cwd=cwd)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_the_example_installed_beside_the_wheel_passes_its_own_test(tmp_path: Path) -> None:
    for package in (ROOT, EXAMPLE):
        uv("build", "--wheel", "--out-dir", tmp_path / "dist", package, cwd=tmp_path)
    uv("venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    wheels = sorted((tmp_path / "dist").glob("*.whl"))
    uv("pip", "install", "--python", python, *wheels, "pytest", cwd=tmp_path)
    shutil.copy(EXAMPLE / "test_sink.py", tmp_path)

    tested = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_sink.py", cwd=tmp_path)
    found = run(python, "-c", "import app, ota_sqlite_sink; print(app.__file__)", cwd=tmp_path)

    assert "4 passed" in tested
    assert found.startswith(str(tmp_path)), "not the wheel was tested"
    # The wheel holds what the ops page is made of.
    ours, theirs = ROOT / "app" / "ops", Path(found.strip()).parent / "ops"
    assert names(ours / "static") == names(theirs / "static") >= {"htmx.min.js", "htmx.LICENSE", "htmx.SHA256"}
    assert names(ours / "templates") == names(theirs / "templates")
