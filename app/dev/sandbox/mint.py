"""Made-up ids, numbers and times: ids follow from what they are for, so that a seed gives the same ones again."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from datetime import UTC, datetime

_GUID = re.compile(r"\{?([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})\}?")


def guid(*parts: object) -> str:
    """Return the GUID of `parts`: lower case, no braces, always the same for the same parts."""
    return str(uuid.UUID(bytes=_digest(parts), version=4))


def digits(count: int, *parts: object) -> str:
    """Return `count` decimal digits that follow from `parts`."""
    return str(int.from_bytes(_digest(parts), "big") % 10**count).zfill(count)


def share(*parts: object) -> float:
    """Return a number in [0, 1) that follows from `parts`: a die that needs no memory."""
    return int.from_bytes(_digest(parts)[:6], "big") / 2**48


def company_id(tenant: str, environment: str, company: str) -> str:
    """Return the id of a company that nobody declared; upper and lower case do not matter in its address."""
    return guid("company", tenant.lower(), environment.lower(), company.lower())


def canonical_guid(text: str) -> str | None:
    """Return the GUID in `text` in lower case without braces, None if it is none."""
    match = _GUID.fullmatch(text)
    return match[1].lower() if match else None


def moment(seconds: float) -> str:
    """Return a Unix time as Business Central writes a field: UTC, three digits, `Z`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def timestamp(fraction_digits: int) -> str:
    """Return the present as an event carries it: UTC, 0 to 7 fractional digits (100 ns is .NET's tick), `Z`."""
    ticks = time.time_ns() // 100
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ticks // 10_000_000))
    fraction = f"{ticks % 10_000_000:07}"[:fraction_digits]
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"


def _digest(parts: tuple[object, ...]) -> bytes:
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
