"""The environment without the receiver's settings, which must not reach the tests from the shell."""

from __future__ import annotations

from collections.abc import Mapping

from app.settings import NAMES


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without any variable, or NAME_FILE, that app.settings reads."""
    names = {name.upper() for name in NAMES}
    ours = names | {f"{name}_FILE" for name in names}
    return {name: value for name, value in environment.items() if name.upper() not in ours}
