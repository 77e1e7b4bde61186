"""One service per test; everything it starts ends with the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import Service, service


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Service]:
    """Valkey and the sandbox run; web and worker do not."""
    with service(tmp_path) as one:
        one.start_valkey()
        one.start_sandbox()
        yield one


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Everything runs, and the webhook is subscribed; shared by tests that kill nothing."""
    with service(tmp_path_factory.mktemp("whole")) as one:
        one.start_valkey()
        one.start_sandbox()
        one.start("web")
        one.start("worker", WORKERS="2", BACKFILL_WORKERS="1")
        one.subscribe()
        yield one
