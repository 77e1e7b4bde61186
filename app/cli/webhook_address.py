"""The address that upstream shall send events to: what it must be, so that nobody else can read them."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from app.cli.exits import Stop

_LOOPBACK: Final = {"127.0.0.1", "localhost", "::1"}


def check(url: str) -> None:
    """Raise Stop unless upstream can send events there without showing them to anybody."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise Stop("URL is no address.") from None
    if parts.scheme not in {"http", "https"} or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise Stop("URL is no http(s) address.")
    if parts.scheme == "http" and host not in _LOOPBACK:
        raise Stop("URL must be https: every event carries the clientState.")
    if parts.username is not None or parts.fragment:
        raise Stop("URL must hold neither a user nor a fragment.")
