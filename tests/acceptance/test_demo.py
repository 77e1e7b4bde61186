"""`ota-receiver demo` and `dev`."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import httpx
import pytest
from rich.console import Console

from app.dev.demo import end
from app.dev.processes import Process, free_port
from app.dev.stack import Stack
from tests.eventually import eventually
from tests.service import ask, children, is_running

PROGRAM = str(Path(sys.executable).parent / "ota-receiver")


def ota_receiver(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


def test_the_demo_fetches_every_sample_in_under_20_s_and_shows_them_until_enter(tmp_path: Path) -> None:
    """It exits 0 only if each settlement cost exactly one getOrder."""
    started = time.monotonic()
    with at_terminal(PROGRAM, "demo", cwd=tmp_path) as (demo, terminal):
        said = terminal.read_until("Every order arrived complete, and each settlement cost exactly one getOrder.")
        assert time.monotonic() - started < 20
        said += terminal.read_until("Press Enter to end.")
        shown = re.search(r"(http://127\.0\.0\.1:\d+/)\s.* password (\S+)", said, re.DOTALL)
        assert shown is not None, said
        page = httpx.get(shown[1], auth=("Ada Lovelace", shown[2]), trust_env=False)
        assert (page.status_code, "read only" in page.text) == (200, False), page.text
        assert "No order is pending" in page.text
        parts = children(demo.pid)
        assert len(parts) == 5
        terminal.press_enter()

        assert demo.wait(20) == 0
        assert not any(map(is_running, parts))
    assert list(tmp_path.iterdir()) == []


def test_the_demo_waits_for_no_one_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """With colours for a log, as CI asks for them, too: no one presses Enter there."""
    end(Console(force_terminal=True), cast("Stack", None), Path())

    said = capsys.readouterr().out
    assert "`ota-receiver dev` shows such orders in a browser" in said
    assert "http" not in said, "no address of a receiver that has ended"


class Terminal:
    """The other side of a terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read_until(self, text: str, within: float = 60) -> str:
        """Return what is shown up to this text; raises AssertionError if it does not come."""
        said = ""
        deadline = time.monotonic() + within
        while text not in said:
            ready, _, _ = select.select([self._descriptor], [], [], max(0, deadline - time.monotonic()))
            assert ready, said
            try:
                said += os.read(self._descriptor, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it has ended: {said}") from None
        return said

    def press_enter(self) -> None:
        os.write(self._descriptor, b"\n")


@contextmanager
def at_terminal(*argv: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[bytes], Terminal]]:
    """Run a program on a terminal of its own; it is killed at the end of the block."""
    ours, theirs = pty.openpty()
    with ExitStack() as parts:
        parts.callback(os.close, ours)
        try:
            started = subprocess.Popen(
                argv, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
            )
        finally:
            os.close(theirs)
        process = parts.enter_context(started)
        parts.callback(process.kill)
        yield process, Terminal(ours)


def test_dev_keeps_its_ports_and_leaves_no_process_behind(tmp_path: Path) -> None:
    """A port that is taken meanwhile is another one this time, and said so. What a sink raises is shown.

    Its subscription counts at once, and `check` with its settings finds the sinks from every folder.
    """
    sandbox, valkey, folder = free_port(), free_port(), tmp_path / ".ota-receiver"
    folder.mkdir(mode=0o700)
    (tmp_path / "shop.py").write_text("def on_order(order, context):\n    raise LookupError(order.order_id)\n")
    (tmp_path / "orders").mkdir()
    (tmp_path / "sinks.toml").write_text(f'[sinks.archive]\nkind = "files"\nfolder = "{tmp_path / "orders"}"\n')
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        was, page_was = taken.getsockname()[1], other.getsockname()[1]
        urls = [f"http://127.0.0.1:{sandbox}", f"redis://:kept@127.0.0.1:{valkey}/0"]
        (folder / "env").write_text(f"PORT={was}\nOPS_PORT={page_was}\nNP_BASE_URL={urls[0]}\nREDIS_URL={urls[1]}\n")
        with Process.start(
            [PROGRAM, "dev", "--sinks", "python:shop:on_order", "--sinks-file", "sinks.toml"],
            cwd=tmp_path,
            log=tmp_path / "out",
        ) as dev:
            dev.wait_for_line("Ctrl-C stops everything", 30)
            assert re.search(r"LookupError: [0-9a-f]{8}-", dev.wait_for_line("LookupError: ", 10))
            eventually(lambda: any((tmp_path / "orders").iterdir()), 10, what="the sink of the file gets an order")
            shell = (
                "set -a; . .ota-receiver/env; echo $NP_BASE_URL $REDIS_URL $PORT $OPS_PORT $OPS_ACT_TOKEN $NP_COMPANY"
            )
            done = subprocess.run(["/bin/sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True)
            *kept, port, page_port, password, company = done.stdout.rstrip().split(" ", 5)
            assert (kept, company) == (urls, "CRONUS International Ltd.")
            assert f"Port {was} of the webhook is taken: it is {port} this time." in dev.output
            assert f"Port {page_was} of the ops page is taken: it is {page_port} this time." in dev.output
            assert dev.output.count("is taken") == 2
            page = f"http://127.0.0.1:{page_port}/"
            assert f"{page}   (user name: your own name; password: {password})" in dev.output
            assert httpx.get(page, auth=("Ada Lovelace", password), trust_env=False).status_code == 200
            eventually(lambda: "ops.request" in (folder / "ops.log").read_text(), 10, what="its log line")
            assert ask("GET", f"http://127.0.0.1:{port}/readyz")[0] == 200
            seen = folder / "worker.log"
            eventually(lambda: "subscription.active" in seen.read_text(), 10, what="a pool sees the subscription")
            shell = f"set -a; . {folder}/env; set +a; cd /; {PROGRAM} check"

            def check() -> subprocess.CompletedProcess[str]:
                ended = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, check=False)
                assert "nothing is delivered: LookupError at shop.py:2" in ended.stdout
                return ended

            done = eventually(check, 20, what="check names the sink that fails")
            assert (done.returncode, done.stdout.count("✗")) == (1, 1), done.stdout
            assert re.search(rf"files +{re.escape(str(tmp_path / 'orders'))}\n", done.stdout)
            parts = children(dev.pid)
            assert len(parts) == 5
            os.kill(dev.pid, signal.SIGTERM)

            assert dev.wait(20) == 0
            assert not any(map(is_running, parts))


def test_dev_refuses_a_wrong_sink_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    done = ota_receiver("dev", "--sinks", "python:no_such_shop:on_order", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"SINKS: number 1 cannot be imported: no module no_such_shop in {tmp_path}, ")
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "SINKS_FILE: the file is missing, "),
        ('[sinks.own]\nkind = "python"\nfunction = "no_such_shop:on_order"\n', "SINKS_FILE [sinks.own]: cannot be imp"),
        ('[sinks.a]\nkind = "files"\nfolder = "/tmp"\ncompanies = ["louvre"]\n', "COMPANIES (SINKS_FILE [sinks.a]"),
        ('[sinks.a]\nkind = "sql"\nurl_file = "sinks.toml"\n', "URL (SINKS_FILE [sinks.a] line 3): the file of "),
    ],
)
def test_dev_refuses_a_wrong_file_of_sinks_at_once(tmp_path: Path, text: str | None, problem: str) -> None:
    if text:
        (tmp_path / "sinks.toml").write_text(text)
    done = ota_receiver("dev", "--sinks-file", "sinks.toml", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(problem)
    assert "Traceback" not in done.stderr


def test_dev_names_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = ota_receiver("dev", "--port", port, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (1, "")
    assert f"port {port} is taken: name another with --port" in done.stderr
    assert "Traceback" not in done.stderr
