"""The kind https: POST to an endpoint of the user, signed per Standard Webhooks.

Names in the address are looked up once for each connection, and the addresses found are checked and connected to: what
a name server says later does not count.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any, Final

import httpcore
import httpx
import msgspec
from standardwebhooks import Webhook

from app import times
from app.declared import unreadable
from app.errors import SettingsError
from app.ledger import policy
from app.order_document import OrderDocument
from app.sink_settings import HttpsSink
from app.upstream.client import retry_after
from app.upstream.transport import DeadlineTransport
from workers.sinks.contract import Context, Disable, Failed, Unavailable

TIMEOUT: Final = 30.0
"""Seconds for a whole request."""

CONNECT_TIMEOUT: Final = 5.0
"""Seconds of these for the connection and its TLS."""

TYPE: Final = "order.revision"
"""Type of each message, whatever the status of its order: upstream may come to have others."""

_MOST_BYTES: Final = 8 * 1024  # of an answer, whose text is not used: enough to use the connection again
_LONGEST_WAIT: Final = policy.POSTPONED_LONGEST / policy.SECOND
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([!-~](?:[ -~]*[!-~])?)[ \t]*")
_RESERVED: Final = re.compile(
    "connection|content-length|content-type|expect|host|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade"
    "|traceparent|user-agent|webhook-.*"
)
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")


class Https:
    """One endpoint, with the connections of this process."""

    package = "workers"

    def __init__(self, declared: HttpsSink) -> None:
        """Read the further headers; raises SettingsError for those, and an address, that cannot be used."""
        content_type, self._encode = _FORMATS[declared.format]
        self._allow_private = declared.allow_private
        self._signers = [
            Webhook(secret.get_secret_value()) for secret in (declared.secret, declared.secret_previous) if secret
        ]
        try:
            self._url = httpx.URL(declared.url.get_secret_value())
            self._url.host.encode("idna")  # as each connection does
        except (httpx.InvalidURL, UnicodeError):
            raise SettingsError("URL is not an http(s) address") from None
        with suppress(ValueError):  # a name, whose addresses are checked when it is connected to
            if not (self._allow_private or is_public(self._url.host)):
                raise SettingsError("URL is not a public address, which needs allow_private = true")
        self._headers = _headers(declared.headers_file) if declared.headers_file else {}
        self._headers |= {"content-type": content_type, "user-agent": f"ota-receiver/{version('ota-receiver')}"}

    @cached_property
    def _http(self) -> DeadlineTransport:
        backend = None if self._allow_private else _PublicAddresses()
        return DeadlineTransport(TIMEOUT, backend, connect_seconds=CONNECT_TIMEOUT)

    def deliver(self, document: OrderDocument, context: Context) -> None:
        """Send the revision; raises Failed, Unavailable or Disable unless the answer is a 2xx."""
        answer = self._answer(self._request(document, context.traceparent))
        status = answer.status_code
        if answer.is_success:
            return
        if status == 410:
            raise Disable("HTTP 410")
        if status in {408, 425, 429} or status >= 500:
            raise Unavailable(f"HTTP {status}", after=retry_after(answer.headers, _LONGEST_WAIT))
        raise Failed(f"HTTP {status}" + (": redirects are not followed" if 300 <= status < 400 else ""))

    def _request(self, document: OrderDocument, traceparent: str) -> httpx.Request:
        """Return the request, signed at this moment with each secret."""
        body, key = self._encode(document), document.idempotency_key
        now = datetime.now(UTC)  # the library takes any other zone for UTC
        headers = self._headers | {
            "webhook-id": key,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(signer.sign(key, now, body.decode()) for signer in self._signers),
        }
        if traceparent:
            headers["traceparent"] = traceparent
        return httpx.Request("POST", self._url, headers=headers, content=body)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        """Send the request; raises Unavailable without an answer. The status counts, however its body ends."""
        try:
            answer = self._http.handle_request(request)
        except httpx.ConnectTimeout:
            raise Unavailable(f"no connection within {CONNECT_TIMEOUT:g} s") from None
        except httpx.TimeoutException:
            raise Unavailable(f"time-out after {TIMEOUT:g} s") from None
        except httpx.HTTPError as error:
            raise Unavailable(_network_reason(error)) from None
        try:
            with suppress(httpx.HTTPError):
                left = _MOST_BYTES
                for chunk in answer.iter_raw():
                    left -= len(chunk)
                    if left < 0:
                        break
        finally:
            answer.close()
        return answer


def _message(document: OrderDocument) -> bytes:
    """Return the payload that Standard Webhooks recommends."""
    moment = times.from_ms(document.fetched_at)
    return msgspec.json.encode({"type": TYPE, "timestamp": moment, "data": msgspec.Raw(document.encode())})


def _cloud_event(document: OrderDocument) -> bytes:
    """Return the event of CloudEvents 1.0 in structured mode."""
    return msgspec.json.encode(
        {
            "specversion": "1.0",
            "id": document.idempotency_key,
            "source": f"urn:uuid:{document.company_id}",
            "type": TYPE,
            "subject": document.order_id,
            "time": times.from_ms(document.fetched_at),
            "datacontenttype": "application/json",
            "data": msgspec.Raw(document.encode()),
        }
    )


_FORMATS: Final[dict[str, tuple[str, Callable[[OrderDocument], bytes]]]] = {
    "standard": ("application/json", _message),
    "cloudevents": ("application/cloudevents+json", _cloud_event),
}


def _headers(path: Path) -> dict[str, str]:
    """Return the value of each name (in lower case) in the file; raises SettingsError, which quotes no value."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise SettingsError(f"HEADERS_FILE: the file {unreadable(error)}") from None
    headers: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        found = _HEADER.fullmatch(line)
        if found is None:
            raise SettingsError(f"HEADERS_FILE line {number}: is not `Name: value` in printable ASCII characters")
        name = found[1].lower()
        if _RESERVED.fullmatch(name):
            raise SettingsError(f"HEADERS_FILE line {number}: {name} is set by the receiver or by HTTP itself")
        if name in headers:
            raise SettingsError(f"HEADERS_FILE line {number}: {name} is given twice")
        headers[name] = found[2]
    return headers


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the internet; raises ValueError for anything else, such as a name.

    An IPv6 address that stands for one of IPv4 (mapped, NAT64, 6to4) is what that one is.
    """
    found = ip_address(address)
    if isinstance(found, IPv6Address):
        nat64 = IPv4Address(int(found) & 0xFFFF_FFFF) if found in _NAT64 else None
        inner = found.ipv4_mapped or found.sixtofour or nat64
        if inner is None:
            return found in _GLOBAL_UNICAST and found.is_global
        found = inner
    return found.is_global and not found.is_multicast


class _PublicAddresses(httpcore.SyncBackend):
    """Connects to public addresses only; the transport looks up each name before and passes its addresses."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Raise Unavailable for another address: no order can be delivered, and it may be a name that changes."""
        if not is_public(host):
            raise Unavailable(f"{host} is not a public address, which needs allow_private = true")
        return super().connect_tcp(host, port, timeout, local_address, socket_options)


def _network_reason(error: BaseException) -> str:
    """Return why there was no answer: from the system's or OpenSSL's own words, which hold no data."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            # After the comma is the name that it is not valid for.
            return f"certificate refused: {cause.verify_message.partition(',')[0]}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS error {cause.reason}"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return "the connection ended without an HTTP answer"
