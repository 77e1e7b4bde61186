"""Webhook deliveries: gathering events into POSTs, sending them a few at a time, trying again if told to.

Webhook subscriptions of one company, as NaviPartner's beta webhook API shows them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import httpx
import msgspec
from msgspec.structs import replace

from app.dev.sandbox.company import Company
from app.dev.sandbox.events import APP_ID, EVENT_VERSION, Event, Tally, wrapped
from app.dev.sandbox.faults import EVENT, Faults
from app.dev.sandbox.http import bad_request, not_found
from app.dev.sandbox.settings import Settings, guid, moment

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


def read_wish(body: bytes) -> Wish:
    """Return what a body asks for; raises Refusal (400)."""
    try:
        return msgspec.json.decode(body, type=Wish)
    except (ValueError, RecursionError) as error:
        raise bad_request(str(error)) from None


_SENDERS = 16
# How long an event that another shall overtake waits for that other one.
_REORDER_WAIT = 1.0
_HEADERS = {"content-type": "application/json"}


class Post(NamedTuple):
    """One POST to be made; `then` are events that may only be sent after it."""

    subscription_id: str
    events: tuple[Event, ...]
    then: tuple[Event, ...] = ()
    attempt: int = 1


class Outbox:
    """What waits for one subscription: events to be gathered, and events to be overtaken."""

    __slots__ = ("gathered", "overtaken", "timer")

    def __init__(self) -> None:
        self.gathered: list[Event] = []
        self.overtaken: list[Event] = []
        self.timer: asyncio.TimerHandle | None = None


class Deliveries:
    """All deliveries of a run.

    `subscription` looks one up by id (None: deleted), `switched_off` is told when one is switched off for answering
    4xx too often.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        faults: Faults,
        tally: Tally,
        subscription: Callable[[str], Subscription | None],
        switched_off: Callable[[str], object],
    ) -> None:
        self._settings = settings
        self._faults = faults
        self._tally = tally
        self._subscription = subscription
        self._switched_off = switched_off
        self._outboxes: dict[str, Outbox] = {}
        self._posts: asyncio.Queue[Post] = asyncio.Queue()
        self._going = asyncio.Event()
        self._going.set()
        self._client_errors: dict[str, int] = {}
        #: Events that are neither answered for good nor given up.
        self.pending = 0

    async def run(self) -> None:
        """Send until cancelled."""
        limits = httpx.Limits(max_connections=_SENDERS, max_keepalive_connections=_SENDERS)
        async with (
            # Proxies and .netrc of the environment are none of ours: webhooks go where the subscription says.
            httpx.AsyncClient(limits=limits, headers=_HEADERS, trust_env=False) as client,
            asyncio.TaskGroup() as senders,
        ):
            for _ in range(_SENDERS):
                senders.create_task(self._send_all(client))

    def pause(self) -> None:
        """Send nothing more until `resume`."""
        self._going.clear()

    def resume(self) -> None:
        """Go on sending."""
        self._going.set()

    @property
    def paused(self) -> bool:
        """Return whether nothing is being sent."""
        return not self._going.is_set()

    def announce(self, subscription: Subscription, event: Event) -> None:
        """Hand an event to a subscription, as the faults in force let it pass."""
        copies, late, overtaken = 1, 0.0, False
        order = event.payload.order_id
        for fault, seconds in self._faults.strike(EVENT, event.company_id, order):
            match fault.kind:
                case "duplicate":
                    copies += fault.copies
                case "late":
                    late += seconds
                case "reorder":
                    overtaken = True
                case "bad_secret":
                    event = replace(event, client_state=f"not-{event.client_state}"[:50])
                case "lost":
                    self._tally.lost += 1
                    return
        for _ in range(copies):
            self._tally.event(event)
            self.pending += 1
            put = self._hold_back if overtaken else self._gather
            if late:
                asyncio.get_running_loop().call_later(late, put, subscription.id, event)
            else:
                put(subscription.id, event)

    def _outbox(self, subscription_id: str) -> Outbox:
        outbox = self._outboxes.get(subscription_id)
        if outbox is None:
            outbox = self._outboxes[subscription_id] = Outbox()
        return outbox

    def _hold_back(self, subscription_id: str, event: Event) -> None:
        outbox = self._outbox(subscription_id)
        outbox.overtaken.append(event)

        def nothing_came() -> None:
            if event in outbox.overtaken:
                outbox.overtaken.remove(event)
                self._gather(subscription_id, event)

        asyncio.get_running_loop().call_later(_REORDER_WAIT, nothing_came)

    def _gather(self, subscription_id: str, event: Event) -> None:
        settings, outbox = self._settings(), self._outbox(subscription_id)
        outbox.gathered.append(event)
        if settings.batch_window == 0 or settings.shape == "bare" or len(outbox.gathered) >= settings.batch_max:
            self._post(subscription_id)
        elif outbox.timer is None:
            loop = asyncio.get_running_loop()
            outbox.timer = loop.call_later(settings.batch_window, self._post, subscription_id)

    def _post(self, subscription_id: str) -> None:
        outbox = self._outbox(subscription_id)
        if outbox.timer is not None:
            outbox.timer.cancel()
            outbox.timer = None
        if not outbox.gathered:
            return
        events, then = tuple(outbox.gathered), tuple(outbox.overtaken)
        outbox.gathered, outbox.overtaken = [], []
        self._posts.put_nowait(Post(subscription_id, events, then))

    async def _send_all(self, client: httpx.AsyncClient) -> None:
        while True:
            post = await self._posts.get()
            await self._going.wait()
            # The shape may have been changed to "bare" after these were gathered.
            if self._settings().shape == "bare" and len(post.events) > 1:
                for event in post.events[:-1]:
                    self._posts.put_nowait(post._replace(events=(event,), then=()))
                self._posts.put_nowait(post._replace(events=post.events[-1:]))
                continue
            await self._send(client, post)

    async def _send(self, client: httpx.AsyncClient, post: Post) -> None:
        settings, subscription = self._settings(), self._subscription(post.subscription_id)
        if subscription is None or subscription.subscription_state != ACTIVE:
            self._tally.lost += len(post.events)
            self._done(post)
            return
        began, clock = time.time(), time.monotonic()
        answer: int | str
        try:
            response = await client.post(
                subscription.notification_url,
                content=wrapped(post.events, settings.shape),
                timeout=settings.delivery_timeout,
            )
            answer = response.status_code
        except Exception as error:  # whatever one address makes httpx raise, the other deliveries go on
            answer = type(error).__name__
        self._tally.delivery(
            subscription.id,
            subscription.notification_url,
            began,
            time.monotonic() - clock,
            post.attempt,
            answer,
            post.events,
        )
        self._mind_client_errors(settings, subscription.id, answer)
        well = isinstance(answer, int) and 200 <= answer < 300
        if well or post.attempt == settings.attempts:
            self._done(post)
        else:
            again = post._replace(attempt=post.attempt + 1)
            asyncio.get_running_loop().call_later(settings.attempt_every, self._posts.put_nowait, again)

    def _done(self, post: Post) -> None:
        self.pending -= len(post.events)
        for event in post.then:
            self._gather(post.subscription_id, event)

    def _mind_client_errors(self, settings: Settings, subscription_id: str, answer: int | str) -> None:
        """Switch off whoever answers 4xx again and again, as one forum report tells of Business Central."""
        if not (isinstance(answer, int) and 400 <= answer < 500):
            self._client_errors.pop(subscription_id, None)
            return
        count = self._client_errors[subscription_id] = self._client_errors.get(subscription_id, 0) + 1
        if count == settings.disable_after:
            self._switched_off(subscription_id)
