"""The companies orders are kept for: any that is asked for, or, once one is declared, only the declared.

A call to the Channel Manager, told from its method and path; literal segments compare without case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple
from urllib.parse import unquote_plus

import msgspec

from app.dev.sandbox.http import Refusal, not_found
from app.dev.sandbox.settings import canonical_guid, company_id

_UNKNOWN = (
    ("saas_tenant_not_found", "Tenant not found"),
    ("saas_environment_not_found", "Environment not found"),
    ("saas_company_not_found", "Company not found"),
)


class Address(msgspec.Struct, frozen=True):
    """The three path segments before an operation, decoded; upper and lower case are the same."""

    tenant: str
    environment: str
    company: str

    def key(self) -> tuple[str, str, str]:
        """Return what two spellings of the same address have in common."""
        return self.tenant.lower(), self.environment.lower(), self.company.lower()


class Company(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One Business Central company; empty `api_keys` or `partner_ids` let any in."""

    id: str
    name: Annotated[str, msgspec.Meta(min_length=1)]
    tenant: Annotated[str, msgspec.Meta(min_length=1)]
    environment: Annotated[str, msgspec.Meta(min_length=1)]
    api_keys: frozenset[str] = frozenset()
    #: Keys that are known but lack the permission set of the Channel Manager.
    forbidden_keys: frozenset[str] = frozenset()
    partner_ids: frozenset[str] = frozenset()
    #: Whether the partner has a design template; without one nothing gets a manifest.
    manifest: bool = True

    @property
    def address(self) -> Address:
        """Return where it is reached."""
        return Address(self.tenant, self.environment, self.name)

    def admit(self, key: str) -> None:
        """Raise Refusal (401, 403) unless this API key may call."""
        if key in self.forbidden_keys:
            raise Refusal(403, "generic_error", "Missing permissions: NPR API Channel Mgr")
        if not key or (self.api_keys and key not in self.api_keys):
            raise Refusal(401, None, "Unauthorized")


class Companies:
    """Every company that was declared or asked for."""

    def __init__(self) -> None:
        self._by_address: dict[tuple[str, str, str], Company] = {}
        self._declared: set[tuple[str, str, str]] = set()

    def __iter__(self) -> Iterator[Company]:
        return iter(list(self._by_address.values()))

    def declare(self, company: Company) -> Company:
        """Take a company in, or what is new about it; from now on only declared ones are known.

        Raises ValueError when an id is not a GUID.
        """
        company = msgspec.structs.replace(
            company, id=_guid(company.id), partner_ids=frozenset(map(_guid, company.partner_ids))
        )
        key = company.address.key()
        self._by_address[key] = company
        self._declared.add(key)
        return company

    def at(self, address: Address) -> Company:
        """Return the company at an address; raises Refusal (404) with the gateway's code when it is not known."""
        key = address.key()
        company = self._by_address.get(key)
        if company is not None and (not self._declared or key in self._declared):
            return company
        if self._declared:
            raise self._unknown(key)
        company = Company(
            id=company_id(*key), name=address.company, tenant=address.tenant, environment=address.environment
        )
        self._by_address[key] = company
        return company

    def _unknown(self, key: tuple[str, str, str]) -> Refusal:
        depth = max(next((n for n in range(3) if known[n] != key[n]), 2) for known in self._declared)
        return Refusal(404, *_UNKNOWN[depth])


def _guid(text: str) -> str:
    value = canonical_guid(text)
    if value is None:
        raise ValueError(f"{text!r} is not a GUID")
    return value


# (method, segments after the company; None is a parameter) -> operation. The first that fits counts.
_ROUTES: tuple[tuple[str, tuple[bytes | None, ...], str], ...] = (
    ("GET", (b"channelmanager", b"orders", None), "listOrdersByPartner"),
    ("GET", (b"channelmanager", None), "getOrder"),
    ("POST", (b"channelmanager", None, b"confirm"), "confirmOrder"),
    ("POST", (b"channelmanager",), "createOrder"),
    ("PUT", (b"channelmanager", None), "replaceOrder"),
    ("DELETE", (b"channelmanager", None), "deleteOrder"),
    ("GET", (b"webhook",), "listSubscriptions"),
    ("GET", (b"webhook", None), "getSubscription"),
    ("POST", (b"webhook",), "createSubscription"),
    ("DELETE", (b"webhook", None), "deleteSubscription"),
)
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE"}


class Call(NamedTuple):
    """What is asked; `subject` is the id in the path as written, `order_id` the canonical one if it is an order's."""

    operation: str
    address: Address
    subject: str
    order_id: str
    path: str
    query: bytes


def read(method: str, raw_path: bytes, query: bytes) -> Call:
    """Return the call; raises Refusal (400, 404) when there is no such operation."""
    if method not in _METHODS:
        raise Refusal(400, "unsupported_http_method", f"Http method {method} is not supported")
    segments = raw_path.strip(b"/").split(b"/")
    rest = segments[3:]
    operation, pattern = _route(method, rest)
    subject = next((_text(have) for want, have in zip(pattern, rest, strict=True) if want is None), "")
    order_id = ""
    if operation.endswith("Order") and operation != "createOrder":
        order_id = canonical_guid(subject) or ""
    address = Address(*map(_text, segments[:3]))
    return Call(operation, address, subject, order_id, raw_path.decode("latin-1"), query)


def _route(method: str, rest: list[bytes]) -> tuple[str, tuple[bytes | None, ...]]:
    for wanted, pattern, operation in _ROUTES:
        if wanted == method and len(pattern) == len(rest) and _fits(pattern, rest):
            return operation, pattern
    raise not_found("API endpoint not found")


def _fits(pattern: tuple[bytes | None, ...], rest: list[bytes]) -> bool:
    return all(want is None or want == have.lower() for want, have in zip(pattern, rest, strict=True))


def _text(segment: bytes) -> str:
    # Upstream's own page builds the address with form encoding, so "+" is a blank here too.
    return unquote_plus(segment.decode("latin-1"))
