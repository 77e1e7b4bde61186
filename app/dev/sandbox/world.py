"""All that one sandbox holds, put together; nothing is open before `run`."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from itertools import count

from app.dev.sandbox.book import Book, Row
from app.dev.sandbox.company import Companies, Company
from app.dev.sandbox.deliveries import Deliveries, Subscription, Subscriptions
from app.dev.sandbox.events import EVENT_NAME, Event, Payload, Tally
from app.dev.sandbox.faults import Faults
from app.dev.sandbox.http import Refusal
from app.dev.sandbox.limits import Gate
from app.dev.sandbox.orders import Order
from app.dev.sandbox.settings import Settings, guid, timestamp

_FIRST_VERSION = 100_001


class World:
    """The companies, their orders and subscriptions, and everything that watches or disturbs them."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.faults = Faults(seed)
        self.tally = Tally()
        self.companies = Companies()
        self.gates: defaultdict[str, Gate] = defaultdict(Gate)
        self.deliveries = Deliveries(
            lambda: self.settings,
            self.faults,
            self.tally,
            self.subscription,
            lambda subscription_id: self.switch(subscription_id, "Disabled"),
        )
        self._versions = count(_FIRST_VERSION)
        self._books: dict[str, Book] = {}
        self._subscriptions: dict[str, Subscriptions] = {}

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Deliver events as long as the block lasts."""
        sending = asyncio.create_task(self.deliveries.run())
        try:
            yield
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending

    def book(self, company: Company) -> Book:
        """Return the orders of a company."""
        book = self._books.get(company.id)
        if book is None:
            address = company.address
            book = self._books[company.id] = Book(
                lambda: self.companies.at(address),
                self.seed,
                self._versions,
                lambda: self.settings.settle_after,
                self.settled,
            )
        return book

    def subscriptions(self, company: Company) -> Subscriptions:
        """Return the webhook subscriptions of a company."""
        found = self._subscriptions.get(company.id)
        if found is None:
            found = self._subscriptions[company.id] = Subscriptions(self.seed, self._versions)
        return found

    def subscription(self, subscription_id: str) -> Subscription | None:
        """Return a subscription of whichever company, None if it is gone."""
        found = (one.find(subscription_id) for one in self._subscriptions.values())
        return next(filter(None, found), None)

    def switch(self, subscription_id: str, state: str) -> Subscription:
        """Set the state of a subscription, whichever company's; raises Refusal (404)."""
        for subscriptions in self._subscriptions.values():
            if subscriptions.find(subscription_id):
                return subscriptions.switch(subscription_id, state)
        raise Refusal(404, "resource_not_found", "there is no such subscription")

    def settled(self, company: Company, order: Order) -> None:
        """Note that an order has settled in the background, and announce it."""
        self.tally.settlement(company.id, order.order_id)
        self.announce(company, order, order.status, None)

    def announce(self, company: Company, order: Order, status: str, at: str | None) -> int:
        """Fire the event of an order with the timestamp `at` (None: now); return how many are told."""
        payload = Payload(order.order_id, order.buy_from_order_reference, status)
        return self.repeat(company, payload, at)

    def repeat(self, company: Company, payload: Payload, at: str | None) -> int:
        """Fire an event whose order may be gone; return how many subscriptions are told."""
        at = at or timestamp(self.settings.digits)
        self.tally.order(company.id, payload.order_id).last = payload, at
        told = self.subscriptions(company).told_of(EVENT_NAME)
        for subscription in told:
            event = Event(
                client_state=subscription.client_state,
                company_id=company.id,
                company_name=company.name,
                initiating_user_aad_object_id=guid("user", company.id),
                payload=payload,
                timestamp=at,
            )
            self.deliveries.announce(subscription, event)
        return len(told)

    def find(self, order_id: str, company_id: str | None) -> tuple[Company, Row]:
        """Return an order and its company; raises Refusal (404)."""
        for company in self.companies:
            if company_id in (None, company.id):
                with contextlib.suppress(Refusal):
                    return company, self.book(company).get(order_id)
        raise Refusal(404, "resource_not_found", "there is no such order")

    def last_announced(self, order_id: str, company_id: str | None) -> tuple[Company, Payload, str | None]:
        """Return what was last fired for an order, which may be gone; raises Refusal (404)."""
        for company in self.companies:
            counts = self.tally.orders.get((company.id, order_id))
            if company_id in (None, company.id) and counts is not None and counts.last is not None:
                return company, *counts.last
        company, row = self.find(order_id, company_id)
        order = row.order
        return company, Payload(order_id, order.buy_from_order_reference, order.status), None
