"""Whatever goes wrong ends in one clear line and an exit code that means something, never in a traceback."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

from tests.eventually import eventually
from tests.integration.desk import CLIENT_STATES, Desk, open_desk, order

READERS = (
    ("orders", "list"),
    ("orders", "show", order(1).order_id),
    ("events", "list"),
    ("events", "replay", "--since", "1h", "--yes"),
    ("dead", "list"),
    ("dead", "requeue", "--all", "--yes"),
)


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    return open_desk(redis_client, redis_url, tmp_path)


@pytest.mark.parametrize("arguments", READERS, ids=" ".join)
def test_redis_away_is_one_line_and_exit_code_3(desk: Desk, arguments: tuple[str, ...]) -> None:
    ended = desk.run(*arguments, REDIS_URL="redis://:hidden-password@127.0.0.1:1/0")

    assert (ended.code, ended.out, len(ended.err.splitlines())) == (3, "", 1)
    assert "127.0.0.1:1" in ended.err
    assert "hidden-password" not in ended.err


def test_a_wrong_password_is_told_as_such(desk: Desk, redis_url: str) -> None:
    address = redis_url.rpartition("@")[2]

    ended = desk.run("orders", "list", REDIS_URL=f"redis://:wrong@{address}")

    assert (ended.code, len(ended.err.splitlines())) == (3, 1)
    assert "password" in ended.err


def test_wrong_settings_are_listed_with_exit_code_2(desk: Desk) -> None:
    ended = desk.run("orders", "list", REDIS_URL="", COMPANIES_FILE="/nowhere")

    assert ended.code == 2
    assert "REDIS_URL" in ended.err
    assert "COMPANIES_FILE" in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("orders", "list", "--since", "yesterday"),
        ("orders", "list", "--state", "lost"),
        ("orders", "list", "--limit", "0"),
        ("orders", "list", "--company", "nobody"),
        ("orders", "show"),
        ("no-such-command",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(desk: Desk, arguments: tuple[str, ...]) -> None:
    ended = desk.run(*arguments)

    assert (ended.code, ended.out) == (2, "")
    assert ended.err


def test_ctrl_c_ends_with_130_and_no_traceback(desk: Desk) -> None:
    """A Redis that takes the connection and never answers: the command hangs until it is interrupted."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(30)
        command = [sys.executable, "-m", "app.cli", "orders", "list"]
        env = desk.env | {"REDIS_URL": f"redis://127.0.0.1:{mute.getsockname()[1]}/0"}
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            waiting, _ = mute.accept()
            with waiting:
                waiting.recv(1)
                running.send_signal(signal.SIGINT)
                out, err = running.communicate(timeout=30)

    assert (running.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_a_person_is_asked_and_a_no_changes_nothing(desk: Desk) -> None:
    desk.hear(order(1))
    desk.bring_home(order(1))

    assert _answered(desk, b"n\n") == (1, [])
    assert _answered(desk, b"y\n") == (0, [order(1).order_id])


def _answered(desk: Desk, answer: bytes) -> tuple[int, list[str]]:
    """Replay from a terminal, answer the question, and return the exit code and what was queued."""
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-m", "app.cli", "events", "replay", "--since", "1h", "--force"]
    try:
        with subprocess.Popen(command, env=desk.env, stdin=theirs, stdout=theirs, stderr=theirs) as running:
            os.close(theirs)
            shown = b""

            def asked() -> bool:
                nonlocal shown
                shown += os.read(terminal, 4096)
                return b"Fetch 1 order again" in shown and b"[y/N]" in shown

            eventually(asked, 30, what="the question")
            os.write(terminal, answer)
            code = running.wait(30)
    finally:
        os.close(terminal)
    return code, desk.waiting("backfill")


def test_a_reader_that_leaves_early_is_no_error_to_speak_of(desk: Desk) -> None:
    desk.hear(*(order(number) for number in range(300)))
    command = [sys.executable, "-m", "app.cli", "orders", "list", "--limit", "300", "--json"]
    with subprocess.Popen(command, env=desk.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        running.wait(30)
        assert b"Traceback" not in running.stderr.read()


@pytest.mark.parametrize(
    "group", [("check",), ("health",), *((name, word) for name, word, *_ in READERS)], ids=" ".join
)
def test_every_command_documents_its_exit_codes(desk: Desk, group: tuple[str, ...]) -> None:
    ended = desk.run(*group, "--help")

    assert ended.code == 0
    assert "Exit codes:" in ended.out
    assert "--json" in ended.out


def test_no_secret_of_the_settings_is_ever_printed(desk: Desk, redis_url: str) -> None:
    desk.hear(order(1))
    said = [desk.run(*arguments) for arguments in (*READERS, ("check",), ("orders", "list", "--json"))]
    password = redis_url.split("@")[0].rpartition(":")[2]

    for secret in (*CLIENT_STATES.values(), "canary-api-key", password):
        assert [one for one in said if secret in one.out + one.err] == []
