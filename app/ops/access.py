"""Who may use the ops page: HTTP Basic, a limit for wrong passwords, and the origin of actions."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Callable, Mapping
from hmac import compare_digest
from http import HTTPStatus
from ipaddress import ip_address
from time import monotonic
from types import MappingProxyType
from typing import Final, Literal, NamedTuple
from urllib.parse import urlsplit

from app import log
from app.errors import RequestRefused

Role = Literal["read", "act"]

TRIES: Final = 10
"""Wrong passwords of one sender in TRIES_SECONDS; then it waits for their end, whatever it sends."""

TRIES_SECONDS: Final = 60.0

SENDERS: Final = 1000
"""Senders whose wrong passwords are counted at once; beyond them the oldest count is forgotten."""

LONGEST_NAME: Final = 200

_CHALLENGE: Final = MappingProxyType({"www-authenticate": 'Basic realm="OTA receiver", charset="UTF-8"'})
_log = log.get()


class Refused(RequestRefused):
    """A request is answered with a page that says why: `title` in a few words, `detail` in a sentence."""

    def __init__(
        self, status: int, reason: str, title: str, detail: str, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(int(status), reason)
        self.title = title
        self.detail = detail
        self.headers = headers


class User(NamedTuple):
    """Who looks, as they named themselves, and what they may do."""

    who: str
    role: Role

    @property
    def may_act(self) -> bool:
        return self.role == "act"


class Access:
    """Lets requests in by HTTP Basic: the user name is who it is, the password is OPS_TOKEN or OPS_ACT_TOKEN.

    Without `act_token` no one may act.
    """

    def __init__(self, token: str, act_token: str | None, clock: Callable[[], float] = monotonic) -> None:
        self._token = token.encode()
        self._act_token = act_token.encode() if act_token else None
        self._clock = clock
        self._wrong: dict[str, tuple[int, float]] = {}

    def admit(self, authorization: str, sender: str) -> User:
        """Return who sends a request with this header from this address.

        Raises Refused: 401 without a name or the right password, 429 after TRIES wrong ones.
        """
        sender = _network(sender)
        self._refuse_after_too_many(sender)
        kind, _, credentials = authorization.partition(" ")
        if not authorization:
            raise _unauthorized("no_password", "Give your name, and the password of the ops page.")
        name, password = _decoded(credentials) if kind.lower() == "basic" else ("", b"")
        role = self._role(password)
        if role is None:
            self._note_wrong(sender)
            raise _unauthorized("wrong_password", "The password is wrong.")
        who = unicodedata.normalize("NFC", name).strip()
        if not who or len(who) > LONGEST_NAME or not who.isprintable():
            raise _unauthorized("no_name", f"The user name is your own name, of 1 to {LONGEST_NAME} characters.")
        return User(who, role)

    def _role(self, password: bytes) -> Role | None:
        # Both are compared each time: the time taken says nothing of either.
        may_read = compare_digest(password, self._token)
        if self._act_token is not None and compare_digest(password, self._act_token):
            return "act"
        return "read" if may_read else None

    def _refuse_after_too_many(self, sender: str) -> None:
        tries, since = self._wrong.get(sender, (0, 0.0))
        left = since + TRIES_SECONDS - self._clock()
        if left <= 0:
            self._wrong.pop(sender, None)
        elif tries >= TRIES:
            detail = f"{TRIES} wrong passwords came from your address within a minute. Wait for {left:.0f} s."
            headers = {"retry-after": str(int(left) + 1)}
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "too_many_tries", "Too many tries", detail, headers)

    def _note_wrong(self, sender: str) -> None:
        tries, since = self._wrong.get(sender, (0, self._clock()))
        self._wrong[sender] = tries + 1, since
        if tries + 1 == TRIES:
            _log.error("ops.sender_blocked", sender=sender, attempts=TRIES)
        while len(self._wrong) > SENDERS:
            self._wrong.pop(next(iter(self._wrong)))


def refuse_other_origin(headers: Mapping[str, str]) -> None:
    """Raise Refused (403) for an action that may come from a page of another site, with the password of the browser.

    As CrossOriginProtection of Go 1.25 decides, but stricter. Browsers send `Sec-Fetch-Site` over https and to this
    machine: it must be `same-origin`; with `none` (the address bar) or without it, `Origin` must name the host that the
    request is for. A request with neither is refused: no browser sends it, and a program can add `Origin`.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin", "")
    if site == "same-origin" or (site in (None, "none") and _host_of(origin) == headers.get("host", "").lower()):
        return
    detail = "It did not come from a form of this page. Reload the page and try again; it needs https, or localhost."
    raise Refused(HTTPStatus.FORBIDDEN, "other_origin", "The action was refused", detail)


def _host_of(origin: str) -> str | None:
    """Return host and port of an origin, None without one: `Origin: null` is no one's."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _unauthorized(reason: str, detail: str) -> Refused:
    return Refused(HTTPStatus.UNAUTHORIZED, reason, "Password needed", detail, _CHALLENGE)


def _decoded(credentials: str) -> tuple[str, bytes]:
    """Return user name and password of HTTP Basic, both empty if it is unreadable."""
    try:
        name, _, password = base64.b64decode(credentials.strip(), validate=True).partition(b":")
        return name.decode(), password
    except ValueError:
        return "", b""


def _network(sender: str) -> str:
    """Return what a sender's tries are counted by: of IPv6 one sender has at least a /64."""
    try:
        address = ip_address(sender)
    except ValueError:
        return sender
    return sender if address.version == 4 else address.exploded[:19]
