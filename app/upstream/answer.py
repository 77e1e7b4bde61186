"""One HTTP call → its answer or one of our errors: the only seam where httpx's exceptions stop.

The table "What upstream's answers mean" of docs/architecture.md in code. An error carries a reason code and never a
foreign text: those quote addresses, headers and bodies.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import monotonic

import httpx

from app.errors import (
    ConnectionFault,
    OrderNotFound,
    RequestRejected,
    Throttled,
    Unavailable,
    UnreadableAnswer,
    UpstreamError,
)
from app.upstream.wire import decode

MAX_ANSWER_BYTES = 16 * 1024 * 1024  # a full page of 20,000 summaries is about 10 MiB
_MAX_ERROR_BYTES = 64 * 1024
_LONGEST_WAIT = 3600.0  # seconds; a larger Retry-After is more likely a mistake than a plan
_SAAS_CODE = re.compile(r"saas_([a-z]{1,20}_not_found)")


@dataclass(frozen=True, slots=True)
class Answer:
    """A 2xx answer, and how many seconds it took from the start of the call to the last byte."""

    status: int
    body: bytes = field(repr=False)
    seconds: float


def ask(http: httpx.Client, request: httpx.Request) -> Answer:
    """Send `request` and return its 2xx answer.

    Raises UpstreamError, one kind for each row of the table, for everything else that can happen.
    """
    begun = monotonic()
    with translated_errors():
        response = http.send(request, stream=True)
        try:
            body = _body(response, MAX_ANSWER_BYTES if response.is_success else _MAX_ERROR_BYTES)
        finally:
            response.close()
    if not response.is_success:
        raise refusal(response.status_code, response.headers, body or b"", datetime.now(UTC))
    if body is None:
        raise UnreadableAnswer("answer_too_large", http_status=response.status_code)
    return Answer(response.status_code, body, monotonic() - begun)


def refusal(status: int, headers: httpx.Headers, body: bytes, now: datetime) -> UpstreamError:
    """Return what an answer other than 2xx means; `now` is aware and dates a Retry-After."""
    code = _code(body)
    wait = retry_after(headers.get("retry-after"), now)
    saas = _SAAS_CODE.fullmatch(code)
    match status:
        case _ if 300 <= status < 400:
            return ConnectionFault("redirected", http_status=status)
        case _ if saas and 400 <= status < 500:
            return ConnectionFault(saas[1], http_status=status)
        case 400:
            return RequestRejected("bad_request", http_status=status)
        case 401:
            return ConnectionFault("unauthorized", http_status=status)
        case 403:
            return ConnectionFault("forbidden", http_status=status)
        case 404 if code == "resource_not_found":
            return OrderNotFound("order_not_found", http_status=status)
        case 404:
            return ConnectionFault("not_found", http_status=status)
        case 429:
            return Throttled("throttled", http_status=status, retry_after=wait)
        case _ if 400 <= status < 500 and status != 408:
            return RequestRejected(f"http_{status}", http_status=status)
    return Unavailable(f"http_{status}", http_status=status, retry_after=wait)


def retry_after(value: str | None, now: datetime) -> float | None:
    """Return the seconds from `now` (aware) that a Retry-After asks for, 0 to 3600; None if it says nothing usable."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text), _LONGEST_WAIT)
    try:
        moment = parsedate_to_datetime(text)
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn whatever httpx and the standard library under it raise into our errors, leaving their texts behind."""
    try:
        yield
    except (httpx.TimeoutException, TimeoutError):
        raise Unavailable("timeout") from None
    except (httpx.DecodingError, zlib.error):
        raise UnreadableAnswer("unreadable_answer") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError, UnicodeError):
        # The request could not even be written down: the address or the key holds what HTTP cannot carry.
        raise ConnectionFault("unsendable_request") from None
    except (httpx.HTTPError, httpx.StreamError, httpx.CookieConflict, OSError):
        raise Unavailable("network") from None


def _body(response: httpx.Response, limit: int) -> bytes | None:
    """Return the body; None, and the rest stays unread, if more than `limit` bytes come.

    httpx would unpack without a bound: 64 KiB of gzip can hold 64 MiB, and gzip within gzip 64 GiB. Only plain gzip
    is asked for; anything else stays packed, and turns out to be no JSON.
    """
    packed = response.headers.get("content-encoding", "").strip().lower() == "gzip"
    gzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    arrived, body = 0, bytearray()
    for chunk in response.iter_raw():
        arrived += len(chunk)
        body += gzip.decompress(chunk, limit + 1 - len(body)) if packed else chunk
        if max(arrived, len(body)) > limit:  # what follows the end of the gzip makes no body, but comes all the same
            return None
    return bytes(body)


def _code(body: bytes) -> str:
    """Return the `code` of an error body (upstream.md 5), "" if there is none."""
    try:
        tree = decode(body)
    except UnreadableAnswer:
        return ""
    code = tree.get("code") if isinstance(tree, dict) else None
    return code if isinstance(code, str) else ""
