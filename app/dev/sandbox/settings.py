"""The settings of a sandbox, from the command line and from the admin API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Shape = Literal["values", "value", "bare"]


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The present settings; all parts of the sandbox share one instance.

    Limits: https://api.navipartner.com/limits. The rest is not documented upstream.
    """

    #: Seconds from Submitted to the end; upstream needs about 60.
    settle_after: Seconds = 0.5
    #: Milliseconds a getOrder takes, spent in one of the slots.
    latency_ms: Seconds = 0.0

    #: Calls of one API key processed at once.
    slots: Positive = 5
    #: Calls of one API key that may wait for a slot; one more is answered 429.
    queue: Count = 95
    #: Calls of one API key within `window` seconds; one more is answered 429.
    requests: Positive = 6000
    window: Seconds = 300.0

    #: The wrapper of an event; "bare" sends it without any.
    shape: Shape = "value"
    #: Attempts per event; 0: until 2xx. Upstream documents no retry, so the default is none.
    attempts: Count = 1
    #: Seconds between attempts, and seconds until an attempt times out.
    attempt_every: Seconds = 1.0
    delivery_timeout: Seconds = 10.0

    def change(self, part: dict[str, Any]) -> None:
        """Take the values of `part`; raises msgspec.ValidationError and changes nothing if one is not valid."""
        changed = msgspec.convert({**msgspec.structs.asdict(self), **part}, Settings)
        for name in part:
            setattr(self, name, getattr(changed, name))
