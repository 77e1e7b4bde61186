"""Renews htmx in app/ops/static from its npm package: `npm pack htmx.org`, `python -m tests.vendor_htmx FILE.tgz`."""

from __future__ import annotations

import hashlib
import sys
import tarfile
from pathlib import Path
from typing import Final

STATIC: Final = Path(__file__).parents[1] / "app" / "ops" / "static"
FILES: Final = {"package/dist/htmx.min.js": "htmx.min.js", "package/LICENSE": "htmx.LICENSE"}


def renew(package: Path) -> None:
    """Replace the files of htmx by those of the package, and write the checksum of the script."""
    with tarfile.open(package) as archive:
        for inside, name in FILES.items():
            member = archive.extractfile(inside)
            assert member is not None, inside
            (STATIC / name).write_bytes(member.read())
    (STATIC / "htmx.SHA256").write_text(f"{digest(STATIC / 'htmx.min.js')}  htmx.min.js\n")


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    renew(Path(sys.argv[1]))
