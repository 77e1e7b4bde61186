"""Programs of the system that tests run: without one a test is skipped, and fails in CI, which installs it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def program(name: str, package: str) -> str:
    """Return the path of a program on PATH."""
    return shutil.which(name) or _missing(package)


def installed(pattern: str, package: str) -> Path:
    """Return the newest file below /usr/lib."""
    found = sorted(Path("/usr/lib").glob(pattern))
    return found[-1] if found else _missing(package)


def _missing(package: str) -> NoReturn:
    missing = f"{package} is not installed: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)
