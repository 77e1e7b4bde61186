"""What can be turned on the sandbox, at start or while it runs; defaults are upstream's documented behaviour.

Made-up ids, numbers and times: ids follow from what they are for, so that a seed gives the same ones again.
"""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Shape = Literal["values", "value", "bare"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The present settings. Limits: https://api.navipartner.com/limits; the rest is not documented upstream."""

    #: Seconds from Submitted to the end; upstream about 60, too long to wait for.
    settle_after: Seconds = 0.5
    #: Milliseconds a getOrder takes, spent in one of the slots.
    latency_ms: Seconds = 0.0

    #: Calls of one API key worked on at once.
    slots: Positive = 5
    #: Calls of one API key that may wait for a slot; one more is answered 429.
    queue: Count = 95
    #: Calls of one API key within `window` seconds; one more is answered 429.
    requests: Positive = 6000
    window: Seconds = 300.0
    #: Seconds a call may wait for a slot before 503, and work before 408.
    queue_wait: Seconds = 480.0
    operation_limit: Seconds = 480.0

    #: The wrapper of a delivery; "bare" sends one event a POST without any.
    shape: Shape = "value"
    #: Seconds in which events are gathered into one POST, of at most `batch_max`; 0: each event alone.
    batch_window: Seconds = 0.0
    batch_max: Positive = 50
    #: Fractional digits of an event's timestamp.
    digits: Annotated[int, msgspec.Meta(ge=0, le=7)] = 7
    #: Tries a POST gets; 0: until 2xx. No retry is documented, so none is the default.
    attempts: Count = 1
    #: Seconds between tries, and seconds until a try is given up.
    attempt_every: Seconds = 1.0
    delivery_timeout: Seconds = 10.0
    #: Send `validationToken` to a new subscription's URL and refuse it without the echo.
    handshake: bool = False
    #: Switch a subscription off after so many 4xx in a row; 0: never.
    disable_after: Count = 0

    def changed(self, part: dict[str, Any]) -> Settings:
        """Return the settings with `part` in place of what they hold; raises msgspec.ValidationError."""
        return msgspec.convert({**msgspec.structs.asdict(self), **part}, Settings)


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
