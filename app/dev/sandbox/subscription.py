"""Webhook subscriptions of one company, as NaviPartner's beta webhook API shows them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from app.dev.sandbox.company import Company
from app.dev.sandbox.event import APP_ID, EVENT_VERSION
from app.dev.sandbox.mint import guid, moment
from app.dev.sandbox.refusal import bad_request, not_found

ACTIVE = "Active"
_CONTEXT = "https://api.businesscentral.dynamics.com/v2.0/$metadata#externaleventsubscriptions"


class Wish(msgspec.Struct, frozen=True, rename="camel"):
    """The body that creates a subscription."""

    notification_url: Annotated[str, msgspec.Meta(min_length=1)]
    event_name: Annotated[str, msgspec.Meta(min_length=1)]
    client_state: Annotated[str, msgspec.Meta(max_length=50)] = ""
    event_version: str = EVENT_VERSION
    app_id: str = APP_ID


class Subscription(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One subscription; its clientState can be read back, and it does not expire."""

    etag: str = msgspec.field(name="@odata.etag")
    id: str
    company_id: str
    timestamp: int
    app_id: str
    event_name: str
    company_name: str
    user_id: str
    notification_url: str
    last_modified_date_time: str
    client_state: str
    subscription_type: str = "Webhook"
    event_version: str
    subscription_state: str = ACTIVE
    system_created_at: str
    system_created_by: str
    system_modified_at: str
    system_modified_by: str


class Subscriptions:
    """The subscriptions of one company."""

    def __init__(self, seed: int, versions: Iterator[int]) -> None:
        self._seed = seed
        self._versions = versions
        self._by_id: dict[str, Subscription] = {}

    def listed(self) -> dict[str, Any]:
        """Return the answer of the list."""
        return {"@odata.context": _CONTEXT, "value": list(self._by_id.values())}

    def one(self, subscription_id: str) -> dict[str, Any]:
        """Return the answer for one, which is documented in the list's wrapper; raises Refusal (404)."""
        return {"@odata.context": _CONTEXT, "value": [self.get(subscription_id)]}

    def find(self, subscription_id: str) -> Subscription | None:
        """Return a subscription, None if there is no such one."""
        return self._by_id.get(subscription_id)

    def get(self, subscription_id: str) -> Subscription:
        """Return a subscription; raises Refusal (404)."""
        subscription = self.find(subscription_id)
        if subscription is None:
            raise not_found(f"Subscription '{subscription_id}'")
        return subscription

    def create(self, company: Company, wish: Wish) -> Subscription:
        """Enter a subscription, Active at once."""
        version = next(self._versions)
        now = moment(time.time())
        user = guid("user", company.id)
        subscription = Subscription(
            etag=f'W/"{version}"',
            id=guid(self._seed, company.id, "subscription", len(self._by_id), version),
            company_id=company.id,
            timestamp=version,
            app_id=wish.app_id,
            event_name=wish.event_name,
            company_name=company.name,
            user_id=user,
            notification_url=wish.notification_url,
            last_modified_date_time=now,
            client_state=wish.client_state,
            event_version=wish.event_version,
            system_created_at=now,
            system_created_by=user,
            system_modified_at=now,
            system_modified_by=user,
        )
        self._by_id[subscription.id] = subscription
        return subscription

    def delete(self, subscription_id: str) -> None:
        """Drop a subscription; raises Refusal (404)."""
        self.get(subscription_id)
        del self._by_id[subscription_id]

    def switch(self, subscription_id: str, state: str) -> Subscription:
        """Set the state of a subscription; only `Active` ones are told anything. Raises Refusal (404)."""
        subscription = msgspec.structs.replace(self.get(subscription_id), subscription_state=state)
        self._by_id[subscription_id] = subscription
        return subscription

    def told_of(self, event_name: str) -> list[Subscription]:
        """Return the Active subscriptions to an event."""
        return [
            one
            for one in self._by_id.values()
            if one.subscription_state == ACTIVE and one.event_name.lower() == event_name
        ]


def wish(body: bytes) -> Wish:
    """Return what a body asks for; raises Refusal (400)."""
    try:
        return msgspec.json.decode(body, type=Wish)
    except (ValueError, RecursionError) as error:
        raise bad_request(str(error)) from None
