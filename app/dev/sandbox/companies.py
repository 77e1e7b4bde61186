"""The companies of the sandbox: any address that is used, or, when one is declared, only the declared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import msgspec

from app.dev.sandbox.http import Refusal
from app.dev.sandbox.values import canonical_guid, company_id

_Text = Annotated[str, msgspec.Meta(min_length=1)]
_UNKNOWN = (
    ("saas_tenant_not_found", "Tenant not found"),
    ("saas_environment_not_found", "Environment not found"),
    ("saas_company_not_found", "Company not found"),
)


class Address(NamedTuple):
    """The three path segments before an operation, decoded; their case does not matter."""

    tenant: str
    environment: str
    company: str

    def key(self) -> tuple[str, str, str]:
        """Return the same value for all spellings of an address."""
        return self.tenant.lower(), self.environment.lower(), self.company.lower()


class Company(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One Business Central company; with empty `api_keys` every key may call."""

    id: str
    name: _Text
    tenant: _Text
    environment: _Text
    api_keys: frozenset[str] = frozenset()
    #: Keys that are valid but lack the permission set of the Channel Manager.
    forbidden_keys: frozenset[str] = frozenset()

    def check_key(self, key: str) -> None:
        """Raise Refusal (401, 403) unless this API key may call."""
        if key in self.forbidden_keys:
            raise Refusal(403, "generic_error", "Missing permissions: NPR API Channel Mgr")
        if not key or (self.api_keys and key not in self.api_keys):
            raise Refusal(401, None, "Unauthorized")


class Companies:
    """Every company that was declared or used."""

    def __init__(self) -> None:
        self._by_address: dict[tuple[str, str, str], Company] = {}
        self._declared: set[tuple[str, str, str]] = set()

    def __iter__(self) -> Iterator[Company]:
        return iter(list(self._by_address.values()))

    def declare(self, company: Company) -> Company:
        """Add or replace a company; from now on only declared ones exist. Raises ValueError for a wrong id."""
        guid = canonical_guid(company.id)
        if guid is None:
            raise ValueError(f"{company.id!r} is not a GUID")
        company = msgspec.structs.replace(company, id=guid)
        key = Address(company.tenant, company.environment, company.name).key()
        self._by_address[key] = company
        self._declared.add(key)
        return company

    def at(self, address: Address) -> Company:
        """Return the company at an address; raises Refusal (404) with the gateway's code when there is none."""
        key = address.key()
        if self._declared and key not in self._declared:
            depth = max(next((n for n in range(3) if known[n] != key[n]), 2) for known in self._declared)
            raise Refusal(404, *_UNKNOWN[depth])
        company = self._by_address.get(key)
        if company is None:
            company = self._by_address[key] = Company(
                id=company_id(*address), name=address.company, tenant=address.tenant, environment=address.environment
            )
        return company
