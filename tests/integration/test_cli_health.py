"""`health`: the check for HEALTHCHECK, in a container that runs either process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import msgspec
import pytest

from app import bootstrap
from app.dev.processes import Process
from app.identity import identity
from app.snapshot import Heartbeat
from tests.eventually import eventually
from tests.lab import Lab


@contextmanager
def web(status: int) -> Iterator[int]:
    """A web process that answers `status`; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def beat(lab: Lab, seconds_ago: float, machine: str | None = None) -> None:
    me = identity()
    at = bootstrap.clock() - round(seconds_ago * 1000)
    heartbeat = Heartbeat(machine or me.machine, me.pid, me.started, [], at)
    lab.redis.hset("ota:pools", "pool", msgspec.json.encode(heartbeat))


def test_a_web_process_that_answers_is_healthy(lab: Lab) -> None:
    with web(200) as port:
        for host in ("127.0.0.1", "0.0.0.0"):
            ended = lab.run_command("health", "--json", PORT=str(port), HOST=host)
            assert (ended.code, [one["role"] for one in ended.objects]) == (0, ["web"])


def test_a_web_process_with_another_answer_is_not_healthy(lab: Lab) -> None:
    with web(503) as port:
        assert lab.run_command("health", "--role", "web", PORT=str(port)).code == 1


def test_proxies_of_the_environment_are_not_used(lab: Lab) -> None:
    with web(200) as port:
        assert lab.run_command("health", "--role", "web", PORT=str(port), http_proxy="http://127.0.0.1:1").code == 0


@pytest.mark.parametrize(("age", "code"), [(1, 0), (5, 0), (16, 1)])
def test_a_pool_is_healthy_while_its_heartbeat_is_fresh(lab: Lab, free_port: int, age: int, code: int) -> None:
    # The command needs up to a second to start.
    beat(lab, age - 1 if age < 15 else age)

    assert lab.run_command("health", "--role", "worker").code == code
    assert lab.run_command("health", PORT=str(free_port)).code == code


def test_the_heartbeat_of_another_machine_does_not_count(lab: Lab) -> None:
    beat(lab, 0, machine="another-boot-another-namespace")

    assert lab.run_command("health", "--role", "worker").code == 1


def test_without_redis_the_worker_is_not_healthy_and_the_web_process_is(lab: Lab) -> None:
    with web(200) as port:
        away = {"REDIS_URL": "redis://127.0.0.1:1/0", "PORT": str(port)}

        assert lab.run_command("health", "--role", "worker", **away).code == 1
        assert lab.run_command("health", **away).code == 0


def test_a_hanging_web_process_is_not_healthy(lab: Lab, hanging: Callable[[], int]) -> None:
    ended = lab.run_command("health", "--role", "web", "--json", PORT=str(hanging()))

    assert (ended.code, ended.objects[0]["healthy"]) == (1, False)
    assert "TimeoutError" in ended.objects[0]["detail"]


@pytest.fixture
def hanging() -> Iterator[Callable[[], int]]:
    """A server that takes connections and never answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as mute:
        yield lambda: int(mute.getsockname()[1])


def test_a_real_pool_is_healthy(lab: Lab, tmp_path: Path) -> None:
    env = lab.env | {"WORKERS": "1", "BACKFILL_WORKERS": "0", "SINKS": ""}
    with Process.start([sys.executable, "-m", "app.cli", "worker"], env=env, log=tmp_path / "log"):
        eventually(lambda: lab.redis.hlen("ota:pools") == 1, 30, what="a heartbeat")

        assert lab.run_command("health", "--role", "worker").code == 0


def test_the_check_of_a_worker_imports_no_heavy_library(lab: Lab) -> None:
    """A container runs it every few seconds."""
    code = (
        "import sys\nfrom app.cli.main import main\nsys.argv = ['ota-receiver', 'health', '--role', 'worker']\n"
        "try:\n    main()\nexcept SystemExit:\n    print(*sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=lab.env, capture_output=True, text=True, check=True, timeout=30
    )

    assert "no heartbeat" in ended.stdout
    heavy = {"app.bootstrap", "workers", "httpx", "starlette", "prometheus_client"}
    assert heavy & set(ended.stderr.split()) == set()
