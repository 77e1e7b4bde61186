"""The pages and the help are complete: every command, state, metric, log event and alert, and no dead link."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import typer.main

from app.alerts import RULES
from app.cli.main import COMMANDS as COMMANDS_OF_MAIN
from app.cli.main import cli
from app.dev import demo
from app.ledger.record import State
from app.metrics import GAUGES, HISTOGRAMS, METRICS
from app.settings import Company
from app.sink_settings import KINDS
from app.upstream.models import Asset, ComponentSchedule, Item, Order, Wallet
from tests import demo_picture
from workers.sinks import Context

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
}
COMMANDS_PAGE, OPERATIONS = PAGES["docs/commands.md"], PAGES["docs/operations.md"]
GROUPS: dict[str, Any] = dict(typer.main.get_command(cli).commands)  # type: ignore[attr-defined]  # it is a group
COMMANDS: dict[str, Any] = {
    f"{name} {part}".strip(): found
    for name, command in GROUPS.items()
    for part, found in getattr(command, "commands", {"": command}).items()
}

SCRAPED = {
    **{f"{name}_total": labels for name, labels, _ in METRICS.values()},
    **{name: labels for name, (labels, _) in GAUGES.items()},
    **{one.name: one.labels for one in HISTOGRAMS.values()},
}
"""Every metric by the name under which it is scraped, with its labels."""


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of each row of the tables whose first heading is `heading`."""
    found: list[list[str]] = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith(f"| {heading} |"):
            found += [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return found


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def anchors(text: str) -> set[str]:
    """Return the targets of links into a page: explicit anchors and headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def test_the_example_of_companies_file_shows_every_field() -> None:
    example = (ROOT / "companies.example.toml").read_text(encoding="utf-8")
    shown = set(re.findall(r"^(\w+?)(?:_file)? = ", example, re.MULTILINE))

    assert Company.model_fields.keys() - shown == {"slug", "client_state_previous"}


def test_the_example_of_sinks_file_shows_every_field() -> None:
    example = (ROOT / "sinks.example.toml").read_text(encoding="utf-8")
    shown = set(re.findall(r"^(?:# )?(\w+?)(?:_file)? = ", example, re.MULTILINE))

    assert {name.removesuffix("_file") for kind in KINDS.values() for name in kind.model_fields} - shown == {"name"}


def test_commands_lists_every_command_and_no_other() -> None:
    assert {name for cell, _ in rows(COMMANDS_PAGE, "command") for name in names(cell)} == COMMANDS.keys()


def test_commands_explains_every_state_of_an_order() -> None:
    assert [names(cell)[0] for cell, _ in rows(COMMANDS_PAGE, "state")] == list(get_args(State))


def test_commands_explains_every_exit_code_that_a_help_names_and_no_other() -> None:
    named = (part for found in COMMANDS.values() for part in found.epilog.partition("Exit codes: ")[2].split(" · "))

    assert {cell for cell, _ in rows(COMMANDS_PAGE, "exit code")} == {part.partition(" ")[0] for part in named}


def test_readme_is_short_and_its_two_commands_stand_alone_on_their_lines() -> None:
    """It is read in one sitting, and the two commands can be copied."""
    lines = PAGES["README.md"].splitlines()

    assert len(lines) <= 150
    assert "python3 -m pip install uv && uv run ota-receiver demo" in lines
    assert "python3 -m pip install uv && uv run pytest" in lines


def test_the_picture_shows_the_demo_of_this_version_and_no_path() -> None:
    """`uv run python -m tests.demo_picture` makes it again."""
    picture = demo_picture.PICTURE.read_text(encoding="utf-8").replace("&#160;", " ")

    assert [sample.title for sample in demo.samples() if sample.title not in picture] == []
    assert re.findall(r"/(?:home|root|tmp|private|Users|var|opt|usr)/[^<\"]*", picture) == []


def test_the_readme_shows_a_picture_of_the_ops_page() -> None:
    """`uv run python -m tests.ops_picture` makes it again."""
    ((alt, address),) = re.findall(r"!\[(The ops page: [^]]+)\]\((\S+)\)", PAGES["README.md"])
    picture = (ROOT / address).read_bytes()

    assert len(alt) > 40
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000


def test_every_test_that_faults_names_exists() -> None:
    named = {word for word in PAGES["docs/faults.md"].split("`") if word.endswith(".py")}

    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / "tests" / name).exists()] == []


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_link_leads_to_a_file_and_section_and_every_test_exists(page: str) -> None:
    here = ROOT / page
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        path = (here.parent / name).resolve() if name else here
        if "://" in target:
            continue
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            dead.append(target)
    tests = re.findall(r"(?:unit|integration|acceptance)/test_\w+\.py", PAGES[page])
    dead += [name for name in tests if not (ROOT / "tests" / name).exists()]

    assert dead == []


def test_architecture_follows_one_event_through_few_files() -> None:
    """Every file of the numbered path exists, and the page states how many there are."""
    path = PAGES["docs/architecture.md"].partition("## The path of one event")[2].partition("Beside the path")[0]
    files = [name for line in path.splitlines() if re.match(r"\d+\. ", line) for name in names(line) if "/" in name]
    python, lua = ([name for name in files if name.endswith(suffix)] for suffix in (".py", ".lua"))

    assert [name for name in files if not (ROOT / name).exists()] == []
    assert len(set(files)) == len(files) == len(python) + len(lua)
    assert f"{len(python)} Python files and {len(lua)} Lua scripts" in path
    assert len(python) <= 17
    assert len(lua) <= 9


def test_operations_explains_every_metric_and_no_other_with_its_labels() -> None:
    explained: dict[str, set[str]] = {}
    for shown, labels, _ in rows(OPERATIONS, "metric"):
        for name in names(shown):
            explained[name] = set(names(labels))

    assert explained.keys() == SCRAPED.keys()
    assert {name for name, labels in SCRAPED.items() if not set(labels) <= explained[name]} == set()


def test_every_alert_of_the_log_is_in_the_table_and_has_a_section() -> None:
    """`runbook` of alert.firing names the section."""
    assert {name for cell, *_ in rows(OPERATIONS, "alert in the log") for name in names(cell)} == RULES.keys()
    assert {name.replace("_", "-") for name in RULES} <= anchors(OPERATIONS)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_command_that_a_page_names_exists_and_those_in_shell_blocks_have_these_options(page: str) -> None:
    named = re.findall(r"ota-receiver ([a-z]+)(?: ([a-z]+))?", PAGES[page])
    assert [words for words in named if not {words[0], " ".join(words)} & COMMANDS.keys()] == []

    for block in re.findall(r"^```sh\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL):
        for line in re.findall(r"\bota-receiver .*", block):
            arguments = shlex.split(re.split(" [<>] ", line)[0], comments=True)[1:]
            name = arguments[0] if arguments[0] in COMMANDS else " ".join(arguments[:2])
            if name in COMMANDS:
                COMMANDS[name].make_context("ota-receiver", arguments[len(name.split()) :])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_shows_examples_of_itself_and_its_exit_codes(name: str) -> None:
    """Each example is read by the command's own parser: an option that is gone must not be shown."""
    *examples, codes = (COMMANDS[name].epilog or "").split("\n\n")

    assert re.match(r"Exit codes: 0 .*\b141\b", codes, re.DOTALL)
    assert examples
    for example in examples:
        typed = shlex.split(example.removeprefix("Example: ").partition(" < ")[0])
        arguments = typed[typed.index("ota-receiver") + 1 :]
        words = name.split()
        assert arguments[: len(words)] == words
        COMMANDS[name].make_context("ota-receiver", arguments[len(words) :])


@pytest.mark.parametrize("name", AGAIN := ["orders refetch", "events replay", "dead requeue", "reconcile"])
def test_each_command_that_fetches_again_names_the_others_and_is_in_the_table(name: str) -> None:
    found = COMMANDS[name].help

    assert [other for other in AGAIN if other != name and f"`{other}`" not in " ".join(found.split())] == []
    assert [cells for cells in rows(OPERATIONS, "command") if cells[0].startswith(f"`{name}")] != []


@pytest.mark.parametrize("name", COMMANDS_OF_MAIN)
def test_the_line_of_a_command_is_the_first_sentence_of_its_help(name: str) -> None:
    line = COMMANDS_OF_MAIN[name][1]

    assert (GROUPS[name].help or "").replace("\n", " ").startswith(line.removesuffix("."))


def test_help_imports_no_command_and_no_heavy_library() -> None:
    """It offers shell completion, as docs/commands.md says."""
    code = (
        "import sys\nfrom app.cli.main import main\nsys.argv = ['ota-receiver', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    print(*sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)

    heavy = {"rq", "redis", "httpx", "pydantic", "structlog", "rich", "starlette", "prometheus_client", "asyncio"}
    assert heavy & set(ended.stderr.split()) == set()
    assert re.findall(r"^(\w+):$", ended.stdout, re.MULTILINE) == ["Options", "Run", "Look", "Repair", "Try"]
    assert [name for name in COMMANDS_OF_MAIN if f"\n  {name} " not in ended.stdout] == []
    assert "--install-completion" in ended.stdout


@pytest.mark.parametrize(
    "model", [Context, Order, Item, ComponentSchedule, Wallet, Asset], ids=lambda one: one.__name__
)
def test_the_page_of_python_sinks_names_every_field(model: type[msgspec.Struct]) -> None:
    page = PAGES["docs/python-sinks.md"]
    properties = [name for name, value in vars(model).items() if isinstance(value, property)]

    listed = {*model.__struct_fields__, *properties} - {"row_version"}
    assert [name for name in sorted(listed) if f"`{name}`" not in page] == []
