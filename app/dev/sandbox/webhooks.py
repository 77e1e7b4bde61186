"""Webhooks: the event as Business Central posts it, the subscriptions of NaviPartner's beta API, and the deliveries."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import msgspec
from msgspec.structs import replace

from app.dev.sandbox.faults import EVENT
from app.dev.sandbox.http import not_found
from app.dev.sandbox.values import Shape, Text, guid, utc
from app.dev.sandbox.world import Company, World

EVENT_NAME = "ota_cm_order_processed"
EVENT_VERSION = "1.0"
#: The NP Retail app, which the event belongs to.
APP_ID = "992c2309-cca4-43cb-9e41-911f482ec088"
ACTIVE = "Active"

_CONTEXT = "https://api.businesscentral.dynamics.com/v2.0/$metadata#externaleventsubscriptions"
_CONNECTIONS = 16
_TIMEOUT = 10.0

#: A subscription with upstream's fields in upstream's order.
Subscription = dict[str, Any]


class Payload(msgspec.Struct, frozen=True, rename="camel"):
    """The part of an event that names the order."""

    order_id: str
    buy_from_order_reference: str
    status: str


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One event of an envelope."""

    app_id: str = APP_ID
    client_state: str
    company_id: str
    company_name: str
    event_name: str = EVENT_NAME
    event_version: str = EVENT_VERSION
    initiating_user_aad_object_id: str = msgspec.field(name="initiatingUserAADObjectId")
    payload: Payload
    timestamp: str


class NewSubscription(msgspec.Struct, frozen=True, rename="camel"):
    """The body that creates a subscription."""

    notification_url: Text
    event_name: Text
    client_state: Annotated[str, msgspec.Meta(max_length=50)] = ""
    event_version: str = EVENT_VERSION
    app_id: str = APP_ID


class Webhooks:
    """The subscriptions of all companies, and the deliveries to them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._by_id: dict[str, Subscription] = {}
        self._deliveries: set[asyncio.Task[None]] = set()
        self._connections = asyncio.Semaphore(_CONNECTIONS)
        self._client: httpx.AsyncClient

    @property
    def pending(self) -> int:
        """Return how many events are still to be delivered."""
        return len(self._deliveries)

    @contextlib.asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """Send the deliveries as long as the block lasts."""
        headers = {"content-type": "application/json"}
        # No proxy of the environment: events go where the subscription says.
        async with httpx.AsyncClient(headers=headers, trust_env=False, timeout=_TIMEOUT) as self._client:
            yield

    def listed(self, company_id: str, subscription_id: str | None = None) -> dict[str, Any]:
        """Return the answer of the list, or of one subscription, which has the same wrapper; raises Refusal (404)."""
        if subscription_id is not None:
            found = [self._get(company_id, subscription_id)]
        else:
            found = [one for one in self._by_id.values() if one["companyId"] == company_id]
        return {"@odata.context": _CONTEXT, "value": found}

    def create(self, company: Company, new: NewSubscription) -> Subscription:
        """Add a subscription, Active at once; its clientState can be read back, and it does not expire."""
        version = next(self._world.versions)
        now, user = utc(time.time()), guid("user", company.id)
        subscription: Subscription = {
            "@odata.etag": f'W/"{version}"',
            "id": guid(self._world.seed, company.id, "subscription", version),
            "companyId": company.id,
            "timestamp": version,
            "appId": new.app_id,
            "eventName": new.event_name,
            "companyName": company.name,
            "userId": user,
            "notificationUrl": new.notification_url,
            "lastModifiedDateTime": now,
            "clientState": new.client_state,
            "subscriptionType": "Webhook",
            "eventVersion": new.event_version,
            "subscriptionState": ACTIVE,
            "systemCreatedAt": now,
            "systemCreatedBy": user,
            "systemModifiedAt": now,
            "systemModifiedBy": user,
        }
        self._by_id[subscription["id"]] = subscription
        return subscription

    def delete(self, company_id: str, subscription_id: str) -> None:
        """Remove a subscription; raises Refusal (404)."""
        del self._by_id[self._get(company_id, subscription_id)["id"]]

    def set_state(self, subscription_id: str, state: str) -> Subscription:
        """Set the state of a subscription of any company; only `Active` ones get events. Raises Refusal (404)."""
        changed = {**self._get(None, subscription_id), "subscriptionState": state}
        self._by_id[subscription_id] = changed
        return changed

    def announce(self, company: Company, payload: Payload, timestamp: str) -> int:
        """Send an event to the active subscriptions, as the faults allow, and return their number."""
        self._world.counts.orders[company.id, payload.order_id].last_event = payload.status, timestamp
        active = [
            one
            for one in self._by_id.values()
            if (one["companyId"], one["subscriptionState"]) == (company.id, ACTIVE)
            and one["eventName"].lower() == EVENT_NAME
        ]
        for subscription in active:
            event = Event(
                client_state=subscription["clientState"],
                company_id=company.id,
                company_name=company.name,
                initiating_user_aad_object_id=guid("user", company.id),
                payload=payload,
                timestamp=timestamp,
            )
            self._deliver(subscription, event)
        return len(active)

    def _get(self, company_id: str | None, subscription_id: str) -> Subscription:
        found = self._by_id.get(subscription_id)
        if found is None or company_id not in (None, found["companyId"]):
            raise not_found(f"Subscription '{subscription_id}'")
        return found

    def _deliver(self, subscription: Subscription, event: Event) -> None:
        """Start the deliveries of one event, none or several as the faults say."""
        world, order = self._world, (event.company_id, event.payload.order_id)
        faults = world.faults.strike(EVENT, *order)
        if "lost" in faults:
            world.counts.lost += 1
            return
        if "bad_secret" in faults:
            event = replace(event, client_state=f"not-{event.client_state}"[:50])
        late = faults["late"].seconds or 0.0 if "late" in faults else 0.0
        for _ in range(2 if "duplicate" in faults else 1):
            world.counts.orders[order].fired += 1
            delivery = asyncio.create_task(self._send(subscription, event, late))
            self._deliveries.add(delivery)
            delivery.add_done_callback(self._deliveries.discard)

    async def _send(self, subscription: Subscription, event: Event, late: float) -> None:
        """POST an event after `late` seconds until it is acknowledged, as often as the settings allow."""
        await asyncio.sleep(late)
        attempts = 1
        while not await self._post(subscription, event) and attempts != self._world.settings.attempts:
            attempts += 1
            await asyncio.sleep(self._world.settings.attempt_every)

    async def _post(self, subscription: Subscription, event: Event) -> bool:
        """POST an event once; return whether no further attempt is needed."""
        counts = self._world.counts
        async with self._connections:
            if self._by_id.get(subscription["id"]) != subscription:
                counts.lost += 1
                return True
            body = envelope((event,), self._world.settings.shape)
            try:
                response = await self._client.post(subscription["notificationUrl"], content=body)
            except Exception as error:  # whatever one address makes httpx raise, the other deliveries go on
                counts.deliveries[type(error).__name__] += 1
                return False
        counts.deliveries[str(response.status_code)] += 1
        if response.is_success:
            counts.orders[event.company_id, event.payload.order_id].accepted += 1
        return response.is_success


def envelope(events: tuple[Event, ...], shape: Shape) -> bytes:
    """Return the body of a POST; "bare" is one event without a wrapper."""
    return msgspec.json.encode(events[0] if shape == "bare" else {shape: events})
