"""Labs with an upstream: the workers' own processor, and reconcile, over a real Redis and a real Channel Manager.

What the pool and RQ do between two jobs is done here in a few lines, so that hours pass in seconds.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from ssl import SSLContext
from threading import Event, Thread
from typing import Any, Final, cast
from urllib.parse import parse_qs, urlsplit

from app.deployment import Deployment
from app.dev.sandbox.process import Sandbox
from app.erased_file import ErasedFile
from app.erasure import Erasure
from app.ids import OrderKey
from app.ledger.keys import DEFAULT_PREFIX
from app.ledger.ledger import Ledger
from app.ledger.orders import Archive
from app.ledger.rate_limit import Limits, RateLimiter
from app.ledger.redis import Redis, for_worker
from app.ledger.rq_jobs import BACKFILL, LIVE, delivery_of, order_of, queue_key, sink_queue
from app.order_document import OrderDocument
from app.reconcile.run import OrderList, Reconcile, Report
from app.reconcile.state import Checkpoint
from app.traces import OFF, Tracer
from app.upstream.client import ChannelManager, Fetched
from app.upstream.transport import DeadlineTransport
from tests.lab import API_KEY, KEYS, LEASE, START, WORKER, Lab, company, content_of_answer
from workers.delivery import Deliverer
from workers.processor import Connection, Processor
from workers.sinks.contract import Context, Sink
from workers.sinks.output import SinkOutput

MINUTE: Final = 60_000
_API_VERSION: Final = "2026-08-21"


class WorkerLab(Lab):
    """One worker, one dispatcher and one company of the sandbox, under a clock of the test."""

    def __init__(
        self, url: str, sandbox: Sandbox, sinks: Mapping[str, Sink], requests_per_window: int, tracer: Tracer = OFF
    ) -> None:
        super().__init__(for_worker(url, DEFAULT_PREFIX), url, sinks=tuple(sinks), now=START)
        self.sandbox = sandbox
        self.company_id = sandbox.company_id()
        self.calls: list[int] = []
        self.runs = 0
        self._sinks, self._most, self._tracer = sinks, requests_per_window, tracer
        self._http = DeadlineTransport(5)
        # The Channel Manager of a module counts the requests of each key for five real minutes.
        self.use_key(secrets.token_hex(8))

    def use_key(self, api_key: str, erased_file: Path | None = None) -> None:
        """Start a worker with this key."""
        settings = company("venue", self.company_id, "Sandbox", "sandbox", api_key=api_key)
        limits = Limits(concurrency=5, backfill_concurrency=1, requests_per_window=self._most, permit_lease=LEASE)
        client = ChannelManager(self._http, settings, _API_VERSION, self.sandbox.url, self._tracer)
        get_order = client.get_order

        def noted(order_id: str) -> Fetched:
            self.calls.append(self.now)
            self.now += 1
            return get_order(order_id)

        client.get_order = noted  # type: ignore[method-assign]
        self.limiter = RateLimiter(self.redis, api_key, settings.path, limits, clock=self.clock)
        self.connection = Connection("venue", client, self.limiter)
        self.erasure = Erasure(self.redis, order_days=400, file=ErasedFile(erased_file))
        self.processor = Processor(
            self.ledger,
            Deployment(self.redis),
            {self.company_id: self.connection},
            self.erasure,
            self._tracer,
        )
        self.deliverer = self.deliver_to({})

    def deliver_to(self, filters: Mapping[str, Callable[[str, str], str]]) -> Deliverer:
        """Return what delivers to the sinks, of which some may have a filter (SinkSettings.unwanted)."""
        every = {name: filters.get(name, lambda company, status: "") for name in self._sinks}
        return Deliverer(self.ledger, self._sinks, every, lambda _: "venue", self.erasure, SinkOutput(), self._tracer)

    def issue(self, count: int = 1) -> list[OrderKey]:
        """Make issued orders at the Channel Manager, and accept their events."""
        made = self.sandbox.admin("POST", "orders", {"count": count, "events": 0})["orders"]
        orders = [OrderKey(self.company_id, row["order_id"]) for row in made]
        self.accept(*orders)
        return orders

    def fault(self, **fault: Any) -> None:
        """Put a rule into force at the Channel Manager instead of all others."""
        self.sandbox.admin("PUT", "faults", {"operation": "getOrder", **fault})

    def clear_faults(self) -> None:
        self.sandbox.admin("DELETE", "faults")

    def work(self) -> None:
        """Do every job that waits."""
        queues = {LIVE: "", BACKFILL: "", **{sink_queue(sink): sink for sink in self.sinks}}
        while jobs := [(job.decode(), sink) for queue, sink in queues.items() for job in self._pop(queue)]:
            for job, sink in jobs:
                if order := order_of(job):
                    self.runs += 1
                    self.processor.process(order, WORKER)
                elif delivery := delivery_of(job):
                    self.deliverer.process(delivery[0], sink, WORKER)

    def _pop(self, queue: str) -> list[bytes]:
        return cast("list[bytes] | None", self.redis.lpop(queue_key(queue, KEYS), 500)) or []

    def run_for(self, seconds: float) -> None:
        """Let time pass; whenever something is due, dispatch and work."""
        until = self.now + round(seconds * 1000)
        self.work()
        while self.now <= until and (soonest := self._soonest()) is not None and soonest <= until:
            # A pool dispatches each second.
            self.now = max(self.now, -(-soonest // 1000) * 1000)
            if not self.dispatch():
                self.now += 1000
            self.work()
        self.now = max(self.now, until)

    def _soonest(self) -> int | None:
        clocks = (KEYS.due, *map(KEYS.deliveries, self.sinks))
        first = [one for clock in clocks for one in self._read.zrange(clock, 0, 0, withscores=True)]
        return min((int(score) for _, score in first), default=None)

    def close(self) -> None:
        self._http.close()
        self.redis.close()


class Shop:
    """A sink that accepts everything, or does first what `trouble` does for an order."""

    package = "tests"

    def __init__(self, trouble: Callable[[str], None] = lambda order_id: None) -> None:
        self.received: list[str] = []
        self.called: list[str] = []
        self.trouble = trouble

    def deliver(self, document: OrderDocument, context: Context) -> None:
        self.called.append(document.order_id)
        self.trouble(document.order_id)
        self.received.append(document.order_id)


@contextmanager
def worker_lab(
    url: str,
    sandbox: Sandbox,
    sinks: Mapping[str, Sink] | None = None,
    requests_per_window: int = 6000,
    tracer: Tracer = OFF,
) -> Iterator[WorkerLab]:
    """Open a lab on an empty Redis and a Channel Manager without faults."""
    sandbox.admin("DELETE", "faults")
    lab = WorkerLab(url, sandbox, sinks or {}, requests_per_window, tracer)
    lab.redis.flushall()
    try:
        yield lab
    finally:
        lab.close()


class ReconcileLab(Lab):
    """One company `tenant`/Production/Museum of the Channel Manager at `url`. Its time is the real one until set."""

    def __init__(self, redis: Redis, http: DeadlineTransport, url: str, tenant: str, company_id: str) -> None:
        super().__init__(redis, sinks=())
        self.company_id = company_id
        self.per_minute: float = 1200
        self.page_size = 1000
        self._settings = company("venue", company_id, "Museum", tenant, "Production")
        self.client = ChannelManager(http, self._settings, _API_VERSION, url)
        self.erased = ErasedFile(None)
        self.now = self.now  # only the test moves it

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.redis, self.company_id)

    @property
    def limiter(self) -> RateLimiter:
        limits = Limits(concurrency=5, backfill_concurrency=1, requests_per_window=6000, permit_lease=LEASE)
        return RateLimiter(self.redis, API_KEY, self._settings.path, limits, route="list_orders", clock=self.clock)

    def key(self, order_id: str) -> OrderKey:
        return OrderKey(self.company_id, order_id)

    def reconcile(self, ledger: Ledger | None = None) -> Reconcile:
        """Return a run as the worker builds it, with the clock of the test."""
        return Reconcile(
            self._settings.slug,
            OrderList(
                self.redis,
                self.company_id,
                self.client,
                self.limiter,
                order_days=400,
                erased=self.erased,
                clock=self.clock,
                pause=self.later,
                page_size=self.page_size,
            ),
            ledger or self.ledger,
            Archive(self.redis),
            per_minute=self.per_minute,
            company_ids=frozenset({self.company_id}),
            queue="backfill",
        )

    def run(self) -> Report:
        return self.reconcile().run()

    def fetch_backfill(self) -> None:
        """Fetch all orders in backfill, as workers do."""
        for key in map(self.key, self.queued(BACKFILL)):
            _, fetch, _ = self.ledger.start_fetch(key, WORKER)
            if fetch is not None:
                found = self.client.get_order(key.order_id)
                recheck_ms = None if found.order.settled else 2 * MINUTE
                self.ledger.store_fetch(key, WORKER, fetch, content_of_answer(found.raw), recheck_ms=recheck_ms)
        self.clear_queues()


def forked(call: Callable[[], object]) -> int:
    """Run `call` in a forked process; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
        finally:
            os._exit(0)
    return pid


def exit_code(pid: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


Reply = Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Asked:
    """One request as received."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.target).query).items()}


@dataclass
class Upstream:
    """A Channel Manager whose answers a test writes: it gives the `replies` in turn and repeats the last one."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    callers: set[tuple[str, int]] = field(default_factory=set)
    over: Event = field(default_factory=Event)

    @property
    def port(self) -> str:
        return self.url.rpartition(":")[2]

    def will(self, *replies: Reply) -> None:
        self.replies[:] = replies

    def slowly(self, *first: bytes, then: bytes, every: float) -> Reply:
        """Send `first` at once, and `then` again and again each `every` seconds, a hundred times."""

        def pieces() -> Iterator[bytes]:
            yield from first
            for _ in range(100):
                if self.over.wait(every):
                    return
                yield then

        return pieces


def says(status: int = 200, body: bytes = b"", **headers: str) -> Reply:
    """Reply with a complete answer; a header named `retry_after` is sent as `retry-after`."""
    lines = [f"HTTP/1.1 {status} Because", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def raw(*pieces: bytes) -> Reply:
    return lambda: pieces


def says_json(tree: object, status: int = 200, **headers: str) -> Reply:
    return says(status, json.dumps(tree).encode(), **headers)


@contextmanager
def fake_upstream(tls: SSLContext | None = None) -> Iterator[Upstream]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client closes the connection of an answer that it refuses
                super().handle()

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            fake.asked.append(Asked(self.command, self.path, headers, body))
            fake.callers.add(self.client_address)
            reply = fake.replies.pop(0) if len(fake.replies) > 1 else fake.replies[0]
            self.close_connection = True  # whatever is not a complete answer ends with the connection
            with suppress(OSError):
                for piece in reply():
                    self.wfile.write(piece)
                    self.close_connection = b"\r\ncontent-length: " not in piece  # as `says` writes it

        do_GET = do_POST = do_DELETE = answer  # noqa: N815  # names that http.server looks for

        def log_message(self, *_: object) -> None:
            """Write nothing to the output of the test."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        fake = Upstream(f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield fake
        finally:
            fake.over.set()
            server.shutdown()
            thread.join()
