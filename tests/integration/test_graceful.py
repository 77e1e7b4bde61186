"""The web process stops: started requests are answered, and acknowledged events are in Redis."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest

from app.dev.processes import Process, free_port
from app.dev.valkey import Valkey
from app.ledger.redis import Redis
from app.web.server import LAST_SECONDS
from tests.eventually import eventually
from tests.lab import Lab
from tests.service import (
    SERVE,
    Web,
    good,
    item,
    missing_of,
    post,
    read_all,
    read_answer,
    serve_changed,
    serving,
    settings_of_one_company,
    statuses,
)

STOPS_BEFORE_ITS_END = """
import os, signal
from app.web.server import Server
shutdown = Server.shutdown
async def stop_and_shutdown(*arguments, **named):
    os.kill(os.getpid(), signal.SIGSTOP)
    await shutdown(*arguments, **named)
Server.shutdown = stop_and_shutdown
"""


@pytest.fixture
def web(redis_url: str, tmp_path: Path) -> Iterator[Web]:
    with serving(tmp_path, settings_of_one_company(redis_url)) as running:
        yield running


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT] * 3, [signal.SIGTERM, signal.SIGINT]])
def test_started_requests_are_answered_despite_many_signals(web: Web, lab: Lab, signals: list[signal.Signals]) -> None:
    """A terminal and a supervisor both pass Ctrl-C on."""
    request, request_of_the_head = post(good()), post(good())
    with web.connect() as half_a_body, web.connect() as half_a_head, web.connect() as warm:
        half_a_body.sendall(request[:-10])
        half_a_head.sendall(request_of_the_head[:20])
        warm.sendall(post(good()))
        assert statuses(read_answer(warm)) == [200]

        for number in signals:
            os.kill(web.process.pid, number)
        eventually(lambda: not web.listens(), what="the port is closed")
        half_a_head.sendall(request_of_the_head[20:])
        warm.sendall(post(good()))
        web.process.wait_for_line("Waiting for connections to close", 5)
        for number in signals:
            os.kill(web.process.pid, number)
        half_a_body.sendall(request[-10:])
        answers = [read_all(connection) for connection in (half_a_body, half_a_head, warm)]

    assert web.process.wait(10) == 0
    assert [statuses(answer) for answer in answers] == [[200]] * 3
    assert all(b"connection: close" in answer for answer in answers)
    assert len(lab.events()) == 4
    # The lifespan ended once, as after one signal: counters are written and connections closed.
    ended = [line["event"] for line in web.lines()]
    assert (ended.count("Application shutdown complete."), ended[-1]) == (1, "service.stopped")


def test_a_body_that_does_not_arrive_is_503_and_the_process_ends_within_ten_seconds(
    redis_url: str, lab: Lab, tmp_path: Path
) -> None:
    """`docker stop` kills after 10 s. One second stands for LAST_SECONDS."""
    program = serve_changed("from app.web import server; server.LAST_SECONDS = 1")
    with serving(tmp_path, settings_of_one_company(redis_url), program) as web, web.connect() as connection:
        started = time.monotonic()
        connection.sendall(post(good(), "content-length: 5000"))
        eventually(lambda: web.http.get("/healthz").status_code == 200, what="the process lives")
        os.kill(web.process.pid, signal.SIGTERM)
        answer = read_all(connection).lower()

        assert web.process.wait(10) == 0
    assert time.monotonic() - started - 1 + LAST_SECONDS < 10
    assert statuses(answer.upper()) == [503]
    assert b"retry-after: 5\r\n" in answer
    assert b'"reason":"shutting_down"' in answer
    assert not lab.events()


def test_idle_connections_do_not_delay_the_end(web: Web) -> None:
    with web.connect() as silent, web.connect() as warm:
        warm.sendall(post(good()))
        assert statuses(read_answer(warm)) == [200]
        started = time.monotonic()
        os.kill(web.process.pid, signal.SIGTERM)

        assert web.process.wait(10) == 0
        assert time.monotonic() - started < 6
        assert (silent.recv(100), warm.recv(100)) == (b"", b"")


def test_connections_that_wait_to_be_accepted_when_it_ends_are_answered(
    redis_url: str, lab: Lab, tmp_path: Path
) -> None:
    """uvicorn alone closes the port and the kernel resets them."""
    with serving(tmp_path, settings_of_one_company(redis_url), serve_changed(STOPS_BEFORE_ITS_END)) as web:
        os.kill(web.process.pid, signal.SIGTERM)
        stat = Path(f"/proc/{web.process.pid}/stat")
        eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", what="it is about to end")
        waiting = [web.connect() for _ in range(10)]
        for connection in waiting:
            connection.sendall(post(good()))
        web.process.resume()
        answers = [read_all(connection) for connection in waiting]
        for connection in waiting:
            connection.close()

        assert web.process.wait(10) == 0
    assert [statuses(answer) for answer in answers] == [[200]] * 10
    assert len(lab.events()) == 10


def test_a_signal_while_it_starts_is_not_lost(redis_url: str, tmp_path: Path) -> None:
    """It ends at once by the signal, or after a clean shutdown."""
    for line in ("service.started", "Started server process", "Application startup complete"):
        env = {**os.environ, **settings_of_one_company(redis_url), "PORT": str(free_port())}
        with Process.start(SERVE, env=env, log=tmp_path / f"{len(line)}.log") as process:
            process.wait_for_line(line, 20)
            os.kill(process.pid, signal.SIGTERM)

            assert process.wait(20) in {0, -signal.SIGTERM}


@dataclass
class Sender:
    """Sends one event after the other; keeps the acknowledged orders and how each request ended."""

    port: int
    keeps_alive: bool
    acknowledged: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def run(self, until: threading.Event) -> None:
        connection: socket.socket | None = None
        while not until.is_set():
            order = str(uuid4())
            try:
                connection = connection or socket.create_connection(("127.0.0.1", self.port), timeout=10)
                answer = self._send(connection, order)
            except ConnectionError as error:
                answer, outcome = b"", f"connect {type(error).__name__}"
            else:
                half = "half an answer" if answer else "no byte"
                outcome = half if missing_of(answer) else str(statuses(answer)[0])
            self.outcomes[outcome] += 1
            if outcome == "200":
                self.acknowledged.append(order)
            if connection and (outcome != "200" or b"connection: close" in answer.lower()):
                connection.close()
                connection = None
            if outcome != "200":
                until.wait(0.005)
        if connection:
            connection.close()

    def _send(self, connection: socket.socket, order: str) -> bytes:
        options = () if self.keeps_alive else ("connection: close",)
        with suppress(ConnectionError):
            connection.sendall(post(json.dumps({"values": [item(order)]}).encode(), *options))
        return read_answer(connection)


@contextmanager
def sending(port: int, senders: list[Sender]) -> Iterator[None]:
    until = threading.Event()
    with ThreadPoolExecutor(len(senders)) as threads:
        try:
            for sender in senders:
                threads.submit(sender.run, until)
            yield
        finally:
            until.set()


def test_a_rolling_restart_under_load_loses_no_acknowledged_event(own_valkey: Valkey, tmp_path: Path) -> None:
    """Each request ends with 200, or its connection is refused or closed before the first byte of an answer."""
    port = free_port()
    env = {**os.environ, **settings_of_one_company(own_valkey.url), "PORT": str(port)}
    senders = [Sender(port, keeps_alive) for keeps_alive in (True, False) for _ in range(4)]

    def answered() -> int:
        return sum(sender.outcomes["200"] for sender in senders)

    def more_than(count: int) -> Callable[[], bool]:
        return lambda: answered() > count

    with sending(port, senders):
        for _ in range(4):
            with Process.start(SERVE, env=env, log=tmp_path / "web.log") as web:
                eventually(more_than(answered() + 200), 20, what="events are answered")
                assert web.stop() == 0

    outcomes = sum((sender.outcomes for sender in senders), Counter[str]())
    assert outcomes.keys() <= {"200", "connect ConnectionRefusedError", "connect ConnectionResetError", "no byte"}
    # Those that came between the last look and the close: on a busy machine up to all that send without keep-alive.
    assert outcomes["no byte"] <= 4 * 4
    with Redis.from_url(own_valkey.url) as redis:
        stored = {event["order"] for event in Lab(redis).events()}
    assert {order for sender in senders for order in sender.acknowledged} <= stored
