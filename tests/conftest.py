"""What tests of every kind share: a Valkey of their own, free ports, and an environment without our settings."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.dev import processes
from app.dev.valkey import Valkey, start
from app.ledger.redis import Redis
from tests.command import without_settings


def pytest_configure() -> None:
    """Make a run the same wherever it was started: every process that a test starts inherits what is set here.

    Settings of the shell must not reach a test, nor a test a real Redis. A script's `&`, nohup and cron ignore SIGINT,
    and an ignored signal stays ignored in every child.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in os.environ.keys() - without_settings(os.environ).keys():
        del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file that takes longest: at the end it would leave the other cores idle."""
    items.sort(key=lambda item: item.path.name != "test_spool.py")


@pytest.fixture(scope="session")
def server_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with start(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="module")
def valkey(server_of_session: Valkey) -> Valkey:
    """The server that all tests of this session share; take `own_valkey` to kill, freeze or configure one.

    Empty when a file begins: its web process would refuse to start where a pool of another file is declared.
    """
    with Redis.from_url(server_of_session.url, socket_timeout=5) as client:
        client.flushall()
    return server_of_session


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server for one test alone, free to be killed."""
    with start(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def redis_client(valkey: Valkey) -> Iterator[Redis]:
    """A client of the shared server, which is empty when the test begins."""
    with Redis.from_url(valkey.url, socket_timeout=5) as client:
        client.flushall()
        yield client


@pytest.fixture
def redis_url(valkey: Valkey, redis_client: Redis) -> str:
    """The address of the shared server, which is empty when the test begins."""
    return valkey.url


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 that is free."""
    return processes.free_port()
