"""What a view of orders or of the receiver reads: the stores in Redis, and the companies by slug."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Final

from app import times
from app.deployment import Deployment
from app.heartbeat import DeclaredCompany
from app.ids import OrderKey, beginning, guid
from app.ledger.dead_letters import DeadLetters
from app.ledger.events import EventLog
from app.ledger.orders import MOST_SEARCHED, Archive
from app.ledger.redis import Redis, server_time
from app.ledger.references import References
from app.replay import Plans
from app.settings import Company, Settings

MOST_AT_ONCE: Final = 500
"""Orders of each list that a page searches at once for a reference that is not in the index."""


class Stores:
    """The readers of one command or of one request, which see the companies and the sinks as they were at its start.

    `slugs`: id -> slug of the companies of the settings and of the deployment. Every method raises what redis-py
    raises.
    """

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis
        self.settings = settings
        self.deployment = Deployment(redis)
        self.slugs = slugs_of(settings.companies, self.deployment.companies())
        self.company_ids = tuple(self.slugs)
        self.are_several = len(self.slugs) > 1
        self.orders = Archive(redis)
        self.references = References(redis)
        self.events = EventLog(redis)
        self.dead_letters = DeadLetters(redis)
        self.plans = Plans(redis, event_days=settings.event_days)

    @cached_property
    def sinks(self) -> tuple[str, ...]:
        """Return the sinks of the deployment, whatever SINKS and SINKS_FILE are here."""
        return self.deployment.sinks()

    def slug(self, company_id: str) -> str:
        """Return the slug, or the GUID of a company that is not known (any more)."""
        return self.slugs.get(company_id, company_id)

    def now(self) -> datetime:
        """Return the time of the Redis server, which set the leases and due times."""
        return times.from_ms(server_time(self.redis))

    def find(self, text: str) -> list[OrderKey]:
        """Return the orders as `find_whole` does; if there is none, those whose orderId begins so.

        Of the latter there are at most MOST_ALIKE + 1 (app/ledger/orders.py).
        """
        return self.find_whole(text) or self.find_beginning(text)

    def find_at_once(self, text: str) -> tuple[list[OrderKey], bool]:
        """Return the orders as `find` does as far as that takes no 100 ms, and whether it would find no others.

        All orders are searched for an orderId, and the fetched ones for a reference; the others, and request ids, among
        the newest MOST_AT_ONCE of each list. An orderId that begins so is searched among the newest MOST_SEARCHED.
        """
        found = self.find_whole(text) if guid(text) else self.references.of_fetched(text)
        if found or guid(text):
            return found, True
        if found := self.references.orders(text, most=MOST_AT_ONCE):
            return found, self.orders.count() <= MOST_AT_ONCE
        prefix = beginning(text)
        found = [] if prefix is None else self.orders.newest_beginning_with(prefix)
        return found, self.orders.count() <= (MOST_SEARCHED if found else MOST_AT_ONCE)

    def find_whole(self, text: str, company_id: str | None = None) -> list[OrderKey]:
        """Return the orders with this orderId, reference of either side or request_id; none for a blank text.

        `company_id`: only of this company.
        """
        order_id = guid(text)
        if order_id is None:
            return self.references.orders(text, company_id)
        ids = self.company_ids if company_id is None else (company_id,)
        found = self.orders.of_companies(order_id, ids) or self.orders.of_any_company(order_id)
        return [one for one in found if company_id in (None, one.company_id)]

    def find_beginning(self, text: str, company_id: str | None = None) -> list[OrderKey]:
        """Return the orders whose orderId begins so; none for fewer than 4 digits."""
        prefix = beginning(text)
        return [] if prefix is None else self.orders.beginning_with(prefix, company_id)

    def words_for(self, order: OrderKey) -> str:
        """Return the words that identify this order on a command line."""
        others = [one for one in self.find_whole(order.order_id) if one != order]
        return f"{order.order_id} --company {self.slug(order.company_id)}" if others else order.order_id


def slugs_of(companies: Sequence[Company], declared: Mapping[str, DeclaredCompany]) -> dict[str, str]:
    """Return id -> slug of the companies of the settings and of those declared (by id); the settings are right."""
    slugs = {company_id: one.slug for company_id, one in declared.items()}
    return slugs | {one.np_company_id: one.slug for one in companies}
