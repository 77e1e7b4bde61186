"""`simulate` passes a correct receiver and names each order that a wrong one loses, forges or fetches twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from app.dev.processes import Process, free_port
from app.dev.stack import receiver_settings
from app.dev.valkey import Valkey
from tests import command
from tests.command import Ended
from tests.eventually import eventually
from tests.service import SERVE, children, is_running

ROOT: Final = Path(__file__).parents[2]
MISBEHAVIOUR: Final = ("--duplicates", "10%", "--late", "5%", "--bad-secret", "5%", "--batch", "8", "--seed", "11")


def simulate(*arguments: str, cwd: Path = ROOT) -> Ended:
    with chdir(cwd):
        return command.run(["simulate", *arguments], os.environ, "")


async def acknowledges_all(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 200 and do nothing."""
    if scope["type"] == "http":
        await Request(scope, receive).body()
        await JSONResponse({})(scope, receive, send)


async def missing(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 404, as a receiver with another path does."""
    if scope["type"] == "http":
        await JSONResponse({}, 404)(scope, receive, send)


async def fetches_all(scope: Scope, receive: Receive, send: Send) -> None:
    """Fetch the order of each event, repeats and forged ones included."""
    if scope["type"] != "http":
        return
    tree = await Request(scope, receive).json()
    items = tree.get("values") or tree.get("value") or [tree]
    await run_in_threadpool(_fetch, [item["payload"]["orderId"] for item in items])
    await JSONResponse({})(scope, receive, send)


def _fetch(order_ids: Sequence[str]) -> None:
    given = os.environ
    root = "/".join([given["NP_BASE_URL"], given["NP_TENANT"], given["NP_ENVIRONMENT"], given["NP_COMPANY"]])
    with httpx.Client(headers={"x-np-api-key": given["NP_API_KEY"]}, trust_env=False) as http:
        for order_id in order_ids:
            http.get(f"{root}/channelManager/{order_id}")


@contextmanager
def receiver(name: str, sandbox_port: int, folder: Path) -> Iterator[str]:
    """Run one of the apps above and return its URL."""
    port = free_port()
    argv = [sys.executable, "-m", "uvicorn", f"{__name__}:{name}", "--port", str(port), "--lifespan", "off"]
    env = {**os.environ, **receiver_settings(f"http://127.0.0.1:{sandbox_port}")}
    with Process.start(argv, env=env, cwd=ROOT, log=folder / "receiver.log") as process:
        process.wait_for_line("Uvicorn running", 20)
        yield f"http://127.0.0.1:{port}/hook"


def simulated(name: str, folder: Path) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the report of a simulation against one of the apps above."""
    port = free_port()
    with receiver(name, port, folder) as url:
        options = f"--url {url} --sandbox-port {port} --orders 20 --burst --patience 1 --json"
        ended = simulate(*options.split(), *MISBEHAVIOUR)
    return ended.code, json.loads(ended.out)


def test_the_receiver_fetches_every_order_despite_all_misbehaviour(tmp_path: Path) -> None:
    ended = simulate("--orders", "60", *MISBEHAVIOUR, "--burst", "--json", cwd=tmp_path)

    report = json.loads(ended.out)
    assert (ended.code, report["wrong"], ended.err) == (0, [], "")
    assert (report["orders"], report["orders_fetched"], report["orders_complete"]) == (60, 60, 60)
    assert (report["sent"], report["acknowledged"]) == (60 + 6 + 3, 66)
    assert (report["duplicates_sent"], report["duplicates_recognised"]) == (6, 6)
    assert (report["forged_sent"], report["forged_orders_fetched"]) == (3, 0)
    assert report["forged_posts_refused"] >= 1
    assert report["get_orders"] == 60
    assert set(report["answers"]) == {"200", "401"}
    assert 0 < report["p50_ms"] <= report["p99_ms"]
    assert list(tmp_path.iterdir()) == []


def test_a_running_receiver_with_the_printed_settings_passes(own_valkey: Valkey, tmp_path: Path) -> None:
    sandbox_port, port = free_port(), free_port()
    printed = simulate("--settings", "--sandbox-port", str(sandbox_port)).out
    given = dict(line.replace("'", "").split("=", 1) for line in printed.splitlines())
    assert given == receiver_settings(f"http://127.0.0.1:{sandbox_port}")
    env = {**os.environ, **given, "REDIS_URL": own_valkey.url, "PORT": str(port), "WORKERS": "2", "LOG_FORMAT": "json"}
    with (
        Process.start(SERVE, env=env, cwd=tmp_path, log=tmp_path / "web") as web,
        Process.start([*SERVE[:-1], "worker"], env=env, cwd=tmp_path, log=tmp_path / "worker") as worker,
    ):
        web.wait_for_line("Application startup complete", 20)
        worker.wait_for_line("pool.worker_started", 20)
        url = f"http://127.0.0.1:{port}/webhooks/ota-channel-manager"

        ended = simulate(
            "--url", url, "--sandbox-port", str(sandbox_port), "--orders", "30", "--rate", "200/s", *MISBEHAVIOUR
        )

    assert (ended.code, ended.err) == (0, "")
    assert "All orders are right." in ended.out
    assert "30, 1 per settlement" in ended.out


def test_a_receiver_that_acknowledges_and_fetches_nothing_fails(tmp_path: Path) -> None:
    code, report = simulated("acknowledges_all", tmp_path)

    assert (code, report["acknowledged"], report["get_orders"]) == (1, 22, 0)
    problems = {one["order_id"]: one["problems"] for one in report["wrong"]}
    lost = "acknowledged, but never fetched (0 getOrders without an order)"
    assert sum(one == [lost] for one in problems.values()) == 20
    assert ["forged, but acknowledged"] in problems.values()


def test_a_receiver_that_fetches_repeats_and_forged_events_fails(tmp_path: Path) -> None:
    code, report = simulated("fetches_all", tmp_path)

    problems = [text for one in report["wrong"] for text in one["problems"]]
    assert (code, problems.count("2 getOrders for one settlement")) == (1, 2)
    assert "forged, but fetched" in problems
    assert report["orders_fetched"] == 20


def test_events_that_are_never_acknowledged_are_listed_and_a_taken_port_is_named(tmp_path: Path) -> None:
    port = free_port()
    with receiver("missing", port, tmp_path) as url:
        ended = simulate("--url", url, "--sandbox-port", str(port), "--orders", "2", "--seed", "5", "--patience", "1")
        taken = simulate("--url", url, "--sandbox-port", str(urlsplit(url).port))

    assert (ended.code, "2 ids wrong" in ended.out) == (1, True)
    assert ended.out.count("never acknowledged: 404") == 2
    assert (taken.code, "choose another with --sandbox-port" in taken.err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "https://hooks.example.com/hook"), "--beyond-loopback"),
        (("--url", "hooks.example.com"), "must start with http"),
        (("--burst", "--rate", "5/s"), "--burst sends all at once"),
        (("--duplicates", "120%"), "is not a share"),
        (("--rate", "0/s"), "is not a rate"),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[str, ...], message: str) -> None:
    ended = simulate(*arguments)

    assert (ended.code, message in ended.err, ended.out) == (2, True, "")


def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    """Pressed twice while the last part starts; that part dies with its parent, a moment later."""
    argv = [sys.executable, "-m", "app.cli", "simulate", "--rate", "1/s"]
    with Process.start(argv, cwd=tmp_path, log=tmp_path / "out") as process:
        eventually(lambda: len(children(process.pid)) == 4, 30, what="all parts were started")
        parts = children(process.pid)
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGINT)

        assert process.wait(20) == 130
        eventually(lambda: not any(map(is_running, parts)), what="all parts have ended")
        assert "Traceback" not in process.output


def test_without_app_dev_as_in_the_image_it_names_what_it_needs(tmp_path: Path) -> None:
    for name in ("app", "workers"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("dev", "__pycache__"))

    argv = [sys.executable, "-m", "app.cli", "simulate", "--orders", "1"]
    ended = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)

    assert (ended.returncode, "needs a development install" in ended.stderr) == (2, True)
    assert not (tmp_path / "app" / "dev").exists()
