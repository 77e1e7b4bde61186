"""Every error of the service, in one tree. Reason codes are snake_case and appear unchanged in logs and metrics.

Errors of the tools for laptops and tests stand beside them in app/dev, the end of a command in app/cli/command.py.
"""

from __future__ import annotations


class ReceiverError(Exception):
    """Base of every error that this project raises on purpose."""


class SettingsError(ReceiverError):
    """The settings are incomplete or wrong; the text names every problem and no value."""


class StoreUnavailable(ReceiverError):
    """Redis did not do what it was asked; the text is one line for people, without password or foreign text."""


class OtherSchema(StoreUnavailable):
    """Redis holds data of another schema version, `held`; nothing was read or written. `ours` is what we need."""

    def __init__(self, held: str, ours: int) -> None:
        self.held = held[:20]
        advice = "upgrade the receiver, or correct REDIS_URL"
        if self.held.isdigit() and int(self.held) < ours:
            advice = "use an empty Redis (the order list fills it again), or the release that wrote it"
        text = f"Redis holds data of schema version {self.held}, this receiver needs version {ours}: {advice}"
        super().__init__(text)


class OtherDeployment(ReceiverError):
    """Another deployment uses this Redis under the same prefix; `otherwise` is what to do if it should be ours."""

    def __init__(self, reason: str, otherwise: str) -> None:
        advice = f"set another REDIS_URL or KEY_PREFIX here, or {otherwise}"
        super().__init__(f"Redis is used by another deployment: {reason}: {advice}")


class OldServer(StoreUnavailable):
    """The server lacks commands that the scripts need."""

    def __init__(self, found: str, lowest: str) -> None:
        super().__init__(f"the server is {found}: {lowest} or later is needed")


class BrokenRecord(ReceiverError):
    """The key of an order's record holds something that none of our scripts writes."""

    def __init__(self, order_id: str, key: str) -> None:
        self.order_id = order_id
        super().__init__(f"The record of order {order_id} is unreadable: look at {key} in Redis.")


class NotKnown(ReceiverError):
    """The order has no record here, or no such revision; the text is a sentence for people."""


class Denied(ReceiverError):
    """No call to upstream now; `wait_ms` until the next attempt.

    `reason` is throttled, breaker_open, window_full or permits_full.
    """

    def __init__(self, wait_ms: int, reason: str) -> None:
        super().__init__(reason)
        self.wait_ms = wait_ms
        self.reason = reason


class BadExpected(ReceiverError):
    """The CSV of expected orders cannot be used; the text names each line and its problem."""


class UnknownCursor(ReceiverError):
    """A cursor of the feed or of a list that was never given."""


class RequestRefused(ReceiverError):
    """The sender gets the HTTP status and the reason code; 503: it must keep its events and send them again."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Unauthenticated(RequestRefused):
    """No item carries a clientState of its company; `company` is the id that most of them name, or `unknown`."""

    def __init__(self, company: str) -> None:
        super().__init__(401, "unauthenticated")
        self.company = company


class NotRecorded(RequestRefused):
    """Neither Redis nor the spool took the events. `error` names the underlying error; `cause` is a sentence."""

    def __init__(self, reason: str, error: str, cause: str = "") -> None:
        super().__init__(503, reason)
        self.error = error
        self.cause = cause


class UpstreamError(ReceiverError):
    """A call to the Channel Manager failed.

    `http_status` is None without an answer. `retry_after` is in seconds from now, None if not given.
    """

    def __init__(self, reason: str, *, http_status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.http_status = http_status
        self.retry_after = retry_after


class OrderNotFound(UpstreamError):
    """404 with code `resource_not_found`."""


class RequestRejected(UpstreamError):
    """400: also every unhandled AL error (upstream.md 5), so a few attempts are worth it."""


class ConnectionFault(UpstreamError):
    """401, 403, a redirect, or a 404 of another code: the key, the permission or the address is wrong."""


class Throttled(UpstreamError):
    """429: a limit of the API key was exceeded."""


class Unavailable(UpstreamError):
    """The answer was 408 or 5xx, or none came."""


class UnreadableAnswer(UpstreamError):
    """The answer was 200, but its body is not an order."""
