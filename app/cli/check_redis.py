"""What `check` finds of Redis: the web process's own checks, and how an address of another machine is protected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

from app.cli.finding import Finding
from app.health import Check

_ADVICE: Final = {
    "redis": "Start it, or correct REDIS_URL.",
    "writable": "Name the primary in REDIS_URL; if the AOF cannot be written, look at its disk.",
    "durable": "Set appendonly yes and appendfsync everysec (or always) in its configuration.",
    "schema": "Upgrade this receiver, or name another Redis in REDIS_URL; nothing was changed.",
    "clock": "Set both clocks right (NTP): retries and leases are kept in the time of the machine that writes them.",
    "memory": "Set maxmemory-policy noeviction, and maxmemory to what the machine can spare.",
}
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


def of_checks(checks: list[Check]) -> Iterator[Finding]:
    """Return a finding for each check of app.health."""
    for check in checks:
        advice = "" if check.ok else _ADVICE.get(check.name, "Mend it: until then /readyz says the same.")
        yield Finding("redis", check.name, "good" if check.ok else "todo", check.detail, advice)


def of_address(url: str) -> Iterator[Finding]:
    """Return how the way to Redis is protected, for an address that leaves this machine."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.hostname in _LOOPBACK:
        return
    if not parts.password:
        advice = "Set requirepass (or an ACL user) there and give the password in REDIS_URL."
        yield Finding("redis", "password", "note", "another machine's Redis is used without a password", advice)
    if parts.scheme != "rediss":
        advice = "Unless a private network carries it: use rediss://."
        yield Finding("redis", "tls", "note", "orders travel to another machine unencrypted", advice)
