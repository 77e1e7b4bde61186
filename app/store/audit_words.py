"""Words of an order that people typed into a replay, as who or why: they leave the audit and the plans with it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, Final

from redis import Redis

from app.store import keys
from app.store.erasure import DEED

_PAGE: Final = 200


class AuditWords:
    """Finds texts that name an order or a guest, and forgets them."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    @staticmethod
    def are_in(text: str, words: Collection[str]) -> bool:
        """Return whether the text names one of the words, in any case."""
        return _pattern(words).search(text.casefold()) is not None

    def forget(self, words: Collection[str]) -> int:
        """Drop the deeds that name one of the words, and who asked for such a plan and why; return how many."""
        deeds, plans = list(self._deeds(words)), list(self._plans(words))
        with self._redis.pipeline(transaction=False) as pipe:
            for deed in deeds:
                pipe.xdel(keys.AUDIT, deed)
            for plan in plans:
                pipe.hset(keys.replay(plan), mapping={"who": "", "why": ""})
            pipe.execute()
        return len(deeds) + len(plans)

    def _deeds(self, words: Collection[str]) -> Iterator[str]:
        named = _pattern(words)
        low = "-"
        while page := self._page(low):
            for deed_id, fields in page:
                texts = {name.decode(): value.decode() for name, value in fields.items()}
                said = " ".join(texts.get(name, "") for name in ("who", "why", "selected"))
                if texts.get("what") != DEED and named.search(said.casefold()):
                    yield deed_id.decode()
            low = f"({page[-1][0].decode()}"

    def _page(self, low: str) -> Any:
        return self._redis.xrange(keys.AUDIT, low, "+", count=_PAGE)

    def _plans(self, words: Collection[str]) -> Iterator[str]:
        named = _pattern(words)
        found: Any = self._redis.zrange(keys.REPLAYS, 0, -1)
        with self._redis.pipeline(transaction=False) as pipe:
            for plan in found:
                pipe.hmget(keys.replay(plan.decode()), "who", "why")
            texts = pipe.execute()
        for plan, values in zip(found, texts, strict=True):
            if named.search(" ".join((value or b"").decode() for value in values).casefold()):
                yield plan.decode()


def _pattern(words: Collection[str]) -> re.Pattern[str]:
    # Whole words only: a reference may be as short as "12".
    alternatives = "|".join(re.escape(word.strip().casefold()) for word in words if word.strip())
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)" if alternatives else r"(?!)")
