"""The file an embedded Valkey is started with; from it later starts know how to reach that server."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ServerConfig:
    """How the server whose data lies in `folder` is started and reached."""

    folder: Path
    port: int
    password: str = field(repr=False)
    appendfsync: str

    @property
    def path(self) -> Path:
        """Return where the file lies."""
        return self.folder / "valkey.conf"

    @classmethod
    def new(cls, folder: Path, port: int, appendfsync: str) -> ServerConfig:
        """Return one for the next start, with the password of an earlier one: its URL may still be in use."""
        former = cls.read(folder)
        return cls(folder, port, former.password if former else secrets.token_urlsafe(32), appendfsync)

    @classmethod
    def read(cls, folder: Path) -> ServerConfig | None:
        """Return what the latest server in `folder` was started with, None when there was none."""
        try:
            text = (folder / "valkey.conf").read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return None
        values = dict(line.split(" ", 1) for line in text.splitlines())
        return cls(folder, int(values["port"]), values["requirepass"], values["appendfsync"])

    def write(self) -> None:
        """Write the file, readable for its owner only, whole or not at all."""
        folder = str(self.folder).replace("\\", "\\\\").replace('"', '\\"')
        lines = (
            "bind 127.0.0.1",
            f"port {self.port}",
            f"requirepass {self.password}",
            f'dir "{folder}"',
            "appendonly yes",
            f"appendfsync {self.appendfsync}",
            'save ""',
            "maxmemory-policy noeviction",
        )
        draft = self.path.with_suffix(".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write("\n".join(lines) + "\n")
        draft.replace(self.path)

    def answering_pid(self) -> int | None:
        """Return the pid of the server that answers on this port for this folder, None when none does (yet).

        A few lines of the wire protocol by hand (inline commands): only app/store may import redis.
        """
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\nINFO server\r\n".encode())
                with connection.makefile("rb") as replies:
                    if (replies.readline(), replies.readline()) != (b"+OK\r\n", b"+PONG\r\n"):
                        return None
                    info = os.fsdecode(replies.read(int(replies.readline()[1:])))
        except (OSError, ValueError):
            return None
        fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
        return int(fields["process_id"]) if fields["config_file"] == str(self.path) else None
