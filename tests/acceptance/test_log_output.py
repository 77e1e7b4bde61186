"""A log that has no reader, or loses it, costs lines and no order."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.service import Service, ask


@pytest.fixture
def pipe(bare: Service) -> Path:
    """A named pipe that stands for the log of the next command."""
    path = bare.folder / "pipe"
    os.mkfifo(path)
    return path


def read(reader: int) -> bytes:
    """Return what the pipe holds, b"" when that is nothing."""
    try:
        return os.read(reader, 1 << 20)
    except BlockingIOError:
        return b""


def test_workers_go_on_when_the_reader_of_their_log_is_gone(bare: Service, pipe: Path) -> None:
    """`ota-receiver worker | head`, or a log shipper that died; what was lost is reported when one reads again."""
    bare.start("web")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    pool = bare.run(
        ["sh", "-c", f"exec ota-receiver worker > {pipe}"],
        "sh.log",
        WORKERS="1",
        BACKFILL_WORKERS="1",
        SINKS="python:operator:is_",
    )
    eventually(lambda: b"pool.worker_started" in read(reader), what="the pool works")
    os.close(reader)

    order_ids = bare.issue(5)
    for order_id in order_ids:
        bare.post(bare.event(order_id))
    explained = partial(bare.cli, "orders", "explain")
    eventually(lambda: all(explained(one)[0] == 0 for one in order_ids), 20, what="all are fetched")
    assert pool.exit_code is None

    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    # A process reports with its second line, and a worker writes one for each order.
    for order_id in bare.issue(3):
        bare.post(bare.event(order_id))
    text = b""

    def reported() -> list[int]:
        nonlocal text
        text += read(reader)
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
        return [line["lines"] for line in lines if line["event"] == "log.lines_lost"]

    eventually(lambda: sum(reported()) >= 5, what="the lost lines are reported")
    os.close(reader)


def test_web_answers_when_the_reader_of_its_log_does_not_read(bare: Service, pipe: Path) -> None:
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    web = bare.run(["sh", "-c", f"exec ota-receiver serve > {pipe}"], "sh.log")
    eventually(bare.web_listens, what="web listens")

    answers = [bare.post(bare.event(f"00000000-0000-4000-8000-{number:012}"))[0] for number in range(400)]

    assert set(answers) == {200}
    assert ask("GET", f"{bare.web_url}/healthz")[0] == 200
    assert len(read(reader)) >= 60_000, "the pipe was full"
    assert web.exit_code is None
    os.close(reader)
