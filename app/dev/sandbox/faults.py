"""Faults on demand: the rules, the calls and events they strike, and the answers they spoil."""

from __future__ import annotations

import time
from typing import Annotated, Literal, NamedTuple

import msgspec

from app.dev.sandbox.http import Answer, Refusal, no_order, refused
from app.dev.sandbox.settings import Positive, Seconds
from app.dev.sandbox.values import share

EVENT = "event"
_EVENT_KINDS = {"duplicate", "late", "bad_secret", "lost"}
_RUBBISH = b"<html><body><h1>The service is not there</h1></body></html>"

Kind = Literal[
    "status", "latency", "hang", "truncated", "cut", "rubbish", "wrong_order", "duplicate", "late", "bad_secret", "lost"
]


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rule.

    Kinds for calls: `status` answers `status` with `retry_after`, and with `code` and `message` or plain text (401,
    403 and 429 take no slot); `latency` adds `seconds`; `hang` keeps the slot for `seconds` (none: 480) and then
    answers 408; `truncated` is valid HTTP with half the JSON; `cut` breaks the connection in the middle of the body;
    `rubbish` is not JSON; `wrong_order` has another orderId.

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


class Rule:
    """A fault in force, and what it has struck."""

    def __init__(self, fault: Fault, number: int) -> None:
        self.fault = fault
        self.number = number
        self.struck = 0
        self._until = None if fault.lasts is None else time.monotonic() + fault.lasts
        #: Calls met per order (or operation); each call is drawn by itself.
        self._met: dict[str, int] = {}

    def strikes(self, seed: int, operation: str, company_id: str, order_id: str) -> bool:
        """Return whether the rule strikes this call, and count it."""
        fault = self.fault
        if (
            (fault.kind in _EVENT_KINDS) != (operation == EVENT)
            or fault.operation not in (None, operation)
            or fault.company_id not in (None, company_id)
            or fault.order_id not in (None, order_id)
            or (self._until is not None and time.monotonic() > self._until)
            or (fault.calls is not None and self.struck >= fault.calls)
        ):
            return False
        met = self._met[order_id] = self._met.get(order_id, 0) + 1
        if fault.first is not None and met > fault.first:
            return False
        if fault.rate < 1 and share(seed, "fault", self.number, order_id, met) >= fault.rate:
            return False
        self.struck += 1
        return True


class Strikes(NamedTuple):
    """The faults that strike one call."""

    faults: list[Fault]

    def of(self, kind: Kind) -> Fault | None:
        """Return the first fault of a kind."""
        return next((fault for fault in self.faults if fault.kind == kind), None)


class Faults:
    """All rules in force."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rules: list[Rule] = []
        self._number = 0

    def add(self, faults: list[Fault]) -> list[int]:
        """Add rules and return their numbers, which start at 1."""
        for fault in faults:
            self._number += 1
            self._rules.append(Rule(fault, self._number))
        return [rule.number for rule in self._rules[len(self._rules) - len(faults) :]]

    def clear(self) -> None:
        """Remove all rules."""
        self._rules = []

    def remove(self, number: int) -> None:
        """Remove a rule; an unknown number is fine."""
        self._rules = [rule for rule in self._rules if rule.number != number]

    def described(self) -> list[dict[str, object]]:
        """Return each rule with its number and how often it has struck."""
        return [
            {"number": rule.number, "struck": rule.struck, **msgspec.structs.asdict(rule.fault)} for rule in self._rules
        ]

    def strike(self, operation: str, company_id: str, order_id: str) -> Strikes:
        """Return the faults that strike this call, or this event of an order."""
        return Strikes(
            [rule.fault for rule in self._rules if rule.strikes(self._seed, operation, company_id, order_id)]
        )


def status_answer(fault: Fault, order_id: str) -> Answer:
    """Return the answer of a `status` fault; 403 and 404 without code and message get upstream's own."""
    if fault.code is None and fault.message is None and fault.status == 404:
        answer = refused(no_order(order_id))
    elif fault.code is None and fault.message is None and fault.status == 403:
        answer = refused(Refusal(403, "generic_error", "Missing permissions: NPR API Channel Mgr"))
    else:
        answer = refused(Refusal(fault.status, fault.code, fault.message or f"Status {fault.status}"))
    return answer if fault.retry_after is None else answer._replace(retry_after=str(fault.retry_after))


def spoilt(answer: Answer, fault: Fault, order_id: str, other_id: str) -> Answer:
    """Return a good answer as a fault changes it."""
    match fault.kind:
        case "truncated":
            return answer._replace(body=answer.body[: len(answer.body) // 2], sound=False)
        case "cut":
            return answer._replace(sound=False, breaks_off=True)
        case "rubbish":
            return answer._replace(body=_RUBBISH, content_type=b"text/html", sound=False)
        case "wrong_order":
            body = answer.body.replace(order_id.encode(), other_id.encode())
            return answer._replace(body=body, sound=False)
    return answer
