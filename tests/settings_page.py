"""The tables of docs/settings.md and docs/sinks.md, from the declarations, and the example of a document there.

    uv run python -m tests.settings_page

Run it again after a change of a setting.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
from msgspec.structs import replace
from pydantic.fields import FieldInfo

from app.setting_values import Seconds
from app.settings import Company, Settings
from app.sink_settings import KINDS, SinkSettings
from app.upstream.decode import digest
from tests.samples import COMPANY_ID, ORDER_ID, document, sample

DOCS: Final = Path(__file__).parents[1] / "docs"
PAGES: Final = ("settings.md", "sinks.md")
HEAD: Final = "| name | default | meaning | example |\n|---|---|---|---|\n"
UNITS: Final = (("h", 3600), ("m", 60), ("s", 1))


def rendered(name: str, page: str) -> str:
    """Return the page of this name in PAGES with its tables, and the first JSON of docs/sinks.md, rendered anew."""
    if name == "settings.md":
        tables = [
            table({one.upper(): field for one, field in model.model_fields.items()}) for model in (Settings, Company)
        ]
    else:
        tables = [table(SinkSettings.model_fields), *map(of_kind, KINDS.values())]
        page = re.sub(r"(?<=^```json\n).*?(?=^```$)", example(), page, count=1, flags=re.DOTALL | re.MULTILINE)
    found = iter(tables)
    return re.sub(f"{re.escape(HEAD)}(?:\\|.*\n)*", lambda _: next(found), page)


def example() -> str:
    """Return the document of the issued order in tests/fixtures, with its first item."""
    content = digest(sample("order-issued"))
    key = f"{COMPANY_ID}/{ORDER_ID}/1/{content[:12]}"
    whole = document("order-issued", digest=content, idempotency_key=key, fetched_at=1_780_301_760_000)
    shown = replace(whole, order=replace(whole.order, items=whole.order.items[:1]))
    return msgspec.json.format(shown.encode(), indent=2).decode() + "\n"


def of_kind(kind: type[SinkSettings]) -> str:
    """Return the table of the settings that this kind alone has, the required ones first."""
    own = {name: field for name, field in kind.model_fields.items() if name not in SinkSettings.model_fields}
    return table(dict(sorted(own.items(), key=lambda one: not one[1].is_required())))


def table(fields: Mapping[str, FieldInfo]) -> str:
    rows = (
        f"| `{name}` | {default(field)} | {field.description} | {code(*(field.examples or ()))} |\n"
        for name, field in fields.items()
        if field.description is not None
    )
    return HEAD + "".join(rows)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if get_args(Seconds)[1] in field.metadata:
        return code(next(f"{field.default // size}{unit}" for unit, size in UNITS if field.default % size == 0))
    value: Any = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return code(*([] if value in (None, ()) else [value]))


def code(*values: object) -> str:
    return ", ".join(f"`{value}`" for value in values) or "–"


if __name__ == "__main__":
    for path in map(DOCS.joinpath, PAGES):
        path.write_text(rendered(path.name, path.read_text(encoding="utf-8")), encoding="utf-8")
