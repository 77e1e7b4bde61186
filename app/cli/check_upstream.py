"""What `check` finds of one company's Channel Manager: is it reached, is the key permitted, is there a subscription?

Nothing is changed there, and no clientState is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from hmac import compare_digest
from itertools import islice
from time import monotonic
from typing import Final

from app.cli.finding import Finding
from app.errors import OrderNotFound, RequestRejected, UpstreamError
from app.settings import Company, Settings
from app.upstream.client import ChannelManager
from app.upstream.listing import ListQuery
from app.upstream.subscription import EVENT_NAME, Subscription

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
_WEBHOOK_PERMISSIONS: Final = "Ext. Events – Subscr"


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
        advice = "Correct NP_PARTNER_ID, if it is set; else ask NaviPartner."
        return Finding(company.slug, "api", "todo", _told(error), advice)
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
        listed = upstream.subscriptions()
    except UpstreamError as error:
        return [_trouble(company, "subscription", error, _WEBHOOK_PERMISSIONS)]
    ours = [one for one in listed if (one.event_name or "").casefold() == EVENT_NAME]
    for problem in (_missing, _of_other_company, _inactive, _unknown_secret, _other_path):
        if found := problem(settings, company, ours):
            return [Finding(company.slug, "subscription", "todo", *found)]
    return [Finding(company.slug, "subscription", "good", f"{EVENT_NAME} is Active")]


Problem = tuple[str, str] | None
"""What is found, and what to do."""

_Look = Callable[[Settings, Company, list[Subscription]], Problem]


def _missing(settings: Settings, company: Company, ours: list[Subscription]) -> Problem:
    if ours:
        return None
    where = f"your public https address ending in {settings.webhook_path}"
    return f"none for {EVENT_NAME}: no event will come", f"Create one for {where}, with CLIENT_STATE."


def _of_other_company(settings: Settings, company: Company, ours: list[Subscription]) -> Problem:
    ids = {(one.company_id or company.np_company_id).strip("{}").lower() for one in ours}
    if company.np_company_id in ids:
        return None
    return f"it belongs to company {min(ids)}: its events would be refused", "Correct NP_COMPANY_ID, or NP_COMPANY."


def _inactive(settings: Settings, company: Company, ours: list[Subscription]) -> Problem:
    if any(one.active for one in ours):
        return None
    state = ours[0].subscription_state or "without a state"
    advice = "Switch it on (Business Central, page 3300 EE Subscription List), or delete it and create it again."
    return f"it is {state}, not Active: no event will come", advice


def _unknown_secret(settings: Settings, company: Company, ours: list[Subscription]) -> Problem:
    """Look only where the list shows a clientState at all."""
    shown = [one.client_state.get_secret_value() for one in ours if one.active and one.client_state is not None]
    live = [company.client_state, company.client_state_previous]
    known = [secret.get_secret_value().encode() for secret in live if secret is not None]
    if not shown or any(compare_digest(one.encode(), secret) for one in shown for secret in known):
        return None
    advice = "Set CLIENT_STATE to the subscription's, or create it again with ours."
    return "its clientState is none of ours: its events would be answered 401", advice


def _other_path(settings: Settings, company: Company, ours: list[Subscription]) -> Problem:
    urls = [one.notification_url for one in ours if one.active and one.notification_url]
    if not urls or any(url.partition("?")[0].rstrip("/").endswith(settings.webhook_path.rstrip("/")) for url in urls):
        return None
    advice = "Fine if a proxy maps the path; else set WEBHOOK_PATH, or create the subscription again."
    return f"it posts to another path than {settings.webhook_path}", advice


def _trouble(company: Company, what: str, error: UpstreamError, permissions: str) -> Finding:
    advice = _ADVICE.get(error.reason, _OTHERWISE).format(permissions=permissions)
    return Finding(company.slug, what, "todo", _told(error), advice)


def _told(error: UpstreamError) -> str:
    return error.reason + (f" (HTTP {error.http_status})" if error.http_status else "")
