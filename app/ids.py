"""GUIDs in the one form that keys, URLs and comparisons use, the pair of them that names an order; ids of requests."""

from __future__ import annotations

import os
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from random import Random
from typing import Final, NamedTuple
from uuid import UUID

EMPTY_GUID: Final = "00000000-0000-0000-0000-000000000000"
"""What Business Central writes for "none" (upstream.md 1)."""

_CANONICAL: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_GUID: Final = re.compile(
    r"\s*\{?\s*([0-9a-fA-F]{8})-?([0-9a-fA-F]{4})-?([0-9a-fA-F]{4})-?([0-9a-fA-F]{4})-?([0-9a-fA-F]{12})\s*\}?\s*",
    re.ASCII,
)
_BEGINNING: Final = re.compile(r"[0-9a-f]{4,31}")

_TRACEPARENT: Final = re.compile(
    rb"(?!ff)([0-9a-f]{2})-((?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(-.*)?"
)


def guid(value: object) -> str | None:
    """Return a GUID in its canonical form (lower case, no braces); None for anything else and for the empty GUID.

    Braces, hyphens and blanks around it may be there or not: Microsoft's tools write all these forms.
    """
    if not isinstance(value, str):
        return None
    if _CANONICAL.fullmatch(value):
        found = value
    elif match := _GUID.fullmatch(value):
        found = "-".join(match.groups()).lower()
    else:
        return None
    return None if found == EMPTY_GUID else found


def beginning(text: str) -> str | None:
    """Return the beginning of a GUID as the canonical form has it; None for other texts and for fewer than 4 digits."""
    typed = text.strip().lower()
    digits = typed.replace("-", "")
    if not _BEGINNING.fullmatch(digits):
        return None
    parts = (digits[start:end] for start, end in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
    found = "-".join(filter(None, parts))
    return found if "-" not in typed or f"{found}-".startswith(typed) else None


def new_request_id() -> str:
    """Return an id that no other request has."""
    return os.urandom(8).hex()


def request_ids() -> Callable[[], str]:
    """Return what makes new ids as `new_request_id` does without a system call; each process needs one of its own."""
    bits = Random().getrandbits  # noqa: S311  # an id is no secret
    return lambda: f"{bits(64):016x}"


def traceparent(header: bytes) -> str:
    """Return a W3C traceparent as version 00, "" for anything else; of a later version the fields of 00 are taken."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None or (match[1] == b"00" and match[3]):
        return ""
    return f"00-{match[2].decode()}"


def trace_id(traceparent: str) -> str:
    """Return the id of the trace, "" without one."""
    return traceparent[3:35]


def parent_id(traceparent: str) -> str:
    """Return the id of the caller's span, "" without one."""
    return traceparent[36:52]


def is_sampled(traceparent: str) -> bool:
    """Return whether the caller's span is recorded; False without one."""
    return bool(int(traceparent[53:] or "0", 16) & 1)


class OrderKey(NamedTuple):
    """One order: the GUIDs of its company and of itself, canonical (lower case, no braces)."""

    company_id: str
    order_id: str

    @property
    def member(self) -> str:
        """Return the form used in zsets and at the end of keys."""
        return f"{self.company_id}:{self.order_id}"

    @property
    def packed(self) -> str:
        """Return the form in small sets, 44 characters: of a member of over 64 Redis would make a table per set."""
        return b64encode(UUID(self.company_id).bytes + UUID(self.order_id).bytes).decode()

    @classmethod
    def of(cls, member: str) -> OrderKey:
        """Return the order a zset member or key ending stands for."""
        company_id, order_id = member.split(":")
        return cls(company_id, order_id)

    @classmethod
    def of_packed(cls, packed: str) -> OrderKey:
        """Return the order that a member of such a set stands for."""
        both = b64decode(packed)
        return cls(str(UUID(bytes=both[:16])), str(UUID(bytes=both[16:])))
