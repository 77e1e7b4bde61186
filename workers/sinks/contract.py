"""What a sink gets and what it may raise: the part of our code that a user's own sink uses."""

from __future__ import annotations

from datetime import timedelta
from typing import Final, Protocol

import msgspec

from app.order_document import OrderDocument
from app.texts import printable

LONGEST_REASON: Final = 200
"""Characters of the reason of a Reject; the rest is cut."""


class Context(msgspec.Struct, frozen=True):
    """What a sink gets with the order.

    `idempotency_key` is company/order/revision/digest: the same for every repeat of this revision, and for no other
    content. `attempt` counts from 1, without those that ended with Retry. `fetched_at`: when the Channel Manager last
    answered with this content, in ms since 1970. `traceparent` (W3C) continues the trace of this delivery, or else of
    the event; "" without one.
    """

    idempotency_key: str
    company_id: str
    order_id: str
    revision: int
    attempt: int
    request_id: str
    fetched_at: int
    traceparent: str = ""


class Retry(Exception):
    """Raised by a sink that wants this revision at another time. It is no failure and uses no attempt."""

    seconds = 0.0

    def __init__(self, *, after: float | timedelta) -> None:
        """Ask for the next call `after` so many seconds; from 5 s up to 2 h, and others are cut to these.

        Raises ValueError for a negative number and for NaN.
        """
        self.seconds = after.total_seconds() if isinstance(after, timedelta) else float(after)
        if not self.seconds >= 0:
            raise ValueError("after is negative, or no number")
        super().__init__(self.seconds)


class Reject(Exception):
    """Raised by a sink that will never take this revision: it is a dead letter at once.

    Its reason is logged and shown, on one line of 200 characters at most, so it must not hold people's data.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)

    @property
    def reason(self) -> str:
        text = str(self.args[0]) if self.args else ""
        return printable(" ".join(text.split()))[:LONGEST_REASON] or "no reason given"


class Failed(Exception):
    """Raised by a sink of ours for a failed attempt that its `reason` explains.

    It is text of ours without data, such as `HTTP 422`, and is shown instead of type and place.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Unavailable(Failed):
    """Raised by a sink whose destination cannot take any order now: away, overloaded, full.

    Several in a row let all deliveries of the sink wait. `after`: seconds that the destination asked to wait.
    """

    def __init__(self, reason: str, *, after: float | None = None) -> None:
        self.after = after
        super().__init__(reason)


class Disable(Exception):
    """Raised by a sink whose destination wants nothing more: nothing is delivered until an operator enables it.

    It uses no attempt. `reason` is text of ours without data, such as `HTTP 410`.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Sink(Protocol):
    """One sink in one process, which delivers one revision at a time."""

    package: str
    """The top package of its code: the place of an error is searched there."""

    def deliver(self, document: OrderDocument, context: Context) -> None:
        """Deliver a revision, at least once.

        Raises Retry, Reject, Unavailable, Disable, or anything else for a failed attempt. Opens what it needs with its
        first call.
        """
