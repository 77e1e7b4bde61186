"""What `check` finds of one company's Channel Manager: is it reached, is the key permitted, is there a subscription?

Nothing is changed there, and no clientState is shown.
"""

from __future__ import annotations

from itertools import islice
from time import monotonic
from typing import Final

from app import subscriptions
from app.cli.finding import Finding
from app.errors import OrderNotFound, RequestRejected, UpstreamError
from app.settings import Company, Settings
from app.upstream.client import ChannelManager
from app.upstream.listing import ListQuery
from app.upstream.subscription import EVENT_NAME

NO_ORDER: Final = "00000000-0000-4000-8000-000000000000"
"""A well-formed GUID that no order has: a 404 `resource_not_found` for it proves that we are heard and permitted."""

_ADVICE: Final = {
    "unauthorized": "Correct NP_API_KEY: it is wrong, or was revoked (page NaviPartner API Keys).",
    "forbidden": "Give the key's Entra app the permission set {permissions}.",
    "tenant_not_found": "Correct NP_TENANT: the GUID of the Entra tenant.",
    "environment_not_found": "Correct NP_ENVIRONMENT: the name of the Business Central environment.",
    "company_not_found": "Correct NP_COMPANY: the company's name, as page NaviPartner API URL shows it.",
    "not_found": "Correct NP_BASE_URL, NP_TENANT, NP_ENVIRONMENT and NP_COMPANY: nothing answers at that address.",
    "redirected": "Correct NP_BASE_URL: the address there sends us elsewhere, where no API key goes.",
    "unsendable_request": "Correct NP_BASE_URL and NP_API_KEY: they hold characters that HTTP cannot carry.",
    "timeout": "Look at the network and at NP_BASE_URL; raise UPSTREAM_TIMEOUT if the service is slow.",
    "network": "Look at the network (DNS, firewall, TLS) and at NP_BASE_URL.",
    "throttled": "Nothing is wrong with the settings; other programs use up this key's limit.",
}
_OTHERWISE: Final = "Try again; if it stays, ask NaviPartner."
_API_PERMISSIONS: Final = "NPR API Channel Mgr"
WEBHOOK_PERMISSIONS: Final = "Ext. Events – Subscr"


def findings(settings: Settings, company: Company, upstream: ChannelManager) -> list[Finding]:
    """Return what was found of one company, in one call or two."""
    api = _api(company, upstream)
    if api.level != "good":
        return [api]
    return [api, *_subscription(settings, company, upstream)]


def _api(company: Company, upstream: ChannelManager) -> Finding:
    begun = monotonic()
    try:
        if company.np_partner_id is None:
            _ask_for_no_order(upstream)
        else:
            list(islice(upstream.list_orders(ListQuery(page_size=1)), 1))
    except RequestRejected as error:
        hint = "Correct NP_PARTNER_ID, if it is set; else ask NaviPartner."
        return Finding(company.slug, "api", "todo", told(error), hint)
    except UpstreamError as error:
        return _trouble(company, "api", error, _API_PERMISSIONS)
    milliseconds = round((monotonic() - begun) * 1000)
    how = "getOrder" if company.np_partner_id is None else "the list of orders"
    return Finding(company.slug, "api", "good", f"{how} is permitted ({milliseconds} ms)")


def _ask_for_no_order(upstream: ChannelManager) -> None:
    try:
        upstream.get_order(NO_ORDER)
    except OrderNotFound:
        return


def _subscription(settings: Settings, company: Company, upstream: ChannelManager) -> list[Finding]:
    try:
        ours = subscriptions.for_settled_orders(upstream.subscriptions())
    except UpstreamError as error:
        return [_trouble(company, "subscription", error, WEBHOOK_PERMISSIONS)]
    found = subscriptions.problem(company, settings.webhook_path, ours)
    if found is not None:
        return [Finding(company.slug, "subscription", "todo", found.found, found.advice)]
    return [Finding(company.slug, "subscription", "good", f"{EVENT_NAME} is Active")]


def _trouble(company: Company, what: str, error: UpstreamError, permissions: str) -> Finding:
    return Finding(company.slug, what, "todo", told(error), advice(error.reason, permissions))


def advice(reason: str, permissions: str) -> str:
    """Return what to do about upstream's reason code; `permissions` is what the key needs for the call."""
    return _ADVICE.get(reason, _OTHERWISE).format(permissions=permissions)


def told(error: UpstreamError) -> str:
    """Return the reason code, and the status if there was an answer."""
    return error.reason + (f" (HTTP {error.http_status})" if error.http_status else "")
