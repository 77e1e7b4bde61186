"""The sinks of a run, whose destinations fail in every way, and the check of what each got.

They deliver over HTTP to a recorder in this process, which no kill strikes: what it has taken is not forgotten.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, pairwise
from pathlib import Path
from socket import socket
from threading import Lock, Thread
from time import monotonic
from typing import Any, Final

from standardwebhooks import Webhook

from app.upstream.decode import digest
from tests.chaos.plan import Plan
from tests.service import Service, children

SINKS: Final = ("shop", "warehouse")
REFUSING: Final = "warehouse"
"""It refuses one order until that is a dead letter."""

_SECRET: Final = f"whsec_{b64encode(bytes(range(32))).decode()}"
_TABLES: Final = f"""
[sinks.shop]
kind = "https"
url = "{{url}}/shop"
secret = "{_SECRET}"
allow_private = true

[sinks.warehouse]
kind = "python"
function = "chaos_sink:deliver"
"""

_TIME_LIMIT: Final = 1.0
"""Seconds until the Python sink ends a request without an answer."""

_LONGEST_HOLD: Final = 2.0
"""Seconds after which the recorder closes the connection of a request that it holds: the kind https waits longer."""

FAILURES: Final = ("status", "status", "status", "hang", "late", "kill")
"""What the revisions of a sink meet, once: 500; no answer in time and nothing taken; taken, but no answer in time;
taken, but the process that delivers is killed before the answer."""

_STRETCHES: Final = ((0.10, 0.35), (0.45, 0.70))
"""A sink starts to answer 500 to everything when it has had so many revisions, as a share of the orders."""

_STRETCH: Final = 0.08
"""How long that lasts, as a share of the run."""

_SOURCE: Final = """
import urllib.request
from urllib.error import HTTPError

import msgspec

from workers.sinks import Reject

def deliver(order, context):
    headers = {{"content-type": "application/json", "webhook-id": context.idempotency_key}}
    body = msgspec.json.encode({{"data": {{"order": order}}}})
    try:
        urllib.request.urlopen(urllib.request.Request("{url}/warehouse", body, headers), timeout={limit}).close()
    except HTTPError as error:
        error.close()
        if error.code == 422:
            raise Reject("refused") from None
        raise
"""


@dataclass(frozen=True)
class Content:
    """What upstream answered for an order: as much of its digest as an idempotency key has, and ticket numbers."""

    digest: str
    tickets: tuple[str, ...]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Content:
        return cls(digest(json.dumps(answer).encode())[:12], _tickets(answer))


@dataclass(frozen=True, order=True)
class Taken:
    """One request that the recorder took; `number` grows with the time at which its connection was accepted."""

    number: int
    order_id: str
    revision: int
    digest: str
    tickets: tuple[str, ...]
    body_digest: str


@dataclass
class Sink:
    """One sink as its destination sees it."""

    name: str
    taken: list[Taken] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)

    @property
    def repeats(self) -> int:
        """Return how many requests brought a revision that had been taken before."""
        return len(self.taken) - len({(one.order_id, one.revision) for one in self.taken})

    def by_order(self) -> dict[str, list[Taken]]:
        """Return what was taken of each order, in the order in which it came."""
        found: dict[str, list[Taken]] = {}
        for one in sorted(self.taken):
            found.setdefault(one.order_id, []).append(one)
        return found

    def lost(self, upstream: Mapping[str, Sequence[Content]]) -> list[str]:
        """Return the orders whose latest content it never got; `upstream`: the contents of each, oldest first."""
        taken = self.by_order()
        return [
            order_id
            for order_id, contents in upstream.items()
            if contents[-1].digest not in {one.digest for one in taken.get(order_id, [])}
        ]

    def out_of_order(self) -> list[str]:
        """Return the orders of which an older revision came after a newer one."""
        return [
            order_id
            for order_id, taken in self.by_order().items()
            if any(after.revision < before.revision for before, after in pairwise(taken))
        ]

    def problems(self, upstream: Mapping[str, Sequence[Content]]) -> Iterator[str]:
        """Yield everything that must not be, line by line."""
        yield from (f"{self.name} never got the latest content of {one}" for one in self.lost(upstream))
        taken = self.by_order()
        for one in self.out_of_order():
            yield f"{self.name} got {one} out of order: {[each.revision for each in taken[one]]}"
        for order_id, requests in taken.items():
            if {Content(one.digest, one.tickets) for one in requests} - {*upstream.get(order_id, ())}:
                yield f"{self.name} got content of {order_id} that upstream never had"
            if len({(one.digest, one.body_digest) for one in requests}) > len({one.revision for one in requests}):
                yield f"{self.name} got one revision of {order_id} with different keys or contents"


class Recorder(ThreadingHTTPServer):
    """Takes the requests of every sink, whose path is its name, and fails as its seed says."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, plan: Plan, seconds: float, failures: int) -> None:
        """Listen; `seconds` is the length of the run, `failures` how often each of FAILURES strikes, about.

        Half of them strike orders with two settlements, of which there are few: a newer revision may come meanwhile.
        """
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sinks: Final = {name: Sink(name) for name in SINKS}
        self._twice = [order_id for order_id, events in plan.settlements.items() if len(events) > 1]
        #: The order that REFUSING refuses as long as `refuses`.
        self.refused: Final = self._twice[0]
        self.refuses = True
        self._numbers = count()
        self._lock = Lock()
        self._seen: dict[str, set[str]] = {name: set() for name in SINKS}
        orders = {True: len(self._twice), False: len(plan.settlements) - len(self._twice)}
        self._drawn = {
            (name, twice): _failures(random.Random(f"{plan.seed} {name} {twice}"), 2 * count // failures)
            for name in SINKS
            for twice, count in orders.items()
        }
        rng = random.Random(plan.seed)
        self._starts = {name: [rng.uniform(*one) * len(plan.settlements) for one in _STRETCHES] for name in SINKS}
        self._stretch = _STRETCH * seconds
        self._down_until = dict.fromkeys(SINKS, 0.0)

    def get_request(self) -> tuple[socket, Any]:
        """Accept a connection; its address gets a number.

        The threads may read the requests in another order: one of a process that was killed, the next of its successor.
        """
        connection, address = super().get_request()
        return connection, (*address, next(self._numbers))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless only the sender died or waited no longer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def failure(self, sink: str, key: str) -> str:
        """Return the failure that this request meets, "" for none, and count it."""
        with self._lock:
            found = self._failure(sink, key)
            self.sinks[sink].injected.update([found] if found else [])
        return found

    def _failure(self, sink: str, key: str) -> str:
        if sink == REFUSING and self.refuses and self.refused in key:
            return "refuse"
        if self._starts[sink] and len(self._seen[sink]) > self._starts[sink][0]:
            del self._starts[sink][0]
            self._down_until[sink] = monotonic() + self._stretch
        if monotonic() < self._down_until[sink]:
            return "down"
        if key in self._seen[sink]:
            return ""
        self._seen[sink].add(key)
        return next(self._drawn[sink, key.split("/")[1] in self._twice])


def _failures(rng: random.Random, share: int) -> Iterator[str]:
    """Yield what each revision meets that comes for the first time: each failure once in `share` revisions."""
    while True:
        block = [*FAILURES, *[""] * (share - len(FAILURES))]
        rng.shuffle(block)
        yield from block


class _Handler(BaseHTTPRequestHandler):
    server: Recorder
    client_address: Any

    def do_POST(self) -> None:
        """Take the request, or fail it."""
        length = int(self.headers["content-length"])
        body = self.rfile.read(length)
        if len(body) < length:  # its sender died
            return
        sink, key = self.path.strip("/"), self.headers["webhook-id"]
        if "webhook-signature" in self.headers:
            Webhook(_SECRET).verify(body, dict(self.headers))
        failure = self.server.failure(sink, key)
        if failure in {"", "late", "kill"}:
            _, order_id, revision, content = key.split("/")
            order = json.loads(body)["data"]["order"]
            tickets, canonical = _tickets(order), json.dumps(order, sort_keys=True).encode()
            taken = Taken(
                self.client_address[2], order_id, int(revision), content, tickets, sha256(canonical).hexdigest()
            )
            self.server.sinks[sink].taken.append(taken)
        if failure == "kill":
            _kill_owner(self.client_address[1])
        if failure in {"hang", "late", "kill"}:
            self._hold()
        else:
            self._answer({"": 200, "refuse": 422}.get(failure, 500))

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def _hold(self) -> None:
        """Answer when the sender has ended the connection; after _LONGEST_HOLD end it without an answer."""
        self.connection.settimeout(_LONGEST_HOLD)
        with suppress(TimeoutError):
            self.connection.recv(1)
            self._answer(200)


def table(sinks: Iterable[Sink], upstream: Mapping[str, Sequence[Content]], dead: Counter[str]) -> str:
    """Return the figures of each sink, a line each; `dead`: how many dead letters each had that were requeued."""
    rows: list[tuple[str, ...]] = [
        ("sink", "deliveries", "repeats", "orders", "dead, requeued", "lost", "out of order", "failures injected")
    ]
    for one in sinks:
        counts = len(one.taken), one.repeats, len(one.by_order()), dead[one.name]
        faults = len(one.lost(upstream)), len(one.out_of_order())
        failures = ", ".join(f"{name} {count}" for name, count in sorted(one.injected.items()))
        rows.append((one.name, *map(str, (*counts, *faults)), failures or "none"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@contextmanager
def recording(service: Service, plan: Plan, seconds: float, failures: int) -> Iterator[Recorder]:
    """Declare the sinks of the service and serve their requests as long as the block lasts."""
    with Recorder(plan, seconds, failures) as recorder:
        url = f"http://127.0.0.1:{recorder.server_address[1]}"
        (service.folder / "chaos_sink.py").write_text(_SOURCE.format(url=url, limit=_TIME_LIMIT))
        (service.folder / "sinks.toml").write_text(_TABLES.format(url=url))
        service.variables["SINKS_FILE"] = str(service.folder / "sinks.toml")
        thread = Thread(target=recorder.serve_forever, daemon=True)
        thread.start()
        try:
            yield recorder
        finally:
            recorder.shutdown()
            thread.join()


def _tickets(order: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the numbers of all tickets and coupons, sorted."""
    wallets = [wallet for item in order.get("items", ()) for wallet in item.get("wallets", ())]
    return tuple(sorted(asset["referenceNumber"] for wallet in wallets for asset in wallet.get("assets", ())))


def _kill_owner(port: int) -> None:
    """Kill the process, of those that we started, whose end of a connection has this port; it may be dead already."""
    with suppress(OSError):
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        sockets = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}")}
        for pid in _descendants(os.getpid()):
            with suppress(FileNotFoundError):
                if sockets & {os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir()}:
                    os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from _descendants(child)
