"""The subscription that makes upstream send us events (upstream.md 3).

Upstream shows the clientState of every subscription to whoever lists them, so it becomes a secret as it is read.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import SecretStr

from app.errors import UnreadableAnswer
from app.upstream.wire import Part, build, build_all, decode

EVENT_NAME = "ota_cm_order_processed"
EVENT_VERSION = "1.0"


class Subscription(Part, frozen=True):
    """One subscription; `subscription_state` other than "Active" means that no events come."""

    shown = ("id", "company_id", "event_name", "subscription_state", "client_state")

    id: str | None = None
    company_id: str | None = None
    company_name: str | None = None
    app_id: str | None = None
    event_name: str | None = None
    event_version: str | None = None
    notification_url: str | None = None
    client_state: SecretStr | None = None
    subscription_type: str | None = None
    subscription_state: str | None = None
    last_modified_date_time: datetime | None = None

    @property
    def active(self) -> bool:
        return self.subscription_state == "Active"


def parse_subscriptions(raw: bytes) -> tuple[Subscription, ...]:
    """Return the subscriptions in the body of an answer, be it `{"value": [...]}` or a plain list.

    Raises UnreadableAnswer if it is neither.
    """
    tree = decode(raw)
    listed = tree.get("value") if isinstance(tree, dict) else tree
    if not isinstance(listed, list):
        raise UnreadableAnswer("unreadable_answer")
    return build_all(Subscription, listed)


def parse_created(raw: bytes) -> Subscription:
    """Return the subscription in the answer to its creation; every field is None if the answer has no body.

    NaviPartner documents a body, Microsoft's API underneath answers 201 without one (upstream.md 3).
    """
    return build(Subscription, decode(raw) if raw.strip() else {})
