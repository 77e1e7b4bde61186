"""From bytes to typed items: the three envelope shapes, and the digest by which two events are the same.

The wrapper is documented in three ways (`values`, `value`, one bare object: upstream.md 0), so all are taken.
Nothing here is trusted yet: only `app.intake.auth` turns items into order events.
"""

from __future__ import annotations

import json
import re
from hashlib import blake2b
from typing import Any, Final

import msgspec

from app.errors import RequestRefused

ORDER_PROCESSED: Final = "ota_cm_order_processed"

_HALF_A_PAIR: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_WORD: Final = re.compile(r"[A-Za-z0-9_-]{1,50}")
_FRACTION: Final = re.compile(r"([^.]*\d)\.(\d+)(\D*|[+-]\d\d:\d\d)", re.DOTALL)
_LONGEST_TEXT: Final = 250
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class Item(msgspec.Struct, rename="camel"):
    """One element of an envelope as sent; any field may be missing or of any type."""

    client_state: Any = None
    company_id: Any = None
    event_name: Any = None
    payload: Any = None
    timestamp: Any = None


class Envelope(msgspec.Struct, frozen=True):
    """What one POST holds; `broken` counts elements that are no objects."""

    items: list[Item]
    broken: int = 0


class OrderProcessed(msgspec.Struct, frozen=True):
    """An authenticated event, as accept.lua takes it and as the spool stores it; no clientState is in it.

    Ids are canonical GUIDs. `timestamp` is as sent, `secret` the name of the secret that matched, `received` ms since
    1970 for an event that waits in the spool, 0 for one that is recorded now.
    """

    company_id: str
    order_id: str
    status: str
    reference: str
    timestamp: str
    secret: str
    request_id: str = ""
    received: int = 0

    @property
    def digest(self) -> str:
        """Return what two deliveries of the same event share (invariant 2), "" when it has no timestamp."""
        if not self.timestamp:
            return ""
        parts = (self.company_id, ORDER_PROCESSED, self.order_id, self.status, canonical_time(self.timestamp))
        return blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    @property
    def status_word(self) -> str:
        """Return the status if it is one word, else `Unknown`: lines that people split at blanks contain it."""
        return self.status if _WORD.fullmatch(self.status) else "Unknown"

    def arguments(self) -> tuple[str | int, ...]:
        """Return the nine values of accept.lua."""
        return (
            self.digest,
            self.company_id,
            self.order_id,
            self.status_word,
            self.reference,
            self.secret,
            self.request_id,
            self.timestamp,
            self.received,
        )


class _Wire(Item, rename="camel"):
    values: Any = msgspec.UNSET
    value: Any = msgspec.UNSET


class _Values(msgspec.Struct):
    values: list[Item]


_usual = msgspec.json.Decoder(_Values)
_any_shape = msgspec.json.Decoder(_Wire)


def parse(body: bytes) -> Envelope:
    """Return the items of a body in any of the three shapes.

    A byte order mark is ignored, as RFC 8259 allows: the sender is .NET, where some writers put one.
    Raises RequestRefused (400): `not_json`, `no_envelope`.
    """
    body = body.removeprefix(_BYTE_ORDER_MARK)
    try:
        return Envelope(_usual.decode(body).values)
    except (ValueError, RecursionError):
        pass
    try:
        wire = _any_shape.decode(_whole_characters(body) if _HALF_A_PAIR.search(body) else body)
    except msgspec.ValidationError:
        raise RequestRefused(400, "no_envelope") from None
    # A body of brackets only raises RecursionError; bad UTF-8 a UnicodeDecodeError, which is a ValueError.
    except (ValueError, RecursionError):
        raise RequestRefused(400, "not_json") from None
    for elements in (wire.values, wire.value):
        if isinstance(elements, list):
            return _each(elements)
    if wire.event_name is None and wire.payload is None:
        raise RequestRefused(400, "no_envelope")
    return Envelope([wire])


def text(value: object) -> str:
    """Return a text of bounded length, "" for anything else."""
    return value[:_LONGEST_TEXT] if isinstance(value, str) else ""


def canonical_time(sent: str) -> str:
    """Return a timestamp as sent, its fraction cut to 7 digits and without trailing zeros (MS-BE sends 7)."""
    match = _FRACTION.fullmatch(sent)
    if match is None:
        return sent
    fraction = match[2][:7].rstrip("0")
    return f"{match[1]}.{fraction}{match[3]}" if fraction else f"{match[1]}{match[3]}"


def _whole_characters(body: bytes) -> bytes:
    """Put a question mark for half a surrogate pair, which msgspec refuses and which must not fail a batch.

    Business Central cuts texts by UTF-16 length, so a name that ends in the middle of an emoji is sent like this.
    """
    return json.dumps(json.loads(body), ensure_ascii=False).encode("utf-8", "replace")


def _each(elements: list[Any]) -> Envelope:
    objects = [element for element in elements if isinstance(element, dict)]
    return Envelope([msgspec.convert(one, Item) for one in objects], len(elements) - len(objects))
