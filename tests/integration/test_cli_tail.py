"""`events tail`: what comes is seen at once, and what became of it, over an outage of Redis too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from app.dev.valkey import Valkey
from tests.eventually import eventually
from tests.integration.desk import MUSEUM, WORKER, Desk, open_desk, order

PATIENCE = 20.0


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    return open_desk(redis_client, redis_url, tmp_path)


class Tailing:
    """A running `events tail`, read by what it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process = process
        self._out = out
        self._err = err

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def objects(self, count: int) -> list[Any]:
        """Return what was printed as objects, once there are so many."""
        lines = eventually(
            lambda: found if len(found := self.out.splitlines()) >= count else [], PATIENCE, what=f"{count} lines"
        )
        return [json.loads(line) for line in lines]


@contextmanager
def tailing(desk: Desk, *options: str) -> Iterator[Tailing]:
    """Follow from the very beginning, so that no test waits for the start."""
    out, err = desk.folder / "tail.out", desk.folder / "tail.err"
    command = [sys.executable, "-m", "app.cli", "events", "tail", "--since", "2000-01-01", *options]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(command, env=desk.env, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL)
    try:
        yield Tailing(process, out, err)
    finally:
        process.kill()
        process.wait(10)
        assert "Traceback" not in err.read_text()


def test_an_event_is_told_at_once_and_then_what_became_of_its_order(desk: Desk) -> None:
    with tailing(desk, "--json") as tail:
        desk.hear(order(1))
        assert [told["what"] for told in tail.objects(1)] == ["event"]

        desk.bring_home(order(1))
        event, became = tail.objects(2)

    assert (event["order_id"], event["company"], event["outcome"]) == (order(1).order_id, "venue", "queued")
    told = (became["what"], became["state"], became["status"], became["tickets"], became["revision"])
    assert told == ("outcome", "fetched", "Issued", 2, 1)
    assert 0 <= became["took_ms"] < PATIENCE * 1000


def test_what_is_parked_and_given_up_is_told_with_its_reason(desk: Desk) -> None:
    with tailing(desk) as tail:
        desk.hear(order(1), order(2))
        desk.give_up(order(1), "bad_request", 400)
        desk.ledger().fail_fetch(
            order(2),
            WORKER,
            desk.begin(order(2)),
            outcome="deferred",
            reason="unauthorized",
            http_status=401,
            wait_ms=9000,
        )
        eventually(lambda: "unauthorized" in tail.out and "bad_request" in tail.out, PATIENCE, what="both ends")

    assert f"{order(1).order_id} venue: dead after" in tail.out
    assert f"{order(2).order_id} venue: deferred after" in tail.out
    assert tail.out.count("deferred") == 1
    assert max(map(len, tail.out.splitlines())) < 100


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (("--status", "draft"), [2]),
        (("--company", "museum"), [3]),
        (("--outcome", "coalesced"), [1]),
        (("--order", order(4).order_id), [4]),
        (("--order", "cm-00000000", "--company", "museum"), [3]),
    ],
)
def test_only_what_was_asked_for_is_told(desk: Desk, options: tuple[str, ...], numbers: list[int]) -> None:
    desk.hear(order(1))
    desk.hear(order(1))
    desk.hear(order(2), status="Draft")
    desk.hear(order(3, MUSEUM))
    desk.hear(order(4))

    with tailing(desk, "--json", *options) as tail:
        found = tail.objects(len(numbers))

    assert [int(told["order_id"][-2:]) for told in found] == numbers


def test_an_earlier_time_to_begin_with_is_inclusive(desk: Desk) -> None:
    desk.redis.xadd("ota:events", {"company": order(1).company_id, "order": order(1).order_id}, id="946684799999-7")
    desk.redis.xadd("ota:events", {"company": order(2).company_id, "order": order(2).order_id}, id="946684800000-0")

    with tailing(desk, "--json", "--since", "2000-01-01T00:00:00Z") as tail:
        assert [told["order_id"] for told in tail.objects(1)] == [order(2).order_id]


def test_it_goes_on_where_it_was_when_redis_comes_back(own_valkey: Valkey, tmp_path: Path) -> None:
    """It says once that Redis is away and once that it is back, and no event is lost or told twice."""
    with Redis.from_url(own_valkey.url) as redis:
        desk = open_desk(redis, own_valkey.url, tmp_path)
        with tailing(desk, "--json") as tail:
            desk.hear(order(1))
            tail.objects(1)
            own_valkey.kill()
            eventually(lambda: "Waiting for it." in tail.err, PATIENCE, what="the remark")
            own_valkey.restart()
            desk.hear(order(2))
            found = tail.objects(2)

    assert [told["order_id"] for told in found] == [order(1).order_id, order(2).order_id]
    assert (tail.err.count("Waiting for it."), tail.err.count("Redis is back.")) == (1, 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_ends_silently_when_it_is_told_to(desk: Desk, number: int, code: int) -> None:
    desk.hear(order(1))
    with tailing(desk, "--json") as tail:
        tail.objects(1)
        os.kill(tail.process.pid, number)
        assert tail.process.wait(PATIENCE) == code

    assert tail.err == ""


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_reader_that_leaves_ends_it_silently(desk: Desk, form: tuple[str, ...]) -> None:
    desk.hear(order(1))
    command = [sys.executable, "-m", "app.cli", "events", "tail", "--since", "1h", *form]
    with subprocess.Popen(command, env=desk.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert order(1).order_id.encode() in running.stdout.readline()
        running.stdout.close()
        desk.hear(order(2))
        assert running.wait(PATIENCE) == 141
        assert running.stderr.read() == b""


def test_redis_away_at_the_start_is_exit_code_3(desk: Desk) -> None:
    ended = desk.run("events", "tail", REDIS_URL="redis://127.0.0.1:1/0")

    assert (ended.code, ended.out, len(ended.err.splitlines())) == (3, "", 1)
