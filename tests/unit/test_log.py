"""Every log line is JSON with known fields, without foreign text or values."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from app import log
from workers.sinks.output import LONGEST_LINE, MOST_LINES

ROOT = Path(__file__).parents[2]
COMMON = {
    "timestamp",
    "level",
    "event",
    "service",
    "version",
    "host",
    "logger",
    "request_id",
    "trace_id",
    "span_id",
    "order_id",
    "job_id",
    "worker",
}


class Call(NamedTuple):
    """One `_log.<level>(...)` in the source, or a `log.writer(...)`."""

    where: str
    level: str
    event: str
    fields: frozenset[str]
    may_have: frozenset[str]


@cache
def modules() -> dict[Path, ast.Module]:
    return {
        path: ast.parse(path.read_text()) for folder in ("app", "workers") for path in (ROOT / folder).rglob("*.py")
    }


@cache
def texts_in(package: Path) -> frozenset[str]:
    """Return the literal texts of the modules of one package, where the fields of a line are collected."""
    trees = [tree for path, tree in modules().items() if path.parent == package]
    found = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return frozenset(text for text in found if isinstance(text, str))


@cache
def calls() -> tuple[Call, ...]:
    return tuple(_calls())


def _calls() -> Iterator[Call]:
    for path, tree in modules().items():
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="_log"), attr=level), args=args, keywords=keywords):
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    assert len(args) == 1, where
                    assert isinstance(args[0], ast.Constant), f"{where}: the event must be one literal name"
                    fields = frozenset(keyword.arg for keyword in keywords if keyword.arg is not None)
                    expands = len(fields) < len(keywords)
                    # app/web/requests.py frames the requests of the other HTTP processes too.
                    may_have = fields | (texts_in(path.parent) | texts_in(ROOT / "app/web") if expands else frozenset())
                    yield Call(where, level, str(args[0].value), fields, may_have)
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr="writer"), args=[ast.Constant(event)]):
                    may_have = texts_in(path.parent)
                    yield Call(f"{path.relative_to(ROOT)}:{node.lineno}", "info", str(event), frozenset(), may_have)


def test_logs_page_has_every_event_with_its_levels_and_fields() -> None:
    """A field in `**fields` counts if the package that logs it names it."""
    page = (ROOT / "docs" / "logs.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    explained = {row[0].strip("| `"): (row[1], set(re.findall(r"`(\w+)`", row[2]))) for row in rows}
    logged: dict[str, list[Call]] = {}
    for call in calls():
        logged.setdefault(call.event, []).append(call)

    assert explained.keys() == logged.keys()
    for event, (levels, fields) in explained.items():
        assert set(re.findall("debug|info|warning|error", levels)) == {call.level for call in logged[event]}
        assert set().union(*(call.fields for call in logged[event])) <= fields | COMMON
        assert fields <= set().union(*(call.may_have for call in logged[event]))
    assert set().union(*(fields for _, fields in explained.values())) | COMMON == log.FIELDS


def test_every_logger_is_named_log_and_none_logs_a_whole_exception() -> None:
    """Otherwise the test above would not see it, or foreign text would get into a line."""
    assigned = [node for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    loggers = [one for one in assigned if ast.unparse(one.value) in {"log.get()", "structlog.get_logger()"}]

    assert {ast.unparse(one.targets[0]) for one in loggers} == {"_log"}
    assert {call.level for call in calls()} <= {"debug", "info", "warning", "error", "critical"}
    assert not [call.where for call in calls() if call.fields & {"exc_info", "stack_info", "exception"}]


def output(code: str, exit_code: int = 0) -> str:
    """Return what a program writes that logs as the service does; its stderr stays empty."""
    ended = subprocess.run(
        [sys.executable, "-c", f"import logging\nfrom app import log\n_log = log.get()\n{code}"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (exit_code, "")
    return ended.stdout


def run(code: str, exit_code: int = 0) -> list[dict[str, Any]]:
    """Return the log lines of such a program."""
    return [json.loads(line) for line in output(code, exit_code).splitlines()]


def test_without_a_terminal_a_line_is_json_with_level_time_and_declared_fields() -> None:
    (line,) = run(
        "log.configure()\n"
        "from pathlib import Path\n"
        "_log.info('order.dead_lettered', order_id='1', reason='two\\nlines ☃ \\x00', attempts=2, http_status=None, "
        "company=Path('x'), secret='canary')"
    )

    assert [*line][:6] == ["timestamp", "level", "event", "service", "version", "host"]
    assert line.pop("timestamp").endswith("Z")
    assert line.pop("version") == version("ota-receiver")
    assert line.pop("host") == os.uname().nodename
    assert line == {
        "service": "ota-receiver",
        "event": "order.dead_lettered",
        "level": "info",
        "order_id": "1",
        "reason": "two\nlines ☃ \x00",
        "attempts": 2,
        "http_status": None,
        "company": "x",
    }


def test_ecs_has_the_field_names_of_elastic() -> None:
    ours, foreign = run(
        "log.configure(form='ecs')\n"
        "_log.info('request', request_id='abc', status=200, duration_ms=1.5, secret='canary')\n"
        "logging.getLogger('uvicorn.error').warning('shown')\n"
    )

    assert [*ours][:3] == ["@timestamp", "log.level", "message"]
    assert ours | {"service.name": "ota-receiver", "ecs.version": "8.11.0", "ota.duration_ms": 1.5} == ours
    assert (ours["http.request.id"], ours["http.response.status_code"]) == ("abc", 200)
    assert (foreign["log.logger"], foreign["message"], foreign["log.level"]) == ("uvicorn.error", "shown", "warning")
    assert "canary" not in json.dumps(ours)


def test_the_level_applies_to_our_lines_and_foreign_ones() -> None:
    lines = run(
        "log.configure(form='json', level='WARNING')\n"
        "_log.info('service.stopped', role='web')\n"
        "logging.getLogger('uvicorn.error').info('hidden')\n"
        "logging.getLogger('uvicorn.error').warning('shown')\n"
    )

    assert [line["event"] for line in lines] == ["shown"]


FOREIGN = [
    ("uvicorn.error", "info", True),
    ("uvicorn.access", "info", False),
    ("rq.worker", "info", False),
    ("rq.worker", "warning", True),
    ("httpx", "info", False),
    ("httpx", "error", True),
    ("anything.else", "warning", True),
]


def test_foreign_lines_have_the_same_form() -> None:
    """Loggers that print URLs, queries or arguments at INFO are limited to WARNING."""
    lines = run(
        "log.configure(form='json')\n"
        "from structlog.contextvars import bind_contextvars\n"
        "bind_contextvars(request_id='abc')\n"
        f"for name, level, _ in {FOREIGN!r}:\n"
        "    line = getattr(logging.getLogger(name), level)\n"
        "    line('%s lines', 2, extra={'arguments': 'canary', 'kwargs': 'canary'})\n"
    )

    assert [(line["logger"], line["level"], True) for line in lines] == [one for one in FOREIGN if one[2]]
    assert {(line["event"], line["request_id"]) for line in lines} == {("2 lines", "abc")}
    assert "canary" not in json.dumps(lines)


def test_a_foreign_traceback_shows_places_without_text_and_one_in_a_message_is_cut_off() -> None:
    """RQ writes it into the message, as asyncio does for a task that was not awaited."""
    lines = run(
        "log.configure(form='json')\n"
        "import asyncio, gc, traceback\n"
        "def inner(secret):\n    raise ValueError(f'canary text {secret}')\n"
        "try:\n    inner('canary local')\n"
        "except ValueError:\n"
        "    logging.getLogger('uvicorn.error').exception('Exception in ASGI application')\n"
        "    logging.getLogger('rq.job').error('Job 1 failed\\n' + traceback.format_exc())\n"
        "async def fails():\n    raise ValueError('canary')\n"
        "async def forgets():\n    task = asyncio.create_task(fails())\n    await asyncio.sleep(0)\n"
        "asyncio.run(forgets())\n"
        "gc.collect()\n"
    )

    events = [line["event"] for line in lines]
    assert events == ["Exception in ASGI application", "Job 1 failed", "Task exception was never retrieved"]
    assert lines[0]["trace"].startswith("ValueError at ")
    assert " inner < " in lines[0]["trace"]
    assert "canary" not in json.dumps(lines)


def test_what_python_itself_would_print_is_a_line_with_the_place_and_without_the_text() -> None:
    lines = run(
        "log.configure(form='json')\n"
        "import gc, threading, warnings\n"
        "warnings.warn('old')\n"
        "def inner():\n    raise ValueError('canary')\n"
        "thread = threading.Thread(target=inner)\nthread.start()\nthread.join()\n"
        "class Broken:\n    def __del__(self):\n        inner()\n"
        "Broken()\n"
        "inner()\n",
        exit_code=1,
    )

    warning, *uncaught = lines
    assert (warning["logger"], warning["event"].endswith("UserWarning: old")) == ("py.warnings", True)
    found = [(line["event"], line["what"], line["error"], line["level"]) for line in uncaught]
    kinds = ("thread", "finalizer", "process")
    assert found == [("process.uncaught_error", kind, "ValueError", "error") for kind in kinds]
    assert all(" inner < " in line["trace"] for line in uncaught)
    assert "canary" not in json.dumps(lines)


def test_each_line_that_a_sink_prints_is_a_line_of_the_log_and_a_flood_is_cut() -> None:
    """On stdout or stderr, in pieces, as bytes, without an end. The next delivery has lines again."""
    lines = run(
        "log.configure(form='json')\n"
        "import sys\n"
        "from workers.sinks.output import SinkOutput\n"
        "output, kept = SinkOutput(), []\n"
        "with output.caught():\n"
        "    kept.append(sys.stderr)\n"
        "    print('one\\n\\ntwo', 3)\n"
        "    print('to stderr', file=sys.stderr)\n"
        "    for part in 'in ', 'pieces\\nand ', 'open': print(part, end='')\n"
        "with output.caught():\n"
        "    sys.stdout.buffer.write(b'bytes \\xff\\n')\n"
        "    print('\\ud800')\n"
        "    for _ in range(1000): print('x' * 600, end='')\n"
        "with output.caught():\n"
        f"    for number in range({MOST_LINES + 50}): print(number)\n"
        "with output.caught():\n"
        "    print('by a kept stream', file=kept[0])\n"
    )

    assert {line["event"] for line in lines} == {"sink.output", "sink.output_dropped"}
    texts = ["one", "two 3", "to stderr", "in pieces", "and open", "bytes \ufffd", "?", "x" * LONGEST_LINE]
    texts += map(str, range(MOST_LINES))
    assert [line.get("text") for line in lines] == [*texts, None, "by a kept stream"]
    assert [line["lines"] for line in lines if "lines" in line] == [50]


def test_what_a_sink_does_to_its_stdout_harms_no_later_delivery() -> None:
    """It wraps, detaches or closes it, or takes it for a file; each is found in modules that people have."""
    lines = run(
        "log.configure(form='json')\n"
        "import faulthandler, io, os, subprocess, sys\n"
        "from workers.sinks.output import SinkOutput\n"
        "output = SinkOutput()\n"
        "def wrap(): sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\n"
        "def detach(): sys.stdout.detach()\n"
        "def close(): sys.stdout.close()\n"
        "def start(): subprocess.run([sys.executable, '-c', ''], stdout=sys.stdout, stderr=sys.stderr)\n"
        "def enable(): faulthandler.enable()\n"
        "for do in wrap, detach, close, start, enable:\n"
        "    with output.caught(): do()\n"
        "    with output.caught(): print('after', do.__name__)\n"
    )

    assert [line.get("text") for line in lines] == [
        f"after {name}" for name in ("wrap", "detach", "close", "start", "enable")
    ]


def test_our_own_trace_names_the_places_without_the_text() -> None:
    def inner(secret: str) -> None:
        raise ValueError(secret)

    with pytest.raises(ValueError, match="canary") as raised:
        inner("canary")

    trace = log.trace_of(raised.value)
    assert trace.startswith("ValueError at test_log.py:")
    assert trace.index(" inner") < trace.index(" test_our_own")
    assert "canary" not in trace
    assert log.trace_of(ValueError("canary")) == "ValueError at "


def test_a_terminal_gets_readable_lines_without_locals() -> None:
    text = output(
        "log.configure(form='console')\n"
        "_log.info('order.deleted_upstream', order_id='123', secret='canary', status='a\\x1b[2J')\n"
        "try:\n    local = 'canary'\n    raise ValueError(local)\n"
        "except ValueError:\n    logging.getLogger('uvicorn.error').exception('it failed')"
    )

    assert ["order.deleted_upstream" in line or "it failed" in line for line in text.splitlines()] == [True, True]
    assert "123" in text
    assert "a\N{REPLACEMENT CHARACTER}[2J" in text
    assert "canary" not in text


def test_of_a_flood_each_second_has_one_line_a_sender_and_only_so_many_senders_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "SAMPLE_SECONDS", 0.05)
    reported: list[tuple[int, str, int]] = []

    async def flood() -> list[str]:
        sampler = log.Sampler(lambda *line: reported.append(line))
        senders = [str(number) for number in range(log.SENDERS + 10)]
        passed = [sender for sender in senders * 5 if sampler.passes(401, sender)]
        await asyncio.sleep(0.07)
        passed += [sender for sender in senders[:1] if sampler.passes(401, sender)]
        await asyncio.sleep(0.2)
        return [*passed, *(sender for sender in senders[:2] if sampler.passes(401, sender))]

    assert asyncio.run(flood()) == [*map(str, range(log.SENDERS + 1)), "0", "1"]
    assert reported == [
        *((401, str(number), 4) for number in range(log.SENDERS)),
        (401, log.OTHERS, 49),
        (401, "0", 1),
    ]
