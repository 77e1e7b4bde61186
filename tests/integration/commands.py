"""Several commands in one process, one after the other: starting Python for each takes longer than what they do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from tests.integration.desk import Desk, Ended

_PROGRAM: Final = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from app.cli.main import main

for arguments in json.load(sys.stdin):
    sys.argv = ["ota-receiver", *arguments]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, *(one.buffer.getvalue().decode() for one in (out, err))]))
"""


def run_each(desk: Desk, commands: Sequence[Sequence[str]]) -> list[Ended]:
    """Run `ota-receiver` with each of these arguments, as from a pipe."""
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=desk.env,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert not ended.returncode, ended.stderr
    return [Ended(*json.loads(line)) for line in ended.stdout.splitlines()]
