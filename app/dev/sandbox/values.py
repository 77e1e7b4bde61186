"""The types of the sandbox's fields; made-up ids and numbers, which a seed repeats; times as text."""

from __future__ import annotations

import re
import time
import uuid
from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Shape = Literal["values", "value", "bare"]

_GUID = re.compile(r"\{?([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})\}?")


def guid(*parts: object) -> str:
    """Return the GUID of `parts`, lower case, no braces: the same parts always give the same value."""
    return str(_uuid(parts))


def digits(count: int, *parts: object) -> str:
    """Return `count` decimal digits that depend on `parts`."""
    return str(_uuid(parts).int % 10**count).zfill(count)


def share(*parts: object) -> float:
    """Return a number in [0, 1) that depends on `parts`."""
    return _uuid(parts).node / 2**48


def company_id(tenant: str, environment: str, company: str) -> str:
    """Return the id of a company that is not declared; the case of its address does not matter."""
    return guid("company", tenant.lower(), environment.lower(), company.lower())


def canonical_guid(text: str) -> str | None:
    """Return the GUID in `text` in lower case without braces; None if it is not a GUID."""
    match = _GUID.fullmatch(text)
    return match[1].lower() if match else None


def utc(seconds: float) -> str:
    """Return a Unix time as Business Central writes a field: UTC, three digits, `Z`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def event_timestamp() -> str:
    """Return the present time as an event carries it: UTC, 7 fractional digits (100 ns, as in .NET), `Z`."""
    ticks = time.time_ns() // 100
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ticks // 10_000_000))
    return f"{seconds}.{ticks % 10_000_000:07}Z"


def _uuid(parts: tuple[object, ...]) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, "\x1f".join(map(str, parts)))
