"""Keys of the API: `otar_<short id>_<secret>`. Redis has the SHA-256 of a key, never the key.

A plain digest is enough: no one guesses 256 random bits, however fast the digest is.
"""

from __future__ import annotations

import re
import secrets
from hashlib import sha256
from hmac import compare_digest
from typing import Any, Final, Literal, NamedTuple, get_args

import msgspec

from app.errors import OtherSchema
from app.heartbeat import decoded
from app.ledger import policy
from app.ledger.redis import VERSION, Redis, is_other_schema, server_time

Scope = Literal["orders:read", "feed"]
"""What a key allows: to read orders; to read the feed and to acknowledge it as the consumer of the key's name."""

SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,30}", re.ASCII)

_KEY: Final = re.compile(r"otar_([0-9a-f]{8})_[0-9a-f]{64}", re.ASCII)


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """One key; times in ms since 1970, 0 for never. Keys of one name are one consumer of the feed."""

    name: str
    scopes: tuple[Scope, ...]
    sha256: str
    created_at: int
    revoked_at: int = 0


class Caller(NamedTuple):
    """Who makes a request: the short id and the name of the key, what it allows, and the seconds that it must wait.

    It must wait when its requests of this minute are used up; 0 otherwise.
    """

    key_id: str
    name: str
    scopes: tuple[Scope, ...]
    wait_s: int


class ApiKeys:
    """The keys of this deployment, by their short ids. Every method raises what redis-py raises."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis
        self._names = redis.names

    def create(self, name: str, scopes: tuple[Scope, ...]) -> tuple[str, str]:
        """Make a key; return its short id, and the key, which cannot be read again."""
        short = secrets.token_hex(4)
        text = f"otar_{short}_{secrets.token_hex(32)}"
        key = ApiKey(name=name, scopes=scopes, sha256=_digest(text), created_at=server_time(self._redis))
        self._redis.hset(self._names.api_keys, short, msgspec.json.encode(key))
        return short, text

    def all(self) -> dict[str, ApiKey]:
        """Return every key, also the revoked ones, oldest first; unreadable entries are left out."""
        found = self._redis.hgetall(self._names.api_keys)
        keys = {short.decode(): decoded(text, ApiKey) for short, text in found.items()}
        known = {short: key for short, key in keys.items() if key is not None}
        return dict(sorted(known.items(), key=lambda one: one[1].created_at))

    def used(self) -> dict[str, int]:
        """Return when each key was last used, to the minute, in ms since 1970."""
        return {short.decode(): int(at) for short, at in self._redis.hgetall(self._names.api_keys_used).items()}

    def revoke(self, key_id: str) -> None:
        """End a key for good; raises KeyError if there is none."""
        ended = msgspec.structs.replace(self.all()[key_id], revoked_at=server_time(self._redis))
        self._redis.hset(self._names.api_keys, key_id, msgspec.json.encode(ended))

    def admit(self, text: str, requests_per_min: int) -> Caller | None:
        """Count a request of this key and return the caller; None if the text is no valid key. Raises OtherSchema."""
        match = _KEY.fullmatch(text)
        if match is None:
            return None
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.get(self._names.schema)
            pipe.hget(self._names.api_keys, match[1])
            (seconds, _), schema, found = pipe.execute()
        if is_other_schema(schema):
            raise OtherSchema(schema.decode(errors="replace"), VERSION)
        key = decoded(found or b"", ApiKey)
        if key is None or key.revoked_at or not compare_digest(_digest(text), key.sha256):
            return None
        return Caller(match[1], key.name, key.scopes, self._count(match[1], seconds, requests_per_min))

    def _count(self, key_id: str, seconds: int, requests_per_min: int) -> int:
        """Return for how many seconds the key must wait, 0 if it may go on."""
        minute = seconds // 60
        counter = self._names.api_requests(key_id, minute)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.incr(counter)
            pipe.expire(counter, 120)
            requests, _ = pipe.execute()
        if requests == 1:
            self._redis.hset(self._names.api_keys_used, key_id, minute * policy.MINUTE)
        return 0 if requests <= requests_per_min else 60 * (minute + 1) - seconds


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
