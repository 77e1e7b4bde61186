"""Faults on demand: the rules, the calls and events they strike, and the answers they spoil."""

from __future__ import annotations

import math
import time
from collections import Counter
from itertools import count
from typing import Annotated, Literal

import msgspec

from app.dev.sandbox.http import Answer, Refusal, forbidden, no_order
from app.dev.sandbox.values import Positive, Seconds, guid, share

EVENT = "event"
_EVENT_KINDS = {"duplicate", "late", "bad_secret", "lost"}
_RUBBISH = b"<html><body><h1>The service is not there</h1></body></html>"

Kind = Literal[
    "status", "latency", "hang", "truncated", "cut", "rubbish", "wrong_order", "duplicate", "late", "bad_secret", "lost"
]


class Fault(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the admin API adds as one rule.

    Kinds for calls: `status` answers `status` with `retry_after`, and with `code` and `message` or plain text (401,
    403 and 429 take no slot; 403 and 404 without code and message are upstream's own); `latency` adds `seconds`;
    `hang` keeps the slot for `seconds` (none: 480) and then answers 408; `truncated` is valid HTTP with half the JSON;
    `cut` breaks the connection in the middle of the body; `rubbish` is not JSON; `wrong_order` has another orderId.

    Kinds for events: `duplicate` sends the event once more with the same timestamp; `late` sends it after `seconds`;
    `bad_secret` sends a wrong clientState; `lost` sends nothing.

    A rule strikes only calls of its `operation`, `company_id` and `order_id` (lower case), a share `rate` of them, the
    next `calls` of them, the `first` calls of each order, or for the next `lasts` seconds.
    """

    kind: Kind
    operation: str | None = None
    company_id: str | None = None
    order_id: str | None = None
    rate: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    calls: Positive | None = None
    first: Positive | None = None
    lasts: Seconds | None = None
    seconds: Seconds | None = None
    status: Annotated[int, msgspec.Meta(ge=300, le=599)] = 503
    code: str | None = None
    message: str | None = None
    retry_after: str | int | None = None


class Rule(Fault, kw_only=True):
    """A fault in force until a monotonic time, and how often it has struck."""

    number: int
    until: float
    struck: int = 0


class Faults:
    """All rules in force; the seed decides which calls a `rate` strikes."""

    def __init__(self, seed: int) -> None:
        self.rules: list[Rule] = []
        self._seed = seed
        self._numbers = count(1)
        #: Calls met per rule and order (or operation); each call is drawn by itself.
        self._met: Counter[tuple[int, str]] = Counter()

    def add(self, faults: list[Fault]) -> list[int]:
        """Add rules and return their numbers."""
        added = [
            Rule(
                **msgspec.structs.asdict(fault),
                number=next(self._numbers),
                until=math.inf if fault.lasts is None else time.monotonic() + fault.lasts,
            )
            for fault in faults
        ]
        self.rules += added
        return [rule.number for rule in added]

    def strike(self, operation: str, company_id: str, order_id: str) -> dict[Kind, Fault]:
        """Return the faults that strike this call, or this event of an order, and count them."""
        struck: dict[Kind, Fault] = {}
        for rule in self.rules:
            if self._strikes(rule, operation, company_id, order_id):
                rule.struck += 1
                struck.setdefault(rule.kind, rule)
        return struck

    def _strikes(self, rule: Rule, operation: str, company_id: str, order_id: str) -> bool:
        if (
            (rule.kind in _EVENT_KINDS) != (operation == EVENT)
            or rule.operation not in (None, operation)
            or rule.company_id not in (None, company_id)
            or rule.order_id not in (None, order_id)
            or time.monotonic() > rule.until
            or (rule.calls is not None and rule.struck >= rule.calls)
        ):
            return False
        self._met[rule.number, order_id] += 1
        met = self._met[rule.number, order_id]
        if rule.first is not None and met > rule.first:
            return False
        return rule.rate == 1 or share(self._seed, "fault", rule.number, order_id, met) < rule.rate


def status_answer(fault: Fault, order_id: str) -> Answer:
    """Return the answer of a `status` fault."""
    refusal = Refusal(fault.status, fault.code, fault.message or f"Status {fault.status}")
    if fault.code is fault.message is None and fault.status in (403, 404):
        refusal = forbidden() if fault.status == 403 else no_order(order_id)
    return refusal.answer._replace(retry_after=None if fault.retry_after is None else str(fault.retry_after))


def spoilt(answer: Answer, kind: Kind, order_id: str) -> Answer:
    """Return a good answer as a fault changes it."""
    match kind:
        case "truncated":
            return answer._replace(body=answer.body[: len(answer.body) // 2], sound=False)
        case "cut":
            return answer._replace(sound=False, breaks_off=True)
        case "rubbish":
            return answer._replace(body=_RUBBISH, content_type=b"text/html", sound=False)
        case "wrong_order":
            other = guid("other", order_id)
            return answer._replace(body=answer.body.replace(order_id.encode(), other.encode()), sound=False)
    return answer
