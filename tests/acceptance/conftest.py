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


@pytest.fixture
def whole(bare: Service) -> Service:
    """Everything runs, and the webhook is subscribed."""
    bare.start("web")
    bare.start("worker", WORKERS="2", BACKFILL_WORKERS="1")
    bare.subscribe()
    return bare
