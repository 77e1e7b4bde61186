"""The system under measurement: Valkey, a sandbox Channel Manager and `ota-receiver serve`, without workers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis

from app.dev import valkey
from app.dev.processes import Process, free_port
from app.dev.sandbox import process as sandbox
from app.dev.sandbox.process import Sandbox
from tests.benchmarks import contenders
from tests.benchmarks.contenders import CLIENT_STATE, COMPANY, ENVIRONMENT, RECEIVER, TENANT, WEBHOOK_PATH

SLOTS = 5


@dataclass(frozen=True)
class System:
    """Everything but the workers runs."""

    channel_manager: Sandbox
    company_id: str
    environment: dict[str, str]
    redis: Redis
    folder: Path
    url: str

    def issue(self, count: int) -> list[str]:
        """Return the ids of new orders that are Issued at the Channel Manager; no event is sent."""
        body = {"tenant": TENANT, "environment": ENVIRONMENT, "company": COMPANY, "count": count}
        return [row["order_id"] for row in self.channel_manager.admin("POST", "orders", body)["orders"]]

    def post(self, order_ids: Sequence[str], per_post: int = 1) -> None:
        """Send the events of the orders; raises httpx.HTTPStatusError unless all are answered 2xx."""
        for start in range(0, len(order_ids), per_post):
            batch = order_ids[start : start + per_post]
            body = contenders.body(batch, client_state=CLIENT_STATE, company_id=self.company_id)
            self.channel_manager.client.post(self.url, content=body).raise_for_status()

    def start(self, *arguments: str) -> Process:
        """Start `ota-receiver ARGUMENTS`, with its log in the folder; use it as a context manager."""
        log = self.folder / f"{arguments[0]}.log"
        return Process.start([*contenders.OURS, *arguments], env=self.environment, cwd=self.folder, log=log)

    def stats(self) -> Any:
        """Return the totals of the Channel Manager."""
        return self.channel_manager.admin("GET", "stats")

    def fetched(self) -> int:
        """Return the number of getOrder calls that were answered 200."""
        return int(self.stats()["operations"].get("getOrder", {}).get("200", 0))


@contextmanager
def system(latency_ms: int) -> Iterator[System]:
    """Start a system whose Channel Manager needs `latency_ms` for a getOrder and processes 5 at once."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(valkey.start(folder / "valkey"))
        options = ("--latency", str(latency_ms), "--slots", str(SLOTS))
        channel_manager = stack.enter_context(sandbox.start(seed=1, options=options))
        redis = stack.enter_context(Redis.from_url(server.url))
        port = free_port()
        company_id = channel_manager.company_id(TENANT, ENVIRONMENT, COMPANY)
        environment = contenders.settings(server.url, port, NP_BASE_URL=channel_manager.url, NP_COMPANY_ID=company_id)
        stack.enter_context(contenders.serve(RECEIVER, port, environment, folder))
        yield System(channel_manager, company_id, environment, redis, folder, f"http://127.0.0.1:{port}{WEBHOOK_PATH}")
