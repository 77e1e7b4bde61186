"""The tables of docs/settings.md, rendered from the declarations in app/settings.py.

    uv run python -m tests.settings_page

Run it again after a change of a setting.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from app.setting_values import Seconds
from app.settings import Company, Settings

PAGE: Final = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD: Final = "| name | default | meaning | example |\n|---|---|---|---|\n"
UNITS: Final = (("h", 3600), ("m", 60), ("s", 1))


def rendered(page: str) -> str:
    """Return the page with the table of all settings, then the table of one company's."""
    tables = iter((table(Settings), table(Company)))
    return re.sub(f"{re.escape(HEAD)}(?:\\|.*\n)*", lambda _: next(tables), page)


def table(model: type[BaseModel]) -> str:
    rows = (
        f"| `{name.upper()}` | {default(field)} | {field.description} | {code(*(field.examples or ()))} |\n"
        for name, field in model.model_fields.items()
        if field.description is not None
    )
    return HEAD + "".join(rows)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if get_args(Seconds)[1] in field.metadata:
        return code(next(f"{field.default // size}{unit}" for unit, size in UNITS if field.default % size == 0))
    return code(*([] if field.default in (None, ()) else [field.default]))


def code(*values: object) -> str:
    return ", ".join(f"`{value}`" for value in values) or "–"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
