"""Webhooks: the event as Business Central posts it, the subscriptions of NaviPartner's beta API, and the deliveries."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, NamedTuple

import httpx
import msgspec
from msgspec.structs import replace

from app.dev.sandbox.companies import Company
from app.dev.sandbox.counts import Counts
from app.dev.sandbox.faults import EVENT, Faults
from app.dev.sandbox.http import not_found
from app.dev.sandbox.settings import Settings, Shape
from app.dev.sandbox.values import event_timestamp, guid, utc

EVENT_NAME = "ota_cm_order_processed"
EVENT_VERSION = "1.0"
#: The NP Retail app, which the event belongs to.
APP_ID = "992c2309-cca4-43cb-9e41-911f482ec088"
ACTIVE = "Active"

_CONTEXT = "https://api.businesscentral.dynamics.com/v2.0/$metadata#externaleventsubscriptions"
_SENDERS = 16
_HEADERS = {"content-type": "application/json"}
_ENCODER = msgspec.json.Encoder()


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


class Delivery(NamedTuple):
    """One POST that is to be sent to a subscription."""

    subscription_id: str
    event: Event
    attempt: int = 1


class Webhooks:
    """The subscriptions of all companies, and the deliveries to them."""

    def __init__(self, settings: Settings, seed: int, faults: Faults, counts: Counts, versions: Iterator[int]) -> None:
        self._settings = settings
        self._seed = seed
        self._faults = faults
        self._counts = counts
        self._versions = versions
        self._by_company: defaultdict[str, dict[str, Subscription]] = defaultdict(dict)
        self._queue: asyncio.Queue[Delivery] = asyncio.Queue()
        #: Events that still have an attempt before them.
        self.pending = 0

    def listed(self, company_id: str) -> dict[str, Any]:
        """Return the answer of the list."""
        return {"@odata.context": _CONTEXT, "value": list(self._by_company[company_id].values())}

    def get(self, company_id: str, subscription_id: str) -> dict[str, Any]:
        """Return the answer for one subscription, which has the list's wrapper; raises Refusal (404)."""
        self._check(company_id, subscription_id)
        return {"@odata.context": _CONTEXT, "value": [self._by_company[company_id][subscription_id]]}

    def create(self, company: Company, new: NewSubscription) -> Subscription:
        """Add a subscription, Active at once."""
        version = next(self._versions)
        now = utc(time.time())
        user = guid("user", company.id)
        subscription = Subscription(
            etag=f'W/"{version}"',
            id=guid(self._seed, company.id, "subscription", version),
            company_id=company.id,
            timestamp=version,
            app_id=new.app_id,
            event_name=new.event_name,
            company_name=company.name,
            user_id=user,
            notification_url=new.notification_url,
            last_modified_date_time=now,
            client_state=new.client_state,
            event_version=new.event_version,
            system_created_at=now,
            system_created_by=user,
            system_modified_at=now,
            system_modified_by=user,
        )
        self._by_company[company.id][subscription.id] = subscription
        return subscription

    def delete(self, company_id: str, subscription_id: str) -> None:
        """Remove a subscription; raises Refusal (404)."""
        self._check(company_id, subscription_id)
        del self._by_company[company_id][subscription_id]

    def set_state(self, subscription_id: str, state: str) -> Subscription:
        """Set the state of a subscription of any company; only `Active` ones get events. Raises Refusal (404)."""
        for subscriptions in self._by_company.values():
            if subscription_id in subscriptions:
                changed = replace(subscriptions[subscription_id], subscription_state=state)
                subscriptions[subscription_id] = changed
                return changed
        raise not_found(f"Subscription '{subscription_id}'")

    def announce(self, company: Company, payload: Payload, timestamp: str | None = None) -> int:
        """Send an event to the active subscriptions, as the faults allow, and return their number.

        `timestamp` None is now.
        """
        timestamp = timestamp or event_timestamp()
        self._counts.order(company.id, payload.order_id).last_event = payload.status, timestamp
        active = [
            one
            for one in self._by_company[company.id].values()
            if one.subscription_state == ACTIVE and one.event_name.lower() == EVENT_NAME
        ]
        for subscription in active:
            event = Event(
                client_state=subscription.client_state,
                company_id=company.id,
                company_name=company.name,
                initiating_user_aad_object_id=guid("user", company.id),
                payload=payload,
                timestamp=timestamp,
            )
            self._enqueue(subscription, event)
        return len(active)

    @contextlib.asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """Send the deliveries as long as the block lasts."""
        limits = httpx.Limits(max_connections=_SENDERS, max_keepalive_connections=_SENDERS)
        # No proxy of the environment: events go where the subscription says.
        async with httpx.AsyncClient(limits=limits, headers=_HEADERS, trust_env=False) as client:
            senders = [asyncio.create_task(self._send_all(client)) for _ in range(_SENDERS)]
            try:
                yield
            finally:
                for sender in senders:
                    sender.cancel()
                await asyncio.wait(senders)

    def _check(self, company_id: str, subscription_id: str) -> None:
        if subscription_id not in self._by_company[company_id]:
            raise not_found(f"Subscription '{subscription_id}'")

    def _enqueue(self, subscription: Subscription, event: Event) -> None:
        company_id, order_id = event.company_id, event.payload.order_id
        faults = self._faults.strike(EVENT, company_id, order_id)
        if faults.of("lost"):
            self._counts.lost += 1
            return
        if faults.of("bad_secret"):
            event = replace(event, client_state=f"not-{event.client_state}"[:50])
        late = faults.of("late")
        for _ in range(2 if faults.of("duplicate") else 1):
            self._counts.event_fired(company_id, order_id)
            self.pending += 1
            self._put(Delivery(subscription.id, event), (late.seconds or 0.0) if late else 0.0)

    def _put(self, delivery: Delivery, after: float) -> None:
        if after:
            asyncio.get_running_loop().call_later(after, self._queue.put_nowait, delivery)
        else:
            self._queue.put_nowait(delivery)

    async def _send_all(self, client: httpx.AsyncClient) -> None:
        while True:
            await self._send(client, await self._queue.get())

    async def _send(self, client: httpx.AsyncClient, delivery: Delivery) -> None:
        settings, event = self._settings, delivery.event
        subscription = self._by_company[event.company_id].get(delivery.subscription_id)
        if subscription is None or subscription.subscription_state != ACTIVE:
            self._counts.lost += 1
            self.pending -= 1
            return
        result: int | str
        try:
            response = await client.post(
                subscription.notification_url,
                content=envelope((event,), settings.shape),
                timeout=settings.delivery_timeout,
            )
            result = response.status_code
        except Exception as error:  # whatever one address makes httpx raise, the other deliveries go on
            result = type(error).__name__
        self._counts.deliveries[str(result)] += 1
        acknowledged = isinstance(result, int) and 200 <= result < 300
        if acknowledged:
            self._counts.event_accepted(event.company_id, event.payload.order_id)
        if acknowledged or delivery.attempt == settings.attempts:
            self.pending -= 1
        else:
            self._put(delivery._replace(attempt=delivery.attempt + 1), settings.attempt_every)


def envelope(events: tuple[Event, ...], shape: Shape) -> bytes:
    """Return the body of a POST; "bare" is one event without a wrapper."""
    return _ENCODER.encode(events[0] if shape == "bare" else {shape: events})
