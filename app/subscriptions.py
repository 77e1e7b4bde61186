"""The webhook subscriptions of one company: whether events of settled orders arrive, and the repair if they do not.

Upstream sends no notice when it disables a subscription (upstream.md 4: repeated 4xx, `subscriptionState`), so it must
be watched. No value here has a clientState, only which of ours it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from hmac import compare_digest
from typing import Final
from urllib.parse import urlsplit

import msgspec

from app.errors import UpstreamError
from app.ids import guid
from app.intake.auth import CURRENT, PREVIOUS, UNKNOWN
from app.settings import Company
from app.upstream.client import ChannelManager
from app.upstream.models import EVENT_NAME, Subscription

ACTIVE: Final = "active"
UNREACHABLE: Final = "unreachable"
REPAIRED: Final = "repaired"
REPAIR_FAILED: Final = "repair_failed"
_IS_ACTIVE: Final = f"{EVENT_NAME} is Active"


class SubscriptionStatus(msgspec.Struct, frozen=True):
    """The state of a company's subscription, or the result of its repair.

    `state` is active, unreachable, repaired, repair_failed, or why no events arrive: missing, other_company, inactive,
    unknown_secret or other_path. `cause` is the reason code of upstream if a call failed.
    """

    company: str
    state: str
    detail: str
    advice: str = ""
    cause: str = ""
    http_status: int | None = None


def for_settled_orders(listed: Iterable[Subscription]) -> list[Subscription]:
    """Return the subscriptions to our event, in any state."""
    return [one for one in listed if (one.event_name or "").casefold() == EVENT_NAME]


def secret_of(company: Company, one: Subscription) -> str:
    """Return which of our secrets its events carry: current, previous or unknown; "" if upstream does not show it."""
    if one.client_state is None:
        return ""
    shown = one.client_state.get_secret_value().encode()
    for name, ours in ((CURRENT, company.client_state), (PREVIOUS, company.client_state_previous)):
        if ours is not None and compare_digest(shown, ours.get_secret_value().encode()):
            return name
    return UNKNOWN


def same_address(one: str | None, other: str | None) -> bool:
    """Return whether two addresses are equal, apart from the case of the host and a slash at the end."""
    return one is not None and other is not None and _plain(one) == _plain(other)


def ends_in(url: str, webhook_path: str) -> bool:
    """Return whether `url` ends in the path that `serve` listens on; a proxy may map another one."""
    return url.partition("?")[0].rstrip("/").endswith(webhook_path.rstrip("/"))


def shown_address(url: str | None) -> str:
    """Return an address for screens and logs, without user and query, which may be secret."""
    if not url:
        return ""
    before, query, _ = url.partition("?")
    scheme, slashes, rest = before.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}" + ("?…" if query else "")


def status_of(company: Company, webhook_path: str, ours: list[Subscription]) -> SubscriptionStatus:
    """Return whether events arrive through the subscriptions `ours`, or the first reason why they do not."""
    status = partial(SubscriptionStatus, company.slug)
    if not ours:
        advice = f"ota-receiver subscription create https://YOUR-PUBLIC-HOST{webhook_path}"
        return status("missing", f"none for {EVENT_NAME}: no events arrive", advice)
    ids = {(one.company_id or company.np_company_id).strip("{}").lower() for one in ours}
    if company.np_company_id not in ids:
        found = f"it belongs to company {min(ids)}: its events would be refused"
        return status("other_company", found, "Correct NP_COMPANY_ID, or NP_COMPANY.")
    active = [one for one in ours if one.active]
    if not active:
        state = ours[0].subscription_state or "without a state"
        advice = "Enable it (Business Central, page 3300 EE Subscription List), or delete it and create it again."
        return status("inactive", f"it is {state}, not Active: no events arrive", advice)
    # Upstream may hide the clientState.
    if {secret_of(company, one) for one in active} - {""} == {UNKNOWN}:
        advice = "Set CLIENT_STATE to the subscription's, or create it again with ours."
        return status("unknown_secret", "its clientState is not ours: its events are answered 401", advice)
    urls = [one.notification_url for one in active if one.notification_url]
    if urls and not any(ends_in(url, webhook_path) for url in urls):
        advice = "Fine if a proxy maps the path. Otherwise set WEBHOOK_PATH, or create the subscription again."
        return status("other_path", f"it posts to another path than {webhook_path}", advice)
    return status(ACTIVE, _IS_ACTIVE)


class SubscriptionWatch:
    """Checks one company's subscription repeatedly, and can create it again.

    With `url` only subscriptions to that address count. Without it, any working one is enough, and a repair uses the
    address seen last.
    """

    def __init__(self, company: Company, upstream: ChannelManager, webhook_path: str, url: str | None = None) -> None:
        self._company = company
        self._upstream = upstream
        self._path = webhook_path
        self._only = self._url = url
        self._inactive: list[str] = []

    def check(self) -> SubscriptionStatus:
        """Return the state now; a failed call of upstream is a state too."""
        try:
            ours = for_settled_orders(self._upstream.subscriptions())
        except UpstreamError as error:
            return self._failed(UNREACHABLE, "the Channel Manager does not answer", error)
        if self._only is not None:
            ours = [one for one in ours if same_address(one.notification_url, self._only)]
        self._remember(ours)
        found = status_of(self._company, self._path, ours)
        # A proxy may map the path, and a watch must not warn for ever: `check` reports it.
        return self.active() if found.state == "other_path" else found

    def active(self) -> SubscriptionStatus:
        """Return the state of a working subscription."""
        return SubscriptionStatus(self._company.slug, ACTIVE, _IS_ACTIVE)

    def can_repair(self, status: SubscriptionStatus) -> bool:
        """Return whether creating it again would help."""
        return status.state in {"missing", "inactive"} and self._url is not None

    def repair(self) -> SubscriptionStatus:
        """Subscribe the address again with the current clientState, then delete its inactive subscriptions.

        In this order an interruption leaves one subscription too many, which harms nothing, and never one too few.
        """
        assert self._url is not None
        try:
            self._upstream.create_subscription(self._url, self._company.client_state)
        except UpstreamError as error:
            return self._failed(REPAIR_FAILED, "it could not be created again", error)
        kept = 0
        for one in self._inactive:
            try:
                self._upstream.delete_subscription(one)
            except UpstreamError:
                kept += 1
        left = f"; {kept} that is not Active could not be deleted" if kept else ""
        detail = f"created again for {shown_address(self._url)}{left}"
        return SubscriptionStatus(self._company.slug, REPAIRED, detail)

    def _remember(self, ours: list[Subscription]) -> None:
        """Keep what a repair needs: the address, of a working subscription if there is one, and the inactive ones."""
        candidates = [one for one in ours if one.notification_url and secret_of(self._company, one) != UNKNOWN]
        candidates.sort(key=lambda one: not one.active)
        if self._only is None and candidates:
            self._url = candidates[0].notification_url
        stale = [one for one in candidates if not one.active and same_address(one.notification_url, self._url)]
        self._inactive = [found for one in stale if (found := guid(one.id)) is not None]

    def _failed(self, state: str, what: str, error: UpstreamError) -> SubscriptionStatus:
        http = f" (HTTP {error.http_status})" if error.http_status else ""
        detail = f"{what}: {error.reason}{http}"
        return SubscriptionStatus(self._company.slug, state, detail, "", error.reason, error.http_status)


def _plain(url: str) -> tuple[str, str, str, str]:
    try:
        parts = urlsplit(url)
    except ValueError:  # upstream may list anything
        return "", "", url, ""
    return parts.scheme.lower(), parts.netloc.lower(), parts.path.rstrip("/"), parts.query
