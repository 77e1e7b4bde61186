"""Real processes: `Web`, the web process alone, and `Service`, all commands with Valkey and a sandbox."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager, suppress
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch
from urllib.parse import quote
from uuid import uuid4

import httpx
from prometheus_client.parser import text_string_to_metric_families

from app.dev import stack
from app.dev.processes import Process, free_port
from app.dev.sandbox import process as sandbox_process
from app.dev.sandbox.process import Sandbox
from app.dev.sandbox.submission import order_body
from app.dev.stack import ENVIRONMENT, PARTNER_ID, TENANT
from app.dev.valkey import Valkey
from app.dev.valkey import start as start_server
from app.ids import OrderKey
from tests import command
from tests.eventually import eventually

ROOT: Final = Path(__file__).parents[1]
COMPANY: Final = "b56a418d-8205-4d3a-bdbb-25d94e42abbd"
SECRET: Final = "canary-right-client-state"
FORMER_SECRET: Final = "canary-former-client-state"
API_KEY: Final = "canary-api-key"
OPS_TOKEN: Final = "canary-ops-token"
VISITOR: Final = {"authorization": f"Basic {b64encode(f'Ada:{OPS_TOKEN}'.encode()).decode()}"}
"""The header of a reader of the ops page."""
HOOK: Final = "/webhooks/ota-channel-manager"

SELF_SIGNED: Final = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out all.pem"
)
SERVE: Final = (sys.executable, "-m", "app.cli", "serve")
API: Final = (sys.executable, "-m", "app.cli", "api")
OPS: Final = (sys.executable, "-m", "app.cli", "ops")
_senders = count()
_SERVE_CHANGED: Final = """
import sys
from app.cli.main import main
{change}
sys.argv = ["ota-receiver", "serve"]
main()
"""

_READY: Final = {
    "web": "Application startup complete",
    "api": "Application startup complete",
    "ops": "Application startup complete",
    "worker": "pool.worker_started",
}
_READY_WITHIN: Final = 20.0


def ask(
    method: str, url: str, body: object = None, headers: dict[str, str] | None = None, timeout: float = 10
) -> tuple[int, Any]:
    """Return status and body (parsed if it is JSON) of one HTTP request; raises OSError without an answer."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json", **(headers or {})}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, _parsed(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _parsed(error.read())


def accepts(port: int) -> bool:
    """Return whether the port accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Service:
    """Valkey and the Channel Manager of one test; `start` adds the commands of the Procfile.

    All logs are in `folder`. `variables` are the settings of every command.
    """

    def __init__(self, folder: Path, parts: ExitStack) -> None:
        self.folder = folder
        self.variables: dict[str, str] = {}
        self.company_id = ""
        self._parts = parts
        self.valkey: Valkey
        self.sandbox: Sandbox

    def start_valkey(self) -> None:
        """Start an empty server."""
        self.valkey = self._parts.enter_context(start_server(self.folder / "valkey"))
        self.variables["REDIS_URL"] = self.valkey.url

    def start_sandbox(self, *options: str, seed: int = 0) -> None:
        """Start the Channel Manager with command line options such as `"--settle-after", "1"`."""
        options = ("--settle-after", "0.1", *options)
        self.sandbox = self._parts.enter_context(sandbox_process.start(seed=seed, options=options))
        self.company_id = self.company_id_of(stack.COMPANY)
        self.variables |= {
            "CLIENT_STATE": secrets.token_hex(16),
            "NP_BASE_URL": self.sandbox.url,
            "NP_API_KEY": secrets.token_hex(16),
            "NP_TENANT": TENANT,
            "NP_ENVIRONMENT": ENVIRONMENT,
            "NP_COMPANY": stack.COMPANY,
            "NP_COMPANY_ID": self.company_id,
            "NP_PARTNER_ID": PARTNER_ID,
            "PORT": str(free_port()),
            "API_PORT": str(free_port()),
            "OPS_PORT": str(free_port()),
            "LOG_FORMAT": "json",
            # Most tests have no subscription: the pools would raise an alert.
            "SUBSCRIPTION_CHECK_EVERY": "0",
        }

    def company_id_of(self, company: str) -> str:
        """Return the id of a company of the tenant."""
        return self.sandbox.company_id(TENANT, ENVIRONMENT, company)

    @property
    def web_url(self) -> str:
        return f"http://127.0.0.1:{self.variables['PORT']}"

    @property
    def webhook(self) -> str:
        return self.web_url + HOOK

    def start(self, name: str, **variables: str) -> Process:
        """Start a command of the Procfile and return once it does its work."""
        process = self.launch(name, **variables)
        if name == "web":
            process.wait_until(self._is_ready, _READY_WITHIN, "/readyz answers 200")
        process.wait_for_line(_READY[name], _READY_WITHIN)
        return process

    def launch(self, name: str, **variables: str) -> Process:
        """Start a command of the Procfile without waiting for it, as a supervisor does."""
        lines = (ROOT / "Procfile").read_text().splitlines()
        command = next(line.partition(":")[2] for line in lines if line.startswith(f"{name}:"))
        return self.run(shlex.split(command), f"{name}.log", **variables)

    def run(self, argv: list[str], log: str, **variables: str) -> Process:
        """Start any program with the settings of the service; it is killed at the end of the test."""
        env = self._environment() | variables
        program = shutil.which(argv[0], path=env["PATH"]) or argv[0]
        process = Process.start([program, *argv[1:]], env=env, cwd=self.folder, log=self.folder / log)
        self._parts.callback(process.kill)
        return process

    def web_listens(self) -> bool:
        """Return whether the port of web accepts connections."""
        return accepts(int(self.variables["PORT"]))

    def cli(self, *arguments: str, **variables: str) -> tuple[int, list[Any]]:
        """Return exit code and JSON lines of `ota-receiver ... --json`, run in this process."""
        with chdir(self.folder), patch.object(sys, "path", [str(self.folder), *sys.path]):
            ended = command.run([*arguments, "--json"], self._environment() | variables, "")
        with (self.folder / "cli.log").open("a") as log:
            log.write(ended.err)
        return ended.code, ended.objects

    def admin(self, method: str, path: str, body: object = None) -> Any:
        """Return an answer of the sandbox's admin API."""
        return self.sandbox.admin(method, path, body)

    def subscribe(self) -> None:
        """Subscribe the webhook at the Channel Manager."""
        body = {
            "notificationUrl": self.webhook,
            "eventName": "ota_cm_order_processed",
            "clientState": self.variables["CLIENT_STATE"],
        }
        assert ask("POST", self.api("webhook"), body, self.key)[0] == 201

    def api(self, path: str) -> str:
        """Return the URL of an operation of the Channel Manager."""
        return f"{self.sandbox.base_url(TENANT, ENVIRONMENT, stack.COMPANY)}/{quote(path)}"

    @property
    def key(self) -> dict[str, str]:
        return {"x-np-api-key": self.variables["NP_API_KEY"]}

    def create(self, reference: str, *items: str, payment: str = "PAY-1", **more: Any) -> str:
        """Create an order at the Channel Manager and return its id; its event comes when it has settled."""
        body = order_body(PARTNER_ID, reference, items=items, payment_reference=payment) | more
        status, order = ask("POST", self.api("channelManager"), body, self.key)
        assert status == 201, order
        return str(order["orderId"])

    def issue(self, count: int = 1, company_id: str = "") -> list[str]:
        """Make issued orders at the Channel Manager without events, and return their ids."""
        body = {"company_id": company_id or self.company_id, "count": count}
        return [str(row["order_id"]) for row in self.admin("POST", "orders", body)["orders"]]

    def event(self, order_id: str, status: str = "Issued", **changes: Any) -> dict[str, Any]:
        """Return an event of an envelope."""
        ours = {
            "clientState": self.variables.get("CLIENT_STATE", ""),
            "companyId": self.company_id,
            "companyName": stack.COMPANY,
            "timestamp": f"2026-05-15T09:30:05.{time.time_ns() % 10**7:07}Z",
        }
        return item(order_id, status=status) | ours | changes

    def post(self, *events: dict[str, Any]) -> tuple[int, Any]:
        """POST the events to the webhook; return status and body."""
        return ask("POST", self.webhook, {"values": list(events)})

    def log(self, name: str, event: str = "") -> list[dict[str, Any]]:
        """Return the log lines of a command, of one event if named; each must be JSON."""
        path = self.folder / f"{name}.log"
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        lines = [json.loads(line) for line in whole.splitlines()]
        return [line for line in lines if not event or line["event"] == event]

    def row(self, order_id: str) -> dict[str, Any]:
        """Return the sandbox's counts of an order: its getOrder calls and settlements."""
        return next(row for row in self.admin("GET", "orders") if row["order_id"] == order_id)

    def fetched(self, order_id: str) -> list[dict[str, Any]]:
        return [line for line in self.log("worker", "order.fetched") if line["order_id"] == order_id]

    def wait_fetched(self, order_id: str, times: int = 1, within: float = 15) -> list[dict[str, Any]]:
        """Return the `order.fetched` lines of an order once there are `times` of them."""
        eventually(lambda: len(self.fetched(order_id)) >= times, within, what=f"{order_id} is fetched {times} times")
        return self.fetched(order_id)

    def _is_ready(self) -> bool:
        try:
            return ask("GET", f"{self.web_url}/readyz")[0] == 200
        except OSError:
            return False

    def _environment(self) -> dict[str, str]:
        paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": paths, "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}", **self.variables}


@contextmanager
def service(folder: Path) -> Iterator[Service]:
    """Yield a service of which nothing runs yet; everything it starts ends with the block. Main thread only."""
    with ExitStack() as parts:
        yield Service(folder, parts)


class Web:
    """A running web process; `http` keeps its connections warm."""

    def __init__(self, process: Process, port: int, http: httpx.Client) -> None:
        self.process = process
        self.port = port
        self.http = http

    def post(self, body: object, **more: Any) -> httpx.Response:
        """POST to the webhook: bytes as they are, anything else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(HOOK, content=content, **more)

    def deliver(self, *items: object) -> dict[str, Any]:
        """POST the items as `values`; return the receipt, which must come with 200."""
        answer = self.post({"values": items})
        assert answer.status_code == 200, answer.text
        receipt: dict[str, Any] = answer.json()
        return receipt

    def listens(self) -> bool:
        """Return whether the port accepts connections."""
        return accepts(self.port)

    def connect(self, sent: bytes = b"") -> socket.socket:
        """Return a bare connection, for what no proper client would send.

        The bytes `sent` are there when it is accepted: they meet any time limit, however slow this process is.
        """
        if sent:
            self.process.pause()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        if sent:
            connection.sendall(sent)
            self.process.resume()
        return connection

    def lines(self) -> list[dict[str, Any]]:
        """Return every log line so far, with those of every answer that was read; raises ValueError if one is not JSON.

        A process writes the lines of a request after its answer, in the next turn of its event loop.
        """
        if self.process.exit_code is None:
            with suppress(httpx.HTTPError):
                self.http.get("/healthz", timeout=1)
        whole = (line for line in self.process.output.splitlines(keepends=True) if line.endswith("\n"))
        return [json.loads(line) for line in whole]

    def lines_of(self, answer: httpx.Response) -> list[dict[str, Any]]:
        """Return the log lines of one request, once its canonical line is there."""

        def found() -> list[dict[str, Any]]:
            lines = [line for line in self.lines() if line.get("request_id") == answer.headers["x-request-id"]]
            return lines if any(line["event"] == "request" for line in lines) else []

        return eventually(found, what="the canonical line of the request")

    def line_of(self, answer: httpx.Response) -> dict[str, Any]:
        """Return the canonical log line of one request."""
        (line,) = [line for line in self.lines_of(answer) if line["event"] == "request"]
        return line


@contextmanager
def serving(folder: Path, settings: Mapping[str, str], program: Sequence[str] = SERVE, port: int = 0) -> Iterator[Web]:
    """Run the web process, or another that serves HTTP, until the block ends; it is ready when /healthz says 200.

    It listens on a free port unless one is named.
    """
    port = port or free_port()
    env = {**os.environ, **settings, "PORT": str(port), "API_PORT": str(port), "OPS_PORT": str(port)}
    with (
        Process.start(program, env=env, cwd=folder, log=folder / "web.log") as process,
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10, event_hooks={"request": [as_another]}
        ) as http,
    ):
        process.wait_until(lambda: is_up(http), 20, "/healthz says 200")
        yield Web(process, port, http)
        process.kill()  # at once: a stop that matters is a step of the test


def as_another(request: httpx.Request) -> None:
    """Let each request come from a sender of its own: of one sender not every refused request has a line."""
    request.headers.setdefault("x-forwarded-for", str(ip_address("198.18.0.0") + next(_senders)))


def serve_changed(change: str) -> list[str]:
    """Return the program of a web process that runs the Python text `change` before it serves."""
    return [sys.executable, "-c", _SERVE_CHANGED.format(change=change)]


def settings_of_one_company(redis_url: str) -> dict[str, str]:
    """Return the smallest environment the service starts with."""
    return {
        "REDIS_URL": redis_url,
        "CLIENT_STATE": SECRET,
        "NP_TENANT": "5d2c6b0e-3f1a-4a57-9d0e-0c4c5b7f1a11",
        "NP_ENVIRONMENT": "Production",
        "NP_COMPANY": "CRONUS International Ltd.",
        "NP_COMPANY_ID": COMPANY,
        "NP_API_KEY": API_KEY,
    }


def item(order_id: object = None, **changes: Any) -> dict[str, Any]:
    """Return one element of an envelope as documented, of a new order unless one is named.

    `changes` replace fields of the element, or of its payload (`status`, `buyFromOrderReference`).
    """
    payload = {
        "orderId": str(uuid4()) if order_id is None else order_id,
        "buyFromOrderReference": "CM-20260515093000-A1B2",
        "status": "Issued",
    }
    payload |= {name: changes.pop(name) for name in payload.keys() & changes.keys()}
    whole = {
        "appId": "992c2309-cca4-43cb-9e41-911f482ec088",
        "clientState": SECRET,
        "companyId": COMPANY,
        "companyName": "CRONUS International Ltd.",
        "eventName": "ota_cm_order_processed",
        "eventVersion": "1.0",
        "initiatingUserAADObjectId": "ef546153-4168-4bd5-9365-a3161608da72",
        "payload": payload,
        "timestamp": "2026-05-15T09:30:05Z",
    }
    return whole | changes


def is_up(http: httpx.Client, path: str = "/healthz") -> bool:
    """Return whether the path answers 200."""
    try:
        return http.get(path).status_code == 200
    except httpx.TransportError:
        return False


def key_of(one: dict[str, Any]) -> OrderKey:
    """Return the order of an item."""
    return OrderKey(one["companyId"], one["payload"]["orderId"])


def samples(text: str) -> dict[str, float]:
    """Return what /metrics shows, by name and label values."""
    return {
        " ".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def post(body: bytes, *headers: str, path: str = HOOK) -> bytes:
    """Return a POST; its length is the body's unless a header says how the body is framed."""
    framed = any(header.partition(":")[0] in {"content-length", "transfer-encoding"} for header in headers)
    lengths = () if framed else (f"content-length: {len(body)}",)
    head = "\r\n".join([f"POST {path} HTTP/1.1", "host: test", *lengths, *headers, "", ""])
    return head.encode("latin-1") + body


def good(*more: object) -> bytes:
    """Return a body with one good event of a new order."""
    return json.dumps({"values": [item(), *more]}).encode()


def read_all(connection: socket.socket) -> bytes:
    """Return everything until the other side closes; raises TimeoutError, ConnectionError."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_answer(connection: socket.socket) -> bytes:
    """Return one answer, or what came of it before the connection ended; raises TimeoutError."""
    answer = b""
    with suppress(ConnectionError):
        while (missing := missing_of(answer)) and (part := connection.recv(missing)):
            answer += part
    return answer


def missing_of(answer: bytes) -> int:
    """Return how many bytes an answer lacks that may be read without touching the next one."""
    head, ended, body = answer.partition(b"\r\n\r\n")
    if not ended:
        return 1
    length = re.search(rb"\ncontent-length: (\d+)", head)
    return int(length[1]) - len(body) if length else 0


def statuses(answers: bytes) -> list[int]:
    """Return the status of each answer in a stream of them."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def talk(web: Web, sent: bytes) -> bytes:
    """Return all that is answered to these bytes on a connection of their own."""
    with web.connect() as connection:
        connection.sendall(sent)
        return read_all(connection)


def trickle(web: Web, begin: bytes, piece: bytes) -> bytes:
    """Send `begin` and then `piece` again and again, until an answer comes; return it. It must come within 15 s."""
    answer = b""
    with web.connect(begin) as connection:
        started = time.monotonic()
        connection.settimeout(0.02)
        while not answer:
            connection.sendall(piece)
            with suppress(TimeoutError):
                answer = connection.recv(65536)
            assert time.monotonic() - started < 15
    return answer


def rss_kb(web: Web) -> int:
    """Return the memory of the web process in KB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{web.process.pid}/status").read_text())
    assert found is not None
    return int(found[1])


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")


def is_running(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except FileNotFoundError:
        # No /proc on this system, or the process ended meanwhile.
        return not status.parent.parent.exists()
    except ProcessLookupError:
        return False


def children(pid: int) -> list[int]:
    """Return the pids of the child processes (Linux)."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]
