"""The webhook subscriptions of one company: which bring settled orders, what keeps their events away, and its repair.

Upstream says nothing when it switches one off (upstream.md 4: repeated 4xx, `subscriptionState`), so somebody has to
look. No value here holds a clientState: only which of ours it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hmac import compare_digest
from typing import Final, Literal
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

Reason = Literal["missing", "other_company", "inactive", "unknown_secret", "other_path"]


class Problem(msgspec.Struct, frozen=True):
    """What keeps events from coming, in words, and what a person should do."""

    reason: Reason
    found: str
    advice: str


class Sight(msgspec.Struct, frozen=True):
    """How a company's subscription was found, or what became of its repair.

    `state` is active, the reason of a Problem, unreachable, repaired or repair_failed; `cause` is upstream's reason
    code where upstream is the trouble.
    """

    company: str
    state: str
    detail: str
    advice: str = ""
    cause: str = ""
    http_status: int | None = None


def for_settled_orders(listed: Iterable[Subscription]) -> list[Subscription]:
    """Return the subscriptions to our event, in whatever state."""
    return [one for one in listed if (one.event_name or "").casefold() == EVENT_NAME]


def secret_of(company: Company, one: Subscription) -> str:
    """Return which of the company's secrets events will carry: current, previous or unknown; "" if it is not shown."""
    if one.client_state is None:
        return ""
    shown = one.client_state.get_secret_value().encode()
    for name, ours in ((CURRENT, company.client_state), (PREVIOUS, company.client_state_previous)):
        if ours is not None and compare_digest(shown, ours.get_secret_value().encode()):
            return name
    return UNKNOWN


def same_address(one: str | None, other: str | None) -> bool:
    """Return whether two addresses are one: the case of the host and a slash at the end do not matter."""
    return one is not None and other is not None and _plain(one) == _plain(other)


def ends_in(url: str, webhook_path: str) -> bool:
    """Return whether events sent to `url` come to the path we listen on, unless a proxy changes it."""
    return url.partition("?")[0].rstrip("/").endswith(webhook_path.rstrip("/"))


def shown_address(url: str | None) -> str:
    """Return an address for screens and logs: what stands before the host or in the query may be a secret."""
    if not url:
        return ""
    before, query, _ = url.partition("?")
    scheme, slashes, rest = before.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}" + ("?…" if query else "")


def problem(company: Company, webhook_path: str, ours: list[Subscription]) -> Problem | None:
    """Return the first thing that keeps the events of `ours` from coming, None if nothing does."""
    looks: tuple[_Look, ...] = (_missing, _of_other_company, _inactive, _unknown_secret, _other_path)
    return next(filter(None, (look(company, webhook_path, ours) for look in looks)), None)


_Look = Callable[[Company, str, list[Subscription]], Problem | None]


def _missing(company: Company, webhook_path: str, ours: list[Subscription]) -> Problem | None:
    if ours:
        return None
    advice = f"ota-receiver subscription create https://YOUR-PUBLIC-HOST{webhook_path}"
    return Problem("missing", f"none for {EVENT_NAME}: no event will come", advice)


def _of_other_company(company: Company, webhook_path: str, ours: list[Subscription]) -> Problem | None:
    ids = {(one.company_id or company.np_company_id).strip("{}").lower() for one in ours}
    if company.np_company_id in ids:
        return None
    found = f"it belongs to company {min(ids)}: its events would be refused"
    return Problem("other_company", found, "Correct NP_COMPANY_ID, or NP_COMPANY.")


def _inactive(company: Company, webhook_path: str, ours: list[Subscription]) -> Problem | None:
    if any(one.active for one in ours):
        return None
    state = ours[0].subscription_state or "without a state"
    advice = "Switch it on (Business Central, page 3300 EE Subscription List), or delete it and create it again."
    return Problem("inactive", f"it is {state}, not Active: no event will come", advice)


def _unknown_secret(company: Company, webhook_path: str, ours: list[Subscription]) -> Problem | None:
    """Look only where the list shows a clientState at all."""
    shown = {secret_of(company, one) for one in ours if one.active} - {""}
    if not shown or shown != {UNKNOWN}:
        return None
    advice = "Set CLIENT_STATE to the subscription's, or create it again with ours."
    return Problem("unknown_secret", "its clientState is none of ours: its events would be answered 401", advice)


def _other_path(company: Company, webhook_path: str, ours: list[Subscription]) -> Problem | None:
    urls = [one.notification_url for one in ours if one.active and one.notification_url]
    if not urls or any(ends_in(url, webhook_path) for url in urls):
        return None
    advice = "Fine if a proxy maps the path; else set WEBHOOK_PATH, or create the subscription again."
    return Problem("other_path", f"it posts to another path than {webhook_path}", advice)


class Watch:
    """Looks at one company's subscription again and again, and can make it anew.

    With `url` only subscriptions to that address count. Without, one that works is enough, and the address seen last
    is the one that a repair subscribes.
    """

    def __init__(self, company: Company, upstream: ChannelManager, webhook_path: str, url: str | None = None) -> None:
        self._company = company
        self._upstream = upstream
        self._path = webhook_path
        self._only = url
        self._url = url
        self._dead: list[str] = []

    def look(self) -> Sight:
        """Return how it is now; upstream's trouble is a sight too."""
        try:
            ours = for_settled_orders(self._upstream.subscriptions())
        except UpstreamError as error:
            return self._trouble(UNREACHABLE, "the Channel Manager cannot be asked", error)
        if self._only is not None:
            ours = [one for one in ours if same_address(one.notification_url, self._only)]
        self._remember(ours)
        found = problem(self._company, self._path, ours)
        # A proxy may map the path, and a watch that warns for ever is no watch: `check` tells of that one.
        if found is None or found.reason == "other_path":
            return self.active()
        return Sight(self._company.slug, found.reason, found.found, found.advice)

    def active(self) -> Sight:
        """Return how it is when all is well."""
        return Sight(self._company.slug, ACTIVE, f"{EVENT_NAME} is Active")

    def can_repair(self, sight: Sight) -> bool:
        """Return whether making it anew would mend what was seen."""
        return sight.state in {"missing", "inactive"} and self._url is not None

    def repair(self) -> Sight:
        """Subscribe the address anew with the current clientState, then delete what is not Active there.

        In this order: to die in between leaves one too many, which harms nobody, and never one too few.
        """
        assert self._url is not None
        try:
            self._upstream.create_subscription(self._url, self._company.client_state)
        except UpstreamError as error:
            return self._trouble(REPAIR_FAILED, "it could not be created again", error)
        kept = 0
        for one in self._dead:
            try:
                self._upstream.delete_subscription(one)
            except UpstreamError:
                kept += 1
        left = f"; {kept} that is not Active could not be deleted" if kept else ""
        return Sight(self._company.slug, REPAIRED, f"created again for {shown_address(self._url)}{left}")

    def _remember(self, ours: list[Subscription]) -> None:
        """Keep the address to repair, of one that works if there is one, and what a repair has to clear away."""
        candidates = [one for one in ours if one.notification_url and secret_of(self._company, one) != UNKNOWN]
        candidates.sort(key=lambda one: not one.active)
        if self._only is None and candidates:
            self._url = candidates[0].notification_url
        stale = [one for one in candidates if not one.active and same_address(one.notification_url, self._url)]
        self._dead = [found for one in stale if (found := guid(one.id)) is not None]

    def _trouble(self, state: str, what: str, error: UpstreamError) -> Sight:
        status = f" (HTTP {error.http_status})" if error.http_status else ""
        detail = f"{what}: {error.reason}{status}"
        return Sight(self._company.slug, state, detail, "", error.reason, error.http_status)


def _plain(url: str) -> tuple[str, str, str, str]:
    try:
        parts = urlsplit(url)
    except ValueError:  # upstream's list may hold what is no address
        return "", "", url, ""
    return parts.scheme.lower(), parts.netloc.lower(), parts.path.rstrip("/"), parts.query
