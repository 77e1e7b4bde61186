"""All state of one sandbox, put together; nothing is open before `webhooks.sending()`."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from functools import partial
from itertools import count

from app.dev.sandbox.companies import Companies, Company
from app.dev.sandbox.counts import Counts
from app.dev.sandbox.faults import Faults
from app.dev.sandbox.http import Refusal
from app.dev.sandbox.limits import KeyLimits
from app.dev.sandbox.order_book import OrderBook, Row
from app.dev.sandbox.orders import Order
from app.dev.sandbox.settings import Settings
from app.dev.sandbox.webhooks import Payload, Webhooks

_FIRST_VERSION = 100_001


class World:
    """The companies, their orders and webhooks, and the faults, limits and counts of the run."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self._versions = count(_FIRST_VERSION)
        self._books: dict[str, OrderBook] = {}
        self.settings = settings
        self.seed = seed
        self.faults = Faults(seed)
        self.counts = Counts()
        self.companies = Companies()
        #: By API key.
        self.limits: defaultdict[str, KeyLimits] = defaultdict(KeyLimits)
        self.webhooks = Webhooks(settings, seed, self.faults, self.counts, self._versions)

    def orders(self, company: Company) -> OrderBook:
        """Return the orders of a company."""
        book = self._books.get(company.id)
        if book is None:
            settled = partial(self._settled, company)
            book = self._books[company.id] = OrderBook(company.id, self.seed, self.settings, self._versions, settled)
        return book

    def announce(self, company: Company, order: Order, status: str, timestamp: str | None = None) -> int:
        """Send the event of an order (`timestamp` None: now) and return the number of subscriptions that get it."""
        payload = Payload(order.order_id, order.buy_from_order_reference, status)
        return self.webhooks.announce(company, payload, timestamp)

    def find(self, order_id: str, company_id: str | None) -> tuple[Company, Row]:
        """Return an order and its company; raises Refusal (404)."""
        for company in self.companies:
            if company_id in (None, company.id):
                with contextlib.suppress(Refusal):
                    return company, self.orders(company).get(order_id)
        raise Refusal(404, "resource_not_found", "there is no such order")

    def _settled(self, company: Company, order: Order) -> None:
        self.counts.settled(company.id, order.order_id)
        self.announce(company, order, order.status)
