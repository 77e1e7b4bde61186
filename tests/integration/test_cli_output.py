"""What is printed can be read: on a narrow terminal, and when nobody can or will take it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from redis import Redis

from app.dev.valkey import Valkey
from tests.integration.desk import Desk, open_desk, order

COMMAND: Final = (sys.executable, "-m", "app.cli")
LISTS: Final = (("orders", "list"), ("dead", "list"), ("events", "list"))
PRINTING: Final = (
    ("orders", "list"),
    ("orders", "list", "--json"),
    ("orders", "explain", order(1).order_id),
    ("--help",),
)


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    """One order that was given up."""
    found = open_desk(redis_client, redis_url, tmp_path)
    found.hear(order(1))
    found.give_up(order(1))
    return found


@pytest.fixture
def own_desk(own_valkey: Valkey, tmp_path: Path) -> Iterator[Desk]:
    """The same on a Redis that may be configured."""
    with Redis.from_url(own_valkey.url) as redis:
        found = open_desk(redis, own_valkey.url, tmp_path)
        found.hear(order(1))
        found.bring_home(order(1))
        yield found


def shown(desk: Desk, *arguments: str, columns: int) -> list[str]:
    """Return the lines of a terminal so wide after the command."""
    terminal, theirs = pty.openpty()
    env = desk.env | {"COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen([*COMMAND, *arguments], env=env, stdin=theirs, stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        text = b"".join(iter(lambda: _read(terminal), b""))
        os.close(terminal)
        assert running.wait(30) == 0, text
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode()).splitlines()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # so says Linux when the other side is closed
        return b""


@pytest.mark.parametrize("arguments", LISTS, ids=" ".join)
def test_on_80_columns_an_id_stands_whole_on_one_line(desk: Desk, arguments: tuple[str, ...]) -> None:
    """It is copied from there; what there is no room for is named."""
    lines = shown(desk, *arguments, columns=80)

    assert sum(order(1).order_id in line for line in lines) == 1
    assert max(len(line) for line in lines if "Hidden" not in line) <= 80
    assert any("Hidden" in line and "company" in line for line in lines)
    assert not any(" venue " in line for line in lines)


@pytest.mark.parametrize("arguments", LISTS, ids=" ".join)
def test_on_a_wide_terminal_nothing_is_left_out(desk: Desk, arguments: tuple[str, ...]) -> None:
    lines = shown(desk, *arguments, columns=180)

    assert any(order(1).order_id in line and "venue" in line for line in lines)
    assert not any("Hidden" in line for line in lines)


def test_a_column_stays_only_where_its_whole_width_is_free(desk: Desk) -> None:
    """On one column less than the table needs, its last one that may goes, and no cell is broken."""
    wide = shown(desk, "events", "list", columns=180)
    needed = max(len(line.rstrip()) for line in wide) + 1  # the right edge

    assert not any("Hidden" in line for line in shown(desk, "events", "list", columns=needed))
    (told,) = (line for line in shown(desk, "events", "list", columns=needed - 1) if "Hidden" in line)
    assert "narrow: reference." in told


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_full_disk_under_stdout_is_one_sentence_and_exit_code_1(desk: Desk, arguments: tuple[str, ...]) -> None:
    """It is neither Redis that is away nor a traceback."""
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*COMMAND, *arguments],
            env=desk.env,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )

    assert (ended.returncode, ended.stderr) == (1, "Cannot write the output: No space left on device.\n")


@pytest.mark.parametrize("arguments", PRINTING[:-1], ids=" ".join)
def test_a_reader_that_leaves_early_is_exit_code_141(desk: Desk, arguments: tuple[str, ...]) -> None:
    """As shells say it; 1 would mean "not complete"."""
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        ended = subprocess.run(
            [*COMMAND, *arguments],
            env=desk.env,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        os.close(theirs)

    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize(
    ("name", "value", "code"), [("maxmemory", "1mb", "OOM"), ("min-replicas-to-write", "1", "NOREPLICAS")]
)
def test_a_redis_that_refuses_is_told_from_one_that_is_away(own_desk: Desk, name: str, value: str, code: str) -> None:
    """To start it, or to look for a wrong address, would mend neither."""
    own_desk.redis.config_set(name, value)

    ended = own_desk.run("orders", "refetch", order(1).order_id)

    assert (ended.code, ended.out, len(ended.err.splitlines())) == (3, "", 1)
    assert f"refuses this ({code}): see `ota-receiver check`" in ended.err
    assert "REDIS_URL" not in ended.err
    assert "memory" not in ended.err
