"""`ota-receiver demo` and `dev`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.dev.processes import Process, free_port
from tests.eventually import eventually
from tests.service import ask, children, is_running

PROGRAM = str(Path(sys.executable).parent / "ota-receiver")


def ota_receiver(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


def test_the_demo_fetches_every_sample_in_under_20_s(tmp_path: Path) -> None:
    """It exits 0 only if each settlement cost exactly one getOrder."""
    started = time.monotonic()
    done = ota_receiver("demo", cwd=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every order arrived complete, and each settlement cost exactly one getOrder." in done.stdout
    assert "http" not in done.stdout, "no address of a receiver that has ended"
    assert time.monotonic() - started < 20
    assert list(tmp_path.iterdir()) == []


def test_dev_keeps_its_ports_and_leaves_no_process_behind(tmp_path: Path) -> None:
    """A port that is taken meanwhile is another one this time, and said so. What a sink raises is shown.

    Its subscription counts at once, and `check` with its settings finds the sinks from every folder.
    """
    sandbox, valkey, folder = free_port(), free_port(), tmp_path / ".ota-receiver"
    folder.mkdir(mode=0o700)
    (tmp_path / "shop.py").write_text("def on_order(order, context):\n    raise LookupError(order.order_id)\n")
    (tmp_path / "orders").mkdir()
    (tmp_path / "sinks.toml").write_text(f'[sinks.archive]\nkind = "files"\nfolder = "{tmp_path / "orders"}"\n')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        was = taken.getsockname()[1]
        urls = [f"http://127.0.0.1:{sandbox}", f"redis://:kept@127.0.0.1:{valkey}/0"]
        (folder / "env").write_text(f"PORT={was}\nNP_BASE_URL={urls[0]}\nREDIS_URL={urls[1]}\n")
        with Process.start(
            [PROGRAM, "dev", "--sinks", "python:shop:on_order", "--sinks-file", "sinks.toml"],
            cwd=tmp_path,
            log=tmp_path / "out",
        ) as dev:
            dev.wait_for_line("Ctrl-C stops everything", 30)
            assert re.search(r"LookupError: [0-9a-f]{8}-", dev.wait_for_line("LookupError: ", 10))
            eventually(lambda: any((tmp_path / "orders").iterdir()), 10, what="the sink of the file gets an order")
            shell = "set -a; . .ota-receiver/env; echo $NP_BASE_URL $REDIS_URL $PORT $NP_COMPANY"
            done = subprocess.run(["/bin/sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True)
            *kept, port, company = done.stdout.rstrip().split(" ", 3)
            assert (kept, company) == (urls, "CRONUS International Ltd.")
            assert f"Port {was} of the webhook is taken by another program: it is {port} this time." in dev.output
            assert dev.output.count("is taken") == 1
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
            assert f"files         {tmp_path / 'orders'}" in done.stdout
            parts = children(dev.pid)
            assert len(parts) == 4
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
