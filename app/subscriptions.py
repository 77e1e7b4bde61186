"""The webhook subscriptions of one company: whether events of settled orders arrive, and the repair if they do not.

Upstream sends no notice when it disables a subscription (upstream.md 4: repeated 4xx, `subscriptionState`), so the
pools check it, and `subscription watch` can repair it. What they remember is in Redis. No value here has a clientState,
only which of ours it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from hmac import compare_digest
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from app import log
from app.errors import ConnectionFault, RequestRejected, Throttled, UpstreamError
from app.ids import guid
from app.intake.auth import CURRENT, PREVIOUS, UNKNOWN
from app.ledger import policy
from app.ledger.rate_limit import Permit
from app.ledger.redis import Redis, server_time
from app.settings import Company
from app.upstream.client import ChannelManager
from app.upstream.models import EVENT_NAME, Subscription

ACTIVE: Final = "active"
UNREACHABLE: Final = "unreachable"
REPAIRED: Final = "repaired"
REPAIR_FAILED: Final = "repair_failed"
_IS_ACTIVE: Final = f"{EVENT_NAME} is Active"

REPAIR_AGAIN_AFTER: Final = 60 * policy.MINUTE
"""A subscription that works is repaired again only this long after its last repair: what ends it so soon, ends the next
one too, and each would be left behind upstream."""

_log = log.get()


class SubscriptionStatus(msgspec.Struct, frozen=True):
    """The state of a company's subscription, or the result of its repair.

    `state` is active, unreachable, repaired, repair_failed, or why no events arrive: missing, other_address,
    other_company, inactive, unknown_secret or other_path. `cause` is the reason code of upstream if a call failed.
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


def status_of(
    company: Company, webhook_path: str, listed: list[Subscription], url: str | None = None
) -> SubscriptionStatus:
    """Return whether events arrive through these subscriptions to our event, or the first reason why they do not.

    With `url` only those to this address count.
    """
    status = partial(SubscriptionStatus, company.slug)
    advice = f"ota-receiver subscription create {shown_address(url) or f'https://YOUR-PUBLIC-HOST{webhook_path}'}"
    if not listed:
        return status("missing", f"none for {EVENT_NAME}: no events arrive", advice)
    ours = _to(url, listed)
    if not ours:
        other = shown_address(listed[0].notification_url) or "an address that is not shown"
        return status("other_address", f"it posts to {other}, not to {shown_address(url)}: no events arrive", advice)
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


def log_status(status: SubscriptionStatus) -> None:
    company, state = status.company, status.state
    if state == ACTIVE:
        _log.info("subscription.active", company=company)
    elif state == REPAIRED:
        _log.warning("subscription.repaired", company=company)
    elif state in {UNREACHABLE, REPAIR_FAILED}:
        why = {"reason": status.cause, "http_status": status.http_status}
        _log.warning("subscription.check_failed", company=company, what=state, **why)
    else:
        _log.error("subscription.down", company=company, reason=state)


class SubscriptionMemory:
    """What all machines remember of one company's subscription; every method raises what redis-py raises."""

    def __init__(self, redis: Redis, company_id: str) -> None:
        self._redis: Any = redis
        self._key = redis.names.subscription(company_id)
        self._turn = redis.names.subscription_turn(company_id)

    def acquire_turn(self, every: int) -> bool:
        """Return whether this pool checks now, as one of all does each `every` ms; where that was longer, it is cut."""
        if self._redis.set(self._turn, 1, nx=True, px=every):
            return True
        if self._redis.pttl(self._turn) > every:
            self._redis.pexpire(self._turn, every)
        return False

    def check_in(self, wait: int) -> None:
        """Let a pool check in `wait` ms."""
        self._redis.set(self._turn, 1, px=max(wait, 1))

    def record(self, found: SubscriptionStatus) -> bool:
        """Record the result of a check; return whether it is news. No answer of upstream leaves the state as it was."""
        state, failing = self._redis.hmget(self._key, "state", "failing")
        if found.state == UNREACHABLE:
            self._redis.hset(self._key, "failing", found.cause)
            return bool(failing != found.cause.encode())
        self._redis.hset(self._key, mapping={"state": found.state, "failing": ""})
        if found.state == ACTIVE:
            self.works()
        return bool(state != found.state.encode() or failing)

    def state(self) -> str:
        """Return the state that was recorded last, "" before the first."""
        return (self._redis.hget(self._key, "state") or b"").decode()

    def forget(self) -> None:
        """Forget the state: no pool checks it any more. Repairs are remembered."""
        self._redis.hdel(self._key, "state", "failing")

    def begin_repair(self) -> int:
        """Record that a repair begins and return 0, or when (ms) one began that no other may follow yet."""
        if self._redis.hsetnx(self._key, "repaired_at", server_time(self._redis)):
            return 0
        return int(self._redis.hget(self._key, "repaired_at") or 1)

    def repair_changed_nothing(self) -> None:
        """Record that upstream has refused to create the subscription: another repair may begin."""
        self._redis.hdel(self._key, "repaired_at")

    def works(self) -> None:
        """Record that the subscription works: REPAIR_AGAIN_AFTER its repair another one may begin."""
        repaired_at = int(self._redis.hget(self._key, "repaired_at") or 0)
        if repaired_at and server_time(self._redis) - repaired_at >= REPAIR_AGAIN_AFTER:
            self._redis.hdel(self._key, "repaired_at")


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

    @property
    def url(self) -> str:
        """Return the address that a repair would subscribe, as screens and logs may show it; "" if it is not known."""
        return shown_address(self._url)

    def check(self, permit: Permit | None = None) -> SubscriptionStatus:
        """Return the state now; a failed call of upstream is a state too.

        `permit`: of the call. It learns of a 429, which holds for all calls of the key, and of no other failure: these
        say nothing about orders.
        """
        try:
            listed = for_settled_orders(self._upstream.subscriptions())
        except UpstreamError as error:
            if permit is not None and isinstance(error, Throttled):
                permit.failed(error)
            return self._failed(UNREACHABLE, "the Channel Manager does not answer", error)
        self._remember(_to(self._only, listed))
        found = status_of(self._company, self._path, listed, self._only)
        # A proxy may map the path, and a watch must not warn for ever: `check` reports it.
        return self.active() if found.state == "other_path" else found

    def active(self) -> SubscriptionStatus:
        """Return the state of a working subscription."""
        return SubscriptionStatus(self._company.slug, ACTIVE, _IS_ACTIVE)

    def can_repair(self, status: SubscriptionStatus) -> bool:
        """Return whether creating it again would help."""
        return status.state in {"missing", "other_address", "inactive"} and self._url is not None

    def repair(self, memory: SubscriptionMemory) -> SubscriptionStatus:
        """Subscribe the address again with the current clientState, then delete its inactive subscriptions.

        In this order an interruption leaves one subscription too many, which harms nothing, and never one too few. Call
        it after `begin_repair`. Raises what redis-py raises.
        """
        assert self._url is not None
        try:
            self._upstream.create_subscription(self._url, self._company.client_state)
        except UpstreamError as error:
            if isinstance(error, RequestRejected | ConnectionFault | Throttled):  # else it may have been created
                memory.repair_changed_nothing()
            return self._failed(REPAIR_FAILED, "it could not be created again", error)
        memory.check_in(0)
        kept = 0
        for one in self._inactive:
            try:
                self._upstream.delete_subscription(one)
            except UpstreamError:
                kept += 1
        left = f"; {kept} that is not Active could not be deleted" if kept else ""
        return SubscriptionStatus(self._company.slug, REPAIRED, f"created again for {self.url}{left}")

    def not_repaired(self, detail: str, cause: str) -> SubscriptionStatus:
        """Return the state after a repair that was not made, for a reason of ours."""
        advice = f"See: ota-receiver subscription list. By hand: ota-receiver subscription create {self.url}"
        return SubscriptionStatus(self._company.slug, REPAIR_FAILED, detail, advice, cause)

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


def _to(url: str | None, listed: list[Subscription]) -> list[Subscription]:
    """Return those to this address; all without one."""
    return [one for one in listed if url is None or same_address(one.notification_url, url)]


def _plain(url: str) -> tuple[str, str, str, str]:
    try:
        parts = urlsplit(url)
    except ValueError:  # upstream may list anything
        return "", "", url, ""
    return parts.scheme.lower(), parts.netloc.lower(), parts.path.rstrip("/"), parts.query
