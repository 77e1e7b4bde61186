"""The state that all parts of one sandbox share: settings, companies, faults, the limits of each key, and counts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import msgspec

from app.dev.sandbox.faults import Faults
from app.dev.sandbox.http import Refusal, forbidden
from app.dev.sandbox.values import Count, Positive, Seconds, Shape, Text, canonical_guid, company_id

_FIRST_VERSION = 100_001
_UNKNOWN = (
    ("saas_tenant_not_found", "Tenant not found"),
    ("saas_environment_not_found", "Environment not found"),
    ("saas_company_not_found", "Company not found"),
)


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The present settings, from the command line and from the admin API.

    Limits: https://api.navipartner.com/limits. The rest is not documented upstream.
    """

    #: Seconds from Submitted to the end; upstream needs about 60.
    settle_after: Seconds = 0.5
    #: Milliseconds a getOrder takes, spent in one of the slots.
    latency_ms: Seconds = 0.0

    #: Calls of one API key processed at once; a key keeps the number of its first call.
    slots: Positive = 5
    #: Calls of one API key that may wait for a slot; one more is answered 429.
    queue: Count = 95
    #: Calls of one API key within `window` seconds; one more is answered 429.
    requests: Positive = 6000
    window: Seconds = 300.0

    #: The wrapper of an event; "bare" sends it without any.
    shape: Shape = "value"
    #: Attempts per event, `attempt_every` seconds apart; 0: until 2xx. Upstream documents no retry.
    attempts: Count = 1
    attempt_every: Seconds = 1.0

    def change(self, part: dict[str, Any]) -> None:
        """Take the values of `part`; raises msgspec.ValidationError and changes nothing if one is not valid."""
        changed = msgspec.convert({**msgspec.structs.asdict(self), **part}, Settings)
        for name in part:
            setattr(self, name, getattr(changed, name))


class Address(NamedTuple):
    """The three path segments before an operation, decoded; their case does not matter."""

    tenant: str
    environment: str
    company: str

    def key(self) -> tuple[str, ...]:
        """Return the same value for all spellings of an address."""
        return tuple(part.lower() for part in self)


class Company(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One Business Central company; with empty `api_keys` every key may call."""

    id: str
    name: Text
    tenant: Text
    environment: Text
    api_keys: frozenset[str] = frozenset()
    #: Keys that are valid but lack the permission set of the Channel Manager.
    forbidden_keys: frozenset[str] = frozenset()

    def check_key(self, key: str) -> None:
        """Raise Refusal (401, 403) unless this API key may call."""
        if key in self.forbidden_keys:
            raise forbidden()
        if not key or (self.api_keys and key not in self.api_keys):
            raise Refusal(401, None, "Unauthorized")


class Companies:
    """The companies at any address that is used, or, when one is declared, only the declared ones."""

    def __init__(self) -> None:
        self._by_address: dict[tuple[str, ...], Company] = {}
        self._declared = False

    def declare(self, company: Company) -> Company:
        """Add or replace a company; from now on only declared ones exist. Raises ValueError for a wrong id."""
        guid = canonical_guid(company.id)
        if guid is None:
            raise ValueError(f"{company.id!r} is not a GUID")
        if not self._declared:
            self._by_address.clear()
            self._declared = True
        company = msgspec.structs.replace(company, id=guid)
        self._by_address[Address(company.tenant, company.environment, company.name).key()] = company
        return company

    def at(self, address: Address) -> Company:
        """Return the company at an address; raises Refusal (404) with the gateway's code when there is none."""
        key = address.key()
        company = self._by_address.get(key)
        if company is None and self._declared:
            depth = max(next(n for n in range(3) if known[n] != key[n]) for known in self._by_address)
            raise Refusal(404, *_UNKNOWN[depth])
        if company is None:
            company = self._by_address[key] = Company(
                id=company_id(*address), name=address.company, tenant=address.tenant, environment=address.environment
            )
        return company

    def of_id(self, wanted: str) -> Company:
        """Return the company with an id; raises Refusal (404)."""
        for company in self._by_address.values():
            if company.id == wanted:
                return company
        raise Refusal(404, "resource_not_found", "there is no such company")


class KeyLimits:
    """The gateway's limits of one API key (upstream: of the Entra app behind it); beyond them it answers 429.

    Source: https://api.navipartner.com/limits. Whether a refused call counts is not documented: here it does not.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.slots)
        self._waiting = 0
        self._times: deque[float] = deque()
        self.active = self.most_active = self.most_waiting = 0
        #: Calls refused since the window or the queue was full.
        self.refused: Counter[str] = Counter()

    def count(self) -> None:
        """Count a call in the sliding window; raises Refusal (429) when the window is full."""
        now = time.monotonic()
        while self._times and self._times[0] <= now - self._settings.window:
            self._times.popleft()
        if len(self._times) >= self._settings.requests:
            raise self._refusal("window")
        self._times.append(now)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a slot and keep it for the block; raises Refusal (429) when the queue is full."""
        full = self._slots.locked()
        if full and self._waiting >= self._settings.queue:
            raise self._refusal("queue")
        self._waiting += full
        self.most_waiting = max(self.most_waiting, self._waiting)
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= full
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            yield
        finally:
            self.active -= 1
            self._slots.release()

    def _refusal(self, full: str) -> Refusal:
        self.refused[full] += 1
        return Refusal(429, None, "Too Many Requests")


@dataclass
class OrderCounts:
    """The counts of one order; they stay when the order is deleted."""

    #: getOrder calls, and those of them answered 200 with a sound body.
    gets: int = 0
    answered: int = 0
    #: Settlements in the background; those inside a call send no event and do not count.
    settlements: int = 0
    #: Events for the webhook, duplicates included, and those that were answered 2xx.
    fired: int = 0
    accepted: int = 0
    #: Status and timestamp of the latest event.
    last_event: tuple[str, str] | None = None


@dataclass
class Counts:
    """The counts of a run; tests compare them with the receiver's own."""

    #: Calls per operation by status, or `abandoned` when the caller disconnected.
    operations: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    #: By company id and order id.
    orders: defaultdict[tuple[str, str], OrderCounts] = field(default_factory=lambda: defaultdict(OrderCounts))
    #: Deliveries by status, or by the name of the error.
    deliveries: Counter[str] = field(default_factory=Counter)
    #: Events that were not sent, and calls that a fault answered 429.
    lost: int = 0
    throttled: int = 0


class World:
    """The shared state of one sandbox."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.companies = Companies()
        self.faults = Faults(seed)
        #: rowVersion, shared by all tables of all companies as in SQL Server.
        self.versions = count(_FIRST_VERSION)
        self.reset_counts()

    def reset_counts(self) -> None:
        """Reset all counts, and the limits of all keys for new calls."""
        self.counts = Counts()
        #: By API key.
        self.limits: defaultdict[str, KeyLimits] = defaultdict(lambda: KeyLimits(self.settings))
