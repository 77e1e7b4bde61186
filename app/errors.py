"""Everything that can go wrong, in one tree; each error carries its reason code and whether trying again can help.

    ReceiverError
    ├── SettingsError               the service must not start like this
    ├── StoreUnavailable            Redis did not answer the command line (app/ledger/redis.py)
    │   └── OtherSchema               its data is of a newer version of ours (app/ledger/redis.py)
    ├── Stop                        a command ends with a sentence and an exit code (app/cli/console.py)
    ├── RequestRefused              the sender gets an HTTP status and the reason code
    │   ├── MalformedEnvelope       400
    │   ├── Unauthenticated         401
    │   ├── BodyTooSlow             408
    │   ├── BodyTooLarge            413
    │   ├── TryLater                503 with Retry-After: too many requests at once, or this process ends
    │   └── NotRecorded             503 with Retry-After: nothing could hold the events
    └── UpstreamError               getOrder and its siblings
        ├── OrderNotFound           404 `resource_not_found`: not yet, gone, or never there
        ├── RequestRejected         400: a few tries, then a dead letter
        ├── ConnectionFault         401, 403, 3xx, unknown tenant: the fault of the key or the address, not of the order
        ├── Throttled               429: try again, for all workers of that key not before `retry_after`
        ├── Unavailable             408, 5xx, time-out, network: try again
        └── UnreadableAnswer        200 with something that is no order: a few tries, then a dead letter

A reason code is snake_case and travels whole: log line, metric label, dead letter, answer body.
"""

from __future__ import annotations

from typing import ClassVar


class ReceiverError(Exception):
    """Base of all errors this project raises on purpose."""


class SettingsError(ReceiverError):
    """The settings are incomplete or wrong; the text names every problem, and never a value."""


class RequestRefused(ReceiverError):
    """A request is answered with `status` and the reason code."""

    status: ClassVar[int]

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class MalformedEnvelope(RequestRefused):
    """The body is not one of the three envelope shapes."""

    status = 400


class Unauthenticated(RequestRefused):
    """No item of the envelope carries a valid clientState of its own company."""

    status = 401

    def __init__(self) -> None:
        super().__init__("unauthenticated")


class BodyTooSlow(RequestRefused):
    """The body did not arrive in time."""

    status = 408

    def __init__(self) -> None:
        super().__init__("body_too_slow")


class BodyTooLarge(RequestRefused):
    """The body is larger than MAX_BODY_BYTES."""

    status = 413

    def __init__(self) -> None:
        super().__init__("body_too_large")


class TryLater(RequestRefused):
    """This process cannot take the request now (`overloaded`, `shutting_down`); the sender must keep its events."""

    status = 503


class NotRecorded(RequestRefused):
    """Nothing durable could take the events; the sender must keep them. `cause` names the error behind it."""

    status = 503

    def __init__(self, reason: str, cause: str) -> None:
        super().__init__(reason)
        self.cause = cause


class UpstreamError(ReceiverError):
    """The Channel Manager did not give what was asked.

    `http_status` is None when no answer came; `retry_after` is in seconds from now, None when not given.
    """

    def __init__(self, reason: str, *, http_status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.http_status = http_status
        self.retry_after = retry_after


class OrderNotFound(UpstreamError):
    """404 with code `resource_not_found`."""


class RequestRejected(UpstreamError):
    """400: also every unhandled AL error (upstream.md 5), so a few tries are worth it."""


class ConnectionFault(UpstreamError):
    """The key, the permission or the address is wrong; no order is at fault and none is given up for it."""


class Throttled(UpstreamError):
    """429: a limit of the API key was passed."""


class Unavailable(UpstreamError):
    """The answer was 408 or 5xx, or none came."""


class UnreadableAnswer(UpstreamError):
    """The answer was 200, but its body is no order."""
