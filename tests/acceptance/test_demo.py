"""README's first command."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def test_the_demo_brings_every_sample_home_in_under_20_s(tmp_path: Path) -> None:
    """It needs nothing but itself, and exits 0 only if each settlement cost exactly one getOrder."""
    started = time.monotonic()
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ota-receiver"), "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every order arrived complete, and each settlement cost exactly one getOrder." in done.stdout
    assert "curl -i http://127.0.0.1:" in done.stdout
    assert time.monotonic() - started < 20
    assert list(tmp_path.iterdir()) == []
