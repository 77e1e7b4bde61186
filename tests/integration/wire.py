"""Requests as bytes, for what no proper client would send, and the answers read back."""

from __future__ import annotations

import json
import re
import socket
from contextlib import suppress
from pathlib import Path

from tests.service import HOOK, Web, item


def post(body: bytes, *headers: str, path: str = HOOK) -> bytes:
    """Return a POST; its length is the body's unless a header says how the body is framed."""
    framed = any(header.partition(":")[0] in {"content-length", "transfer-encoding"} for header in headers)
    lengths = () if framed else (f"content-length: {len(body)}",)
    head = "\r\n".join([f"POST {path} HTTP/1.1", "host: test", *lengths, *headers, "", ""])
    return head.encode("latin-1") + body


def good(*more: object) -> bytes:
    """Return a body with one good event of a new order."""
    return json.dumps({"values": [item(), *more]}).encode()


def read_all(connection: socket.socket) -> bytes:
    """Return everything until the other side closes; raises TimeoutError, ConnectionError."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_answer(connection: socket.socket) -> bytes:
    """Return one answer, or what came of it before the connection ended; raises TimeoutError."""
    answer = b""
    with suppress(ConnectionError):
        while (missing := missing_of(answer)) and (part := connection.recv(missing)):
            answer += part
    return answer


def missing_of(answer: bytes) -> int:
    """Return how many bytes an answer lacks that may be read without touching the next one."""
    head, ended, body = answer.partition(b"\r\n\r\n")
    if not ended:
        return 1
    length = re.search(rb"\ncontent-length: (\d+)", head)
    return int(length[1]) - len(body) if length else 0


def statuses(answers: bytes) -> list[int]:
    """Return the status of each answer in a stream of them."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def talk(web: Web, sent: bytes) -> bytes:
    """Return all that is answered to these bytes on a connection of their own."""
    with web.connect() as connection:
        connection.sendall(sent)
        return read_all(connection)


def rss_kb(web: Web) -> int:
    """Return the memory of the web process in KB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{web.process.pid}/status").read_text())
    assert found is not None
    return int(found[1])
