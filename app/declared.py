"""Values that people declare, in variables or in a table of a TOML file: where each stands, and what is wrong with it.

No message quotes a value, since it may be a secret.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, SecretStr, ValidationError

from app.setting_values import sentence
from app.texts import cleaned, invisible

ENVIRONMENT: Final = "the environment"


class Origin(NamedTuple):
    """Where a value stands: `place` is the environment, a line of `.env`, or a table of a TOML file.

    With a `file` only its name stands there, as that of `NAME_FILE`.
    """

    place: str
    file: str = ""


class Declared(BaseModel):
    """Values, and where each came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    def origin(self, name: str) -> Origin:
        """Return where the value of this name (in lower case) stands; raises KeyError if it is not set."""
        return self._origins[name]

    def secrets(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, value and origin of each secret that is set."""
        for name in type(self).model_fields:
            if isinstance(value := getattr(self, name), SecretStr):
                origin = self._origins[name]
                place = f"the file of {name.upper()}_FILE" if origin.file else origin.place
                yield name.upper(), value.get_secret_value(), place


D = TypeVar("D", bound=Declared)


class Table(NamedTuple):
    """A table `[<kind>.<name>]` of a TOML file: its values, and the place that messages show for each name."""

    name: str
    place: str
    values: dict[str, Any]
    places: dict[str, str]


def tables(
    setting: str, kind: str, path: Path, problems: list[str], *, example: str, named_by: str, names: Collection[str]
) -> list[Table]:
    """Return the tables `[<kind>.<name>]` of the file that `setting` names; each problem gets a line in `problems`.

    `example`: a line of such a table. `named_by`: the field that holds the table's name. `names`: its other fields.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = tomllib.loads(text).get(kind, {})
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"\(at (line \d+)", str(error))
        place = f" {line[1]}" if line else ""
        problems.append(f"{setting}{place}: is not TOML, for example {example}")
        return []
    except (OSError, ValueError) as error:
        problems.append(f"{setting}: the file {unreadable(error)}, for example /etc/ota-receiver/{kind}.toml")
        return []
    if not isinstance(found, dict) or not any(isinstance(table, dict) for table in found.values()):
        problems.append(f"{setting}: has no table [{kind}.NAME], for example [{kind}.museum]")
        return []
    lines = _lines(kind, named_by, text)
    read = []
    for name, values in found.items():
        where = f"{setting} [{kind}.{name}]"
        if isinstance(values, dict):
            both = (*names, *(f"{one}_file" for one in names))
            places = {one: f"{where}{lines.get((name, one), '')}" for one in (named_by, *both, *values)}
            read.append(Table(name, where, values, places))
        else:
            problems.append(f"{where}: is not a table")
    return read


def unknown_names(table: Table, known: Collection[str]) -> list[str]:
    """Return a sentence for each name in the table that is none of `known`, nor one of them with `_file`."""
    both = {*known, *(f"{one}_file" for one in known)}
    return [
        f"{name} ({table.places[name]}): unknown name" + (f", perhaps {near}" if (near := meant(name, both)) else "")
        for name in table.values
        if name not in both
    ]


def validated(model: type[D], given: Mapping[str, Any], problems: list[str], where: Mapping[str, str]) -> D | None:
    """Return the model of what is given, by name or as `name_file`; None after a problem, which gets its line.

    `where`: name -> the place that messages name.
    """
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    found: dict[str, str] = {}
    for name in model.model_fields:
        # SINKS_FILE is a setting of its own, not the file of SINKS.
        path = None if f"{name}_file" in model.model_fields else given.get(f"{name}_file")
        if path and given.get(name):
            also = f"{name.upper()}_FILE{at(where.get(f'{name}_file'))}"
            found[name] = f"given twice, also as {also}: remove one of them"
        elif path:
            try:
                values[name] = Path(cleaned(str(path))).read_text(encoding="utf-8")
                origins[name] = Origin(where.get(f"{name}_file", ENVIRONMENT), cleaned(str(path)))
            except (OSError, ValueError) as error:
                example = f"{name.upper()}_FILE=/run/secrets/{name}"
                found[name] = f"the file of {name.upper()}_FILE {unreadable(error)}, for example {example}"
        elif name in given:
            values[name] = given[name]
            origins[name] = Origin(where.get(name, ENVIRONMENT))
        if isinstance(value := values.get(name), str):
            values[name] = cleaned(value)
            if character := invisible(values[name]):
                found[name] = f"holds an invisible character ({character}); write it anew"
    result = None
    try:
        result = model(**values)
    except ValidationError as error:
        # The value itself is left out: it may be a secret.
        for problem in error.errors(include_url=False, include_input=False):
            name = str(problem["loc"][0])
            found.setdefault(name, sentence(problem, model.model_fields.get(name)))
    for name, text in found.items():
        stands_as = name if given.get(name) or not given.get(f"{name}_file") else f"{name}_file"
        problems.append(f"{name.upper()}{at(where.get(stands_as))}: {text}")
    if found or result is None:
        return None
    result._origins = origins
    return result


def meant(name: str, known: Collection[str]) -> str | None:
    """Return the one of `known` that a wrong name nearly is (`SPOOLDIR`, `CLIENT_STATES`); None for names of others."""
    squashed = {one.replace("_", ""): one for one in known}
    near = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), squashed, 1, 0.93)
    return squashed[near[0]] if near else None


def at(place: str | None) -> str:
    return f" ({place})" if place else ""


def unreadable(error: Exception) -> str:
    """Return what is wrong with a file, without its name: people put a secret there by mistake."""
    known = {FileNotFoundError: "is missing", IsADirectoryError: "is a folder", UnicodeDecodeError: "is not UTF-8 text"}
    return known.get(type(error), f"cannot be read ({getattr(error, 'strerror', type(error).__name__)})")


def _lines(kind: str, named_by: str, text: str) -> dict[tuple[str, str], str]:
    """Return where each name of a table `[<kind>.<name>]` stands, (table, name) -> ` line 7`, and its header."""
    table, found = "", {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(rf"""\s*\[\s*{kind}\s*\.\s*["']?([^\]"']*?)["']?\s*\]""", line):
            table = header[1]
            found[table, named_by] = f" line {number}"
        elif name := re.match(r"\s*([\w-]+)\s*=", line):
            found[table, name[1]] = f" line {number}"
    return found
