"""The event as Business Central posts it, and the three wrappers it is documented to come in."""

from __future__ import annotations

import msgspec

from app.dev.sandbox.settings import Shape

EVENT_NAME = "ota_cm_order_processed"
EVENT_VERSION = "1.0"
#: The NP Retail app, which the event belongs to.
APP_ID = "992c2309-cca4-43cb-9e41-911f482ec088"

_ENCODER = msgspec.json.Encoder()


class Payload(msgspec.Struct, frozen=True, rename="camel"):
    """What travels: not more than these three."""

    order_id: str
    buy_from_order_reference: str
    status: str


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One element of a delivery."""

    app_id: str = APP_ID
    client_state: str
    company_id: str
    company_name: str
    event_name: str = EVENT_NAME
    event_version: str = EVENT_VERSION
    initiating_user_aad_object_id: str = msgspec.field(name="initiatingUserAADObjectId")
    payload: Payload
    timestamp: str


def wrapped(events: tuple[Event, ...], shape: Shape) -> bytes:
    """Return the body of a POST; "bare" carries one event and no wrapper."""
    return _ENCODER.encode(events[0] if shape == "bare" else {shape: events})
