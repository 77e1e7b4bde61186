"""Guests by their e-mail address, which is kept nowhere: a record holds salted digests of those in its order.

Digests stand in the record and not in an index of their own, so they live exactly as long as it does, however long it
is owed, and go with it. A search walks all orders; it is made when somebody asks to be erased, not each day.
"""

from __future__ import annotations

import hmac
import secrets
import unicodedata
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any, Final

from redis import Redis

from app.ids import OrderKey
from app.ledger import keys
from app.ledger.redis import oldest_first

_LENGTH: Final = 20
"""Hex digits of a digest: 80 bits; three of them, with blanks, still fit a hash that Redis keeps compact."""


class Guests:
    """Digests of addresses, and the orders that hold one. Writes nothing but the salt, once."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def digests(self, addresses: Iterable[str]) -> str:
        """Return HMAC-SHA256 of each address, separated by blanks; "" for none, without asking Redis."""
        found = sorted(filter(None, map(_normal, addresses)))
        if not found:
            return ""
        # Asked each time and not remembered: a flushed Redis has another salt, and a worker outlives the flush.
        salt = self._salt()
        return " ".join(dict.fromkeys(hmac.new(salt, one, sha256).hexdigest()[:_LENGTH] for one in found))

    def orders(self, address: str, company_id: str | None, step: Callable[[int], None]) -> list[OrderKey]:
        """Return the orders in whose content this address stands, in any case; `step` is told the size of each page.

        One that changes meanwhile is looked at again; one that is fetched only after the walk has ended is not found.
        """
        wanted = self.digests([address]).encode()
        found: dict[OrderKey, None] = {}
        for page in oldest_first(self._redis, keys.ORDERS) if wanted else ():
            orders = [OrderKey.of(member) for member, _ in page]
            asked = [one for one in orders if company_id in (None, one.company_id)]
            with self._redis.pipeline(transaction=False) as pipe:
                for order in asked:
                    pipe.hget(keys.record(order), "guests")
                held = pipe.execute()
            found |= {order: None for order, value in zip(asked, held, strict=True) if wanted in (value or b"").split()}
            step(len(page))
        return list(found)

    def _salt(self) -> bytes:
        salt: Any = self._redis.get(keys.SALT)
        if salt is None:
            self._redis.set(keys.SALT, secrets.token_hex(32), nx=True)
            salt = self._redis.get(keys.SALT)
        return bytes(salt)


def _normal(address: str) -> bytes:
    return unicodedata.normalize("NFKC", address).strip().casefold().encode(errors="replace")
