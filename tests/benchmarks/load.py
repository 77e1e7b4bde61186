"""Load for a receiver, and its cost: wrk for as much as it can take, and from this process what wrk cannot do.

`drive` sends prepared bytes over raw sockets: a fixed number of requests, as fast as they are answered, or at a
constant rate whatever the answers do. A latency at a constant rate counts from the time at which the request was due.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from selectors import EVENT_READ, SelectSelector
from socket import IPPROTO_TCP, TCP_NODELAY, create_connection, socket
from typing import Final

from tests.service import item, missing_of, post

MARKER: Final = "#" * 12
"""Stands in a body where the number of the request belongs."""

_ANSWER_WITHIN: Final = 30.0


@dataclass(frozen=True)
class Answers:
    """What came of a load. `refused` have a status other than 200, `broken` are requests without an answer."""

    requests: int
    seconds: float
    refused: int
    broken: int
    p50_ms: float
    p99_ms: float

    @property
    def acknowledged(self) -> int:
        """Return the number of requests that were answered with 200."""
        return self.requests - self.refused


def body_of(events: int) -> str:
    """Return a body of as many events, each of an order whose id ends with MARKER."""
    values = [item(f"{index:08x}-0000-4000-8000-{MARKER}") for index in range(events)]
    return json.dumps({"values": values}, separators=(",", ":"))


def requests_of(body: str, first: int, count: int) -> Iterator[bytes]:
    """Yield the body as `count` POSTs, numbered from `first` on."""
    whole = post(body.encode(), "content-type: application/json")
    yield from (whole.replace(MARKER.encode(), b"%012d" % number) for number in range(first, first + count))


def wrk(url: str, body_file: Path, seconds: int, connections: int = 32, first: int = 0) -> Answers:
    """Post the body for `seconds`, numbering the requests from `first` + 1 on; one thread of wrk sends them."""
    script = str(Path(__file__).with_name("load.lua"))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", script, url]
    done = subprocess.run([*command, "--", str(body_file), str(first)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Answers(
        found["requests"],
        found["microseconds"] / 1e6,
        found["refused"],
        found["broken"],
        found["p50_us"] / 1e3,
        found["p99_us"] / 1e3,
    )


def drive(port: int, requests: Iterable[bytes], connections: int = 32, rate: float = 0) -> Answers:
    """Send every request, `rate` a second if one is given, and return when all are answered.

    Each connection has one request at a time. A request that is due while all wait for an answer is sent later. Raises
    ConnectionError when a connection ends, and TimeoutError after 30 s without an answer.
    """
    left, sent, answers = iter(requests), 0, dict[socket, tuple[float, bytes]]()
    latencies: list[float] = []
    refused, following = 0, next(left, None)
    with ExitStack() as opened:
        selector = opened.enter_context(SelectSelector())
        idle = deque(opened.enter_context(create_connection(("127.0.0.1", port))) for _ in range(connections))
        for connection in idle:
            connection.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
            selector.register(connection, EVENT_READ)
        started = time.perf_counter()
        while following is not None or answers:
            now = time.perf_counter()
            while following is not None and idle and (due := started + sent / rate if rate else now) <= now:
                connection = idle.popleft()
                connection.sendall(following)
                answers[connection] = (due, b"")
                sent, following = sent + 1, next(left, None)
            is_early = following is not None and idle
            ready = selector.select(max(due - time.perf_counter(), 0) if is_early else _ANSWER_WITHIN)
            if not ready and not is_early:
                raise TimeoutError(f"no answer within {_ANSWER_WITHIN:g} s")
            for key, _ in ready:
                connection = key.fileobj  # type: ignore[assignment]  # only sockets are registered
                if not (part := connection.recv(65536)):
                    raise ConnectionError("the receiver closed a connection")
                due, answer = answers[connection]
                answers[connection] = due, answer = due, answer + part
                if not missing_of(answer):
                    del answers[connection]
                    idle.append(connection)
                    latencies.append(time.perf_counter() - due)
                    refused += not answer.startswith(b"HTTP/1.1 200 ")
        seconds = time.perf_counter() - started
    latencies.sort()
    p50, p99 = (latencies[len(latencies) * percent // 100] * 1e3 for percent in (50, 99))
    return Answers(len(latencies), seconds, refused, 0, p50, p99)


class Spent:
    """The CPU seconds that a process used within the block of `spending`."""

    def __init__(self) -> None:
        self.seconds = 0.0


@contextmanager
def spending(pid: int) -> Iterator[Spent]:
    """Yield what will be the CPU time that a process uses in this block, with all threads that live at both ends."""
    spent, before = Spent(), cpu_seconds(pid)
    yield spent
    spent.seconds = cpu_seconds(pid) - before


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process with its threads, to the nanosecond; those that have ended do not count."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
