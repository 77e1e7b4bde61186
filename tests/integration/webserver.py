"""The web process as operators run it, `ota-receiver serve`, read by its log lines and by what it left in Redis."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from redis import Redis

from app.dev.processes import Process, free_port
from app.ids import OrderKey
from app.ledger import keys
from tests.eventually import eventually

COMPANY = "b56a418d-8205-4d3a-bdbb-25d94e42abbd"
SECRET = "canary-right-client-state"
FORMER_SECRET = "canary-former-client-state"
API_KEY = "canary-api-key"
OPS_TOKEN = "canary-ops-token"
HOOK = "/webhooks/ota-channel-manager"

SERVE = (sys.executable, "-m", "app.cli", "serve")


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

    def connect(self) -> socket.socket:
        """Return a bare connection, for what no proper client would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def lines(self) -> list[dict[str, Any]]:
        """Return every log line so far; raises ValueError if one is not JSON."""
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


class Kept:
    """The content of Redis, as text."""

    def __init__(self, redis: Redis) -> None:
        # Commands of redis-py are typed as any answer of a sync or async client, with or without decoding.
        self._redis: Any = redis

    def events(self) -> list[dict[str, str]]:
        """Return the fields of every stored event, oldest first."""
        return [_texts(fields) for _, fields in self._redis.xrange(keys.EVENTS)]

    def due(self) -> dict[OrderKey, int]:
        """Return the due time of every pending order, in ms."""
        return {OrderKey.of(one.decode()): int(at) for one, at in self._redis.zrange(keys.DUE, 0, -1, withscores=True)}

    def record(self, order: OrderKey) -> dict[str, str]:
        """Return the fields of an order's record, none if there is no record."""
        return _texts(self._redis.hgetall(keys.record(order)))

    def jobs(self, queue: str = "live") -> list[str]:
        """Return the ids of the jobs that wait."""
        return [one.decode() for one in self._redis.lrange(f"rq:queue:{queue}", 0, -1)]

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of a job's hash."""
        return _texts(self._redis.hgetall(f"rq:job:{job_id}"))

    def counters(self) -> dict[str, int]:
        """Return every counter by its field."""
        return {field: int(value) for field, value in _texts(self._redis.hgetall(keys.COUNTERS)).items()}

    def is_empty(self) -> bool:
        """Tell whether nothing at all is stored."""
        return not self._redis.dbsize()

    def names(self) -> set[str]:
        """Return the names of all keys."""
        return {name.decode() for name in self._redis.keys("*")}

    def forget(self) -> None:
        """Empty Redis; its scripts stay loaded."""
        self._redis.flushall()

    def everything(self) -> bytes:
        """Return names and values of all keys in one piece, to search for secrets."""
        self._redis.config_set("rdbcompression", "no")
        names = self._redis.keys("*")
        return b"".join([*names, *filter(None, map(self._redis.dump, names))])

    def script_calls(self, during: Callable[[], object]) -> int:
        """Return how many scripts ran during the call, once the server knows the script."""
        self._redis.config_resetstat()
        during()
        return int(self._redis.info("commandstats")["cmdstat_evalsha"]["calls"])


def _texts(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode(errors="replace") for name, value in fields.items()}


@contextmanager
def serving(folder: Path, settings: Mapping[str, str], program: Sequence[str] = SERVE) -> Iterator[Web]:
    """Run the web process with `settings` until the block ends; it is ready when /healthz says 200."""
    port = free_port()
    env = {**os.environ, **settings, "PORT": str(port)}
    with (
        Process.start(program, env=env, cwd=folder, log=folder / "web.log") as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as http,
    ):

        def lives() -> bool:
            try:
                return http.get("/healthz").status_code == 200
            except httpx.TransportError:
                return False

        process.wait_until(lives, 20, "/healthz says 200")
        yield Web(process, port, http)


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
