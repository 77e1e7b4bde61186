"""What goes wrong on demand: rules, and whom they strike, the same again for the same seed."""

from __future__ import annotations

import time
from typing import Annotated, Literal, NamedTuple

import msgspec

from app.dev.sandbox.settings import share

EVENT = "event"
_EVENT_KINDS = {"duplicate", "late", "reorder", "bad_secret", "lost"}

Kind = Literal[
    "status",
    "latency",
    "hang",
    "truncated",
    "cut",
    "rubbish",
    "wrong_order",
    "duplicate",
    "late",
    "reorder",
    "bad_secret",
    "lost",
]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rule.

    Calls: `status` answers `status` (401, 403, 429 before a slot is taken, the rest in it) with `retry_after`, and
    with `code` and `message` or plain text; `latency` adds `seconds`, up to `spread` more or less; `hang` keeps the
    slot for `seconds` (none: to the operation limit) and then says 408; `truncated` is sound HTTP around half the
    JSON, `cut` breaks the connection in the middle, `rubbish` is no JSON; `wrong_order` is about another orderId.

    Events: `duplicate` sends `copies` more with the same timestamp; `late` waits `seconds`; `reorder` lets the next
    event of the subscription go first; `bad_secret` spoils the clientState; `lost` sends nothing.
    """

    kind: Kind
    operation: str | None = None
    company_id: str | None = None
    order_id: str | None = None
    rate: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    calls: _Positive | None = None
    first: _Positive | None = None
    lasts: _Seconds | None = None
    seconds: _Seconds | None = None
    spread: _Seconds = 0.0
    status: Annotated[int, msgspec.Meta(ge=300, le=599)] = 503
    code: str | None = None
    message: str | None = None
    retry_after: str | int | None = None
    copies: _Positive = 1


class Strike(NamedTuple):
    """A rule that has met its call; `seconds` are drawn evenly from `seconds` ± `spread` for each."""

    fault: Fault
    seconds: float


class Armed:
    """A rule in force, and whom it has met."""

    __slots__ = ("fault", "met", "number", "struck", "until")

    def __init__(self, fault: Fault, number: int) -> None:
        self.fault = fault
        self.number = number
        self.until = None if fault.lasts is None else time.monotonic() + fault.lasts
        self.struck = 0
        #: How often each order (or operation) was met; each meeting has its own die.
        self.met: dict[str, int] = {}

    def meet(self, seed: int, operation: str, company_id: str, subject: str) -> Strike | None:
        """Decide on one call, and remember it; None: it passes."""
        fault = self.fault
        if (
            (fault.kind in _EVENT_KINDS) != (operation == EVENT)
            or (fault.operation is not None and fault.operation != operation)
            or (fault.company_id is not None and fault.company_id != company_id)
            or (fault.order_id is not None and fault.order_id != subject)
            or (self.until is not None and time.monotonic() > self.until)
            or (fault.calls is not None and self.struck >= fault.calls)
        ):
            return None
        met = self.met[subject] = self.met.get(subject, 0) + 1
        if fault.first is not None and met > fault.first:
            return None
        if fault.rate < 1 and share(seed, "fault", self.number, subject, met) >= fault.rate:
            return None
        self.struck += 1
        drawn = share(seed, "seconds", self.number, subject, met)
        return Strike(fault, max(0.0, (fault.seconds or 0.0) + fault.spread * (2 * drawn - 1)))


class Faults:
    """All rules in force."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._armed: list[Armed] = []
        self._number = 0

    def add(self, faults: list[Fault]) -> list[Armed]:
        """Put rules into force; they are numbered from 1 in the order they come."""
        added = []
        for fault in faults:
            self._number += 1
            added.append(Armed(fault, self._number))
        self._armed += added
        return added

    def set(self, faults: list[Fault]) -> list[Armed]:
        """Put rules into force instead of all there are."""
        self._armed = []
        return self.add(faults)

    def drop(self, number: int) -> None:
        """Lift a rule; one that is gone already is fine."""
        self._armed = [one for one in self._armed if one.number != number]

    def described(self) -> list[dict[str, object]]:
        """Return each rule with its number and how often it has struck."""
        return [
            {"number": one.number, "struck": one.struck, **msgspec.structs.asdict(one.fault)} for one in self._armed
        ]

    def strike(self, operation: str, company_id: str, subject: str) -> list[Strike]:
        """Return the faults that this call, or this event of an order, meets."""
        met = (one.meet(self._seed, operation, company_id, subject) for one in self._armed)
        return [strike for strike in met if strike is not None]
