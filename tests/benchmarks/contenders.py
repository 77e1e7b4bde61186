"""The three receivers that are compared, each one process on a port of its own with the same settings."""

from __future__ import annotations

import http.client
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from app.dev.processes import Process
from tests.environment import without_settings

WEBHOOK_PATH = "/webhooks/ota-channel-manager"
CLIENT_STATE = "benchmark-0c9f6d1e7b"
TENANT = "0b9a0c2f-4d1e-4f5a-8b6c-7d8e9f0a1b2c"
ENVIRONMENT = "Sandbox"
COMPANY = "CRONUS International Ltd."
COMPANY_ID = "b56a418d-8205-4d3a-bdbb-25d94e42abbd"

OURS = (sys.executable, "-m", "app.cli")

_ROOT = Path(__file__).parents[2]
_FIXTURE = _ROOT / "tests" / "fixtures" / "webhook-values.json"
_UVICORN = (sys.executable, "-m", "uvicorn", "--factory", "--loop", "uvloop", "--http", "httptools")
_QUIET = ("--no-access-log", "--log-level", "warning")
_SETTINGS = {
    "CLIENT_STATE": CLIENT_STATE,
    "NP_TENANT": TENANT,
    "NP_ENVIRONMENT": ENVIRONMENT,
    "NP_COMPANY": COMPANY,
    "NP_COMPANY_ID": COMPANY_ID,
    "NP_API_KEY": "benchmark-key",
    # Nothing listens there: the intake must not need the Channel Manager.
    "NP_BASE_URL": "http://127.0.0.1:9",
    "LOG_FORMAT": "json",
}


@dataclass(frozen=True)
class Contender:
    """One receiver; `argv` lacks the port, which `port_option` or the setting PORT names."""

    name: str
    argv: tuple[str, ...]
    port_option: tuple[str, ...]
    queue: str | None
    """The RQ queue that must hold one job per event afterwards; None: it records nothing."""


ACKNOWLEDGE_ONLY = Contender(
    "acknowledge-only", (*_UVICORN, "tests.benchmarks.acknowledge_only:app", *_QUIET), ("--port",), None
)
OBVIOUS = Contender("obvious", (*_UVICORN, "tests.benchmarks.obvious:app", *_QUIET), ("--port",), "live")
RECEIVER = Contender("ota-receiver", (*OURS, "serve"), (), "live")
ALL = (ACKNOWLEDGE_ONLY, OBVIOUS, RECEIVER)


def body(order_ids: Iterable[str], *, client_state: str, company_id: str) -> str:
    """Return a POST as the Channel Manager sends it, with one event per order and the present time."""
    (sample,) = json.loads(_FIXTURE.read_text(encoding="utf-8"))["values"]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    same = sample | {"clientState": client_state, "companyId": company_id, "timestamp": now}
    values = [same | {"payload": sample["payload"] | {"orderId": order_id}} for order_id in order_ids]
    return json.dumps({"values": values}, separators=(",", ":"))


def settings(redis_url: str, port: int, **more: str) -> dict[str, str]:
    """Return the whole environment of a receiver or a worker."""
    return without_settings(os.environ) | _SETTINGS | {"REDIS_URL": redis_url, "PORT": str(port)} | more


def serve(contender: Contender, port: int, environment: Mapping[str, str], folder: Path) -> Process:
    """Start the contender with its log in `folder` and return once it answers /healthz.

    Raises ProcessEnded, with the end of the log, when it does not start.
    """
    port_option = [word for option in contender.port_option for word in (option, str(port))]
    process = Process.start(
        [*contender.argv, *port_option],
        # Outside the repository, whose .env would be read.
        env={**environment, "PYTHONPATH": str(_ROOT)},
        cwd=folder,
        log=folder / f"{contender.name}.log",
    )
    try:
        process.wait_until(lambda: _is_healthy(port), 20, "an answer to GET /healthz")
    except BaseException:
        process.stop()
        raise
    return process


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
