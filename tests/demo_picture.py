"""The picture in README.md: runs the demo and writes its output as docs/demo.svg.

    uv run python -m tests.demo_picture

Run it again after a change of what the demo prints.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parents[1] / "docs" / "demo.svg"
WIDTH = 84
COMMAND = "$ uv run ota-receiver demo"

# The last frame of the progress bars follows the last "erase this line".
_ERASE_LINE = "\x1b[2K"
_CURSOR = re.compile(r"\x1b\[\?25[hl]")
# A picture on a web page loads nothing from elsewhere: the reader's own monospace font will do.
_FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def main() -> None:
    """Write the picture; raises CalledProcessError when the demo fails."""
    program = Path(sys.executable).parent / "ota-receiver"
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [program, "demo"],
            cwd=folder,
            env=os.environ | {"FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm-256color"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    last_frame = _CURSOR.sub("", ended.stdout.rpartition(_ERASE_LINE)[2])
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(COMMAND, style="bold"))
    console.print(Text.from_ansi(last_frame.rstrip()))
    picture = console.export_svg(title="ota-receiver demo", unique_id="demo")
    PICTURE.write_text(_FONT_FACE.sub("", picture), encoding="utf-8")


if __name__ == "__main__":
    main()
