"""The heartbeats of the worker pools: one JSON value a pool in `ota:pools`."""

from __future__ import annotations

from typing import Any

import msgspec
from redis import Redis

from app.store import keys


class Heartbeat(msgspec.Struct, frozen=True):
    """What a pool writes each second: who it is (workers.process.Identity), its workers, and when, in ms since 1970."""

    machine: str
    pid: int
    started: str
    workers: list[str]
    beat: int


def read_heartbeat(text: bytes | str) -> Heartbeat | None:
    """Return the heartbeat in a value of `ota:pools`, None if another version or another program wrote it."""
    try:
        return msgspec.json.decode(text, type=Heartbeat)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class Pools:
    """Reads the heartbeats; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def all(self) -> list[bytes]:
        """Return what each pool wrote last, as JSON."""
        told: list[Any] = self._redis.hvals(keys.POOLS)
        return told
