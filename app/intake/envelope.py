"""From bytes to typed items: the three envelope shapes, and the digest by which two events are the same.

The wrapper is documented in three ways (`values`, `value`, one bare object: upstream.md 0), so all are taken, also
together.
Nothing here is trusted yet: only `app.intake.auth` turns items into order events.
"""

from __future__ import annotations

import re
from datetime import datetime
from hashlib import blake2b
from itertools import islice
from typing import Any, Final

import msgspec

from app.body import decoded
from app.errors import RequestRefused

ORDER_PROCESSED: Final = "ota_cm_order_processed"

CONTAINERS: Final = 8
"""Objects and lists of a body per item at most; an item as documented has two. Counting them costs no parsing."""

_WORD: Final = re.compile(r"[A-Za-z0-9_-]{1,50}")
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d)(?:\.(\d*))?(|[Zz]|[+-]\d\d:\d\d)")
_LONGEST_TEXT: Final = 250
_NAME: Final = re.compile(r"[A-Za-z_]{1,40}")
_LONGEST_SHAPE: Final = 1000
_MOST_NAMES: Final = 30


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
    traceparent: str = ""

    @property
    def digest(self) -> str:
        """Return what two deliveries of the same event share.

        "" for an event without a timestamp, unless it waits in the spool: it may be drained twice, and is one event.
        """
        if not self.timestamp and not self.received:
            return ""
        at = canonical_time(self.timestamp) if self.timestamp else f"{self.received} {self.request_id}"
        # Ids have one length; with that of the status no character moves between the two texts unseen.
        whole = f"{self.company_id}{self.order_id}{len(self.status)}:{self.status}{at}"
        return blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

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
            self.reference[:_LONGEST_TEXT],
            self.secret,
            self.request_id,
            self.timestamp[:_LONGEST_TEXT],
            self.received,
        )


class _Wire(Item, rename="camel"):
    values: Any = msgspec.UNSET
    value: Any = msgspec.UNSET


class _Values(msgspec.Struct, rename="camel"):
    """The usual shape; a body with more than `values` may have items elsewhere too."""

    values: list[Item]
    value: msgspec.UnsetType = msgspec.UNSET
    payload: msgspec.UnsetType = msgspec.UNSET
    event_name: msgspec.UnsetType = msgspec.UNSET


_usual = msgspec.json.Decoder(_Values)
_any_shape = msgspec.json.Decoder(_Wire)


def parse(body: bytes, max_items: int) -> Envelope:
    """Return the items of a body in any of the three shapes.

    Raises RequestRefused: 400 `not_json`, `no_envelope`; 413 `too_many_items`.
    """
    containers = CONTAINERS * max_items
    if len(body) > containers and body.count(b"{") + body.count(b"[") > containers:
        raise RequestRefused(413, "too_many_items")
    found = _parsed(body)
    if not found.items and not found.broken and b"orderId" in body:
        # The list stands there twice, or under another name: an answer 200 would lose what it holds.
        raise RequestRefused(400, "no_envelope")
    if len(found.items) + found.broken > max_items:
        raise RequestRefused(413, "too_many_items")
    return found


def shape(body: bytes, place: int) -> str:
    """Return the names, types and lengths of what stands in the item at this place of a parsed body, and no value.

    The clientState is left out: it was right. "" where the body cannot be read with all that the items do not need.
    """
    try:
        whole = decoded(msgspec.json.decode, body)
        elements = [*_elements(whole.get("values")), *_elements(whole.get("value"))]
        item = [*(one for one in elements if isinstance(one, dict)), whole][place]
    except (ValueError, RecursionError, IndexError):
        return ""
    return _shape({name: value for name, value in item.items() if name != "clientState"}, 3)[:_LONGEST_SHAPE]


def _parsed(body: bytes) -> Envelope:
    try:
        return Envelope(_usual.decode(body).values)
    except (ValueError, RecursionError):
        pass
    try:
        wire = decoded(_any_shape.decode, body)
    except msgspec.ValidationError:
        raise RequestRefused(400, "no_envelope") from None
    # A body of brackets only raises RecursionError; bad UTF-8 a UnicodeDecodeError, which is a ValueError.
    except (ValueError, RecursionError):
        raise RequestRefused(400, "not_json") from None
    is_item = wire.event_name is not None or wire.payload is not None
    if not is_item and not any(isinstance(one, list) or _elements(one) for one in (wire.values, wire.value)):
        raise RequestRefused(400, "no_envelope")
    found = _each([*_elements(wire.values), *_elements(wire.value)])
    return Envelope([*found.items, wire], found.broken) if is_item else found


def text(value: object) -> str:
    """Return a text as sent, "" for anything else."""
    return value if isinstance(value, str) else ""


def canonical_time(sent: str) -> str:
    """Return a text that two spellings of one moment share: zone, and zeros at the end of the fraction.

    Without a zone it is UTC. What is no time stays as it is.
    """
    match = _TIME.fullmatch(sent)
    if match is None:
        return sent
    seconds, fraction, zone = match.groups()
    try:
        at = datetime.fromisoformat(seconds + (zone.upper() or "Z")).timestamp()
    except ValueError:
        return sent
    return f"{at:.0f}.{(fraction or '').rstrip('0')}"


def _elements(sent: object) -> list[Any]:
    """Return the elements of a list; an object instead of the list is its only element."""
    return sent if isinstance(sent, list) else [sent] if sent and isinstance(sent, dict) else []


def _each(elements: list[Any]) -> Envelope:
    objects = [element for element in elements if isinstance(element, dict)]
    return Envelope([msgspec.convert(one, Item) for one in objects], len(elements) - len(objects))


def _shape(value: object, depth: int) -> str:
    if isinstance(value, str):
        return f"text {len(value)}"
    if not isinstance(value, dict | list):
        return "null" if value is None else type(value).__name__
    if not depth:
        return f"{type(value).__name__} {len(value)}"
    if isinstance(value, list):
        return f"list {len(value)} [{_shape(value[0], depth - 1)}]" if value else "list 0"
    # A name may be a person's, or a number of theirs, where the sender made a mistake.
    names = ((name if _NAME.fullmatch(name) else "?", one) for name, one in islice(value.items(), _MOST_NAMES))
    return "{" + ", ".join(f"{name}: {_shape(one, depth - 1)}" for name, one in names) + "}"
