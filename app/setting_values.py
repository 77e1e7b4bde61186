"""The types of the settings: what a value must be, with the sentence of each error; it never quotes the value."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import parse_qsl, unquote_plus, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, IPvAnyNetwork, SecretStr, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from app import times
from app.ids import guid

_DATABASE: Final = re.compile(r"/?|/[0-9]{1,5}")
_REDIS_OPTIONS: Final = {
    "db": "[0-9]{1,5}",
    "ssl_cert_reqs": "none|optional|required",
    "ssl_check_hostname": "(?i:true|false)",
    "ssl_ca_certs": ".+",
    "ssl_certfile": ".+",
    "ssl_keyfile": ".+",
}
"""Options of REDIS_URL, those of TLS only for rediss://. Time-outs, protocol and the rest are ours."""
SHORTEST_PASSWORD: Final = 16
"""Characters of OPS_ACT_TOKEN at least."""

_LOOPBACK: Final = {"127.0.0.1", "localhost", "::1"}


def _guid(value: str) -> str:
    found = guid(value.strip())
    if found is None:
        raise ValueError("is not a GUID")
    return found


def _client_state(value: SecretStr) -> SecretStr:
    """Refuse what a subscription cannot carry: clientState is 1 to 50 characters (upstream.md 3)."""
    if not 1 <= len(value.get_secret_value()) <= 50:
        raise ValueError("must have 1 to 50 characters")
    return value


def _header(value: SecretStr) -> SecretStr:
    """Refuse what no header of HTTP can carry."""
    if not re.fullmatch(r"[!-~](?:[ -~]*[!-~])?", value.get_secret_value()):
        raise ValueError("must be of printable ASCII characters: it is sent in a header")
    return value


def _hard_to_guess(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < SHORTEST_PASSWORD:
        raise ValueError(f"must have at least {SHORTEST_PASSWORD} characters")
    return value


def _company_name(value: str) -> str:
    """Decode a name that was copied from an address: it has no blank, and holds what stands for one there."""
    return unquote_plus(value) if re.fullmatch(r"\S*(?:%[0-9A-Fa-f]{2}|\+)\S*", value) else value


def _seconds(value: object) -> int:
    text = str(value).strip()
    return times.seconds(f"{text}s" if text.isdecimal() else text)


def _https_unless_loopback(value: str) -> str:
    parts = _parts(value)
    if parts is None or parts[1] is None or parts[0] not in {"http", "https"} or "?" in value or "#" in value:
        raise ValueError("is not an http(s) address")
    if parts[0] == "http" and parts[1] not in _LOOPBACK:
        raise ValueError("must be https, since what is sent there carries a secret")
    return value.rstrip("/")


def _collector(value: str) -> str:
    """Refuse what holds a secret, or a path and options that OpenTelemetry would not keep together."""
    parts = _parts(value)
    if parts is None or parts[0] not in {"http", "https"} or not parts[1] or not re.fullmatch("[!$-~]+", value):
        raise ValueError("is not an http(s) address")
    if "@" in value or "?" in value:
        raise ValueError("must hold no user, password or option: send a key by OTEL_EXPORTER_OTLP_HEADERS")
    return value


def _endpoint(value: SecretStr, info: ValidationInfo) -> SecretStr:
    """Refuse what no POST can be sent to; `allow_private`, a field declared before, also allows http."""
    url = value.get_secret_value()
    parts = _parts(url)
    if parts is None or parts[0] not in {"http", "https"} or not parts[1] or not re.fullmatch('[!"$-~]+', url):
        raise ValueError("is not an http(s) address (percent-encode other characters)")
    if "@" in urlsplit(url).netloc:
        raise ValueError("must hold no user and password: send them as Authorization, a line of headers_file")
    if parts[0] == "http" and not info.data.get("allow_private"):
        raise ValueError("must be https, unless allow_private is true")
    return value


def _webhook_secret(value: SecretStr) -> SecretStr:
    """Refuse what Standard Webhooks does not call a secret: whsec_ and base64 of 24 to 64 bytes."""
    prefix, _, text = value.get_secret_value().partition("_")
    try:
        size = len(b64decode(text + "=" * (-len(text) % 4), validate=True))
    except ValueError:
        size = 0
    if prefix != "whsec" or not 24 <= size <= 64:
        raise ValueError("must be whsec_ and the base64 of 24 to 64 bytes")
    return value


def _proxy(value: SecretStr) -> SecretStr:
    """Refuse all but http://[user:password@]host[:port]; the text of an error quotes nothing of it."""
    url = value.get_secret_value()
    parts = _parts(url)
    if parts is None or parts[0] != "http" or not parts[1] or not re.fullmatch("[!-~]+", url):
        raise ValueError("is not an address http://host:port (percent-encode user and password)")
    if urlsplit(url).path.strip("/") or "?" in url or "#" in url:
        raise ValueError("must end with the port (percent-encode user and password)")
    return value


def is_loopback(url: str) -> bool:
    """Return whether an address is one of this machine."""
    return urlsplit(url).hostname in _LOOPBACK


def _host(value: str) -> str:
    if "/" in value or value.count(":") == 1 or value.startswith("["):
        raise ValueError("is not a host name or an IP address alone (the port is PORT)")
    return value


def _not_a_probe(value: str) -> str:
    if value.rstrip("/") in {"/healthz", "/readyz", "/metrics"}:
        raise ValueError("is the path of a probe")
    return value


def _redis_url(value: SecretStr) -> SecretStr:
    """Refuse what redis-py would ignore, or would raise only when it connects, with a text that quotes it.

    No text quotes a part of the address: any may be a part of the password.
    """
    url = value.get_secret_value()
    if _parts(url) is None or not url.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("is not an address redis://, rediss:// or unix:// (percent-encode the password)")
    parts = urlsplit(url)
    if parts.scheme != "unix" and not parts.hostname:
        raise ValueError("names no host")
    is_database = parts.scheme == "unix" or _DATABASE.fullmatch(parts.path)
    # With an @ after host and port, these are a part of the password, and would be shown.
    if "@" in parts.path or parts.fragment or not is_database:
        raise ValueError("must end with the number of a database, such as /0 (percent-encode the password)")
    allowed = _REDIS_OPTIONS if parts.scheme == "rediss" else {"db": _REDIS_OPTIONS["db"]}
    for name, option in parse_qsl(parts.query, keep_blank_values=True):
        if name not in allowed or not re.fullmatch(allowed[name], option):
            tls = "" if parts.scheme == "rediss" else "; those of TLS need rediss://"
            raise ValueError(f"has an unknown option after the ?, or a wrong value of {', '.join(allowed)}{tls}")
        if allowed[name] == ".+" and not Path(option).is_file():
            raise ValueError(f"names a file in {name} that is not there")
    return value


def _parts(url: str) -> tuple[str, str | None] | None:
    """Return scheme and host of an address, None if it is not one; urlsplit's own errors quote the address."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts.scheme, parts.hostname


def scheme_and_host(url: str) -> str:
    """Return what of an address may be shown; the rest of it may hold a secret."""
    parts = urlsplit(url) if _parts(url) else None
    # With an @ after it, what looks like the host is a part of a user's name or password.
    if parts is None or "@" in parts.path + parts.query + parts.fragment:
        return "an address"
    return f"{parts.scheme}://{parts.hostname or ''}"


def _comma_list(value: object) -> object:
    return tuple(filter(None, (part.strip() for part in value.split(",")))) if isinstance(value, str) else value


def besides(other: str) -> AfterValidator:
    """Refuse a secret without the one in the field `other`, declared before, or that is the same."""

    def check(value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is not None and other in info.data:
            if info.data[other] is None:
                raise ValueError(f"needs {other.upper()}")
            if info.data[other] == value:
                raise ValueError(f"must not be the same as {other.upper()}")
        return value

    return AfterValidator(check)


def not_(relation: str, other: str, is_wrong: Callable[[int, int], bool]) -> AfterValidator:
    """Compare with a field that was declared before; if that one is wrong itself, there is nothing to compare with."""

    def check(value: int, info: ValidationInfo) -> int:
        if is_wrong(value, info.data.get(other, value)):
            raise ValueError(f"is {value}, and must not be {relation} {other.upper()}, which is {info.data[other]}")
        return value

    return AfterValidator(check)


def _form(pattern: str, sentence: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(sentence)
        return value

    return AfterValidator(check)


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError("must be a whole path, from / on")
    return value


def _zero_or_a_minute(value: int) -> int:
    if 0 < value < 60:
        raise ValueError("must be 0 or at least 60s")
    return value


AS_SECONDS: Final = BeforeValidator(_seconds)

Guid = Annotated[str, AfterValidator(_guid)]
ClientState = Annotated[SecretStr, AfterValidator(_client_state)]
Text = Annotated[str, Field(min_length=1)]
HeaderSecret = Annotated[SecretStr, AfterValidator(_header)]
PasswordToAct = Annotated[HeaderSecret, AfterValidator(_hard_to_guess)]
CompanyName = Annotated[Text, AfterValidator(_company_name)]
Seconds = Annotated[int, AS_SECONDS]
SecondsOrOff = Annotated[Seconds, AfterValidator(_zero_or_a_minute)]
Host = Annotated[str, AfterValidator(_host)]
Date = Annotated[str, _form(r"\d{4}-\d{2}-\d{2}", "is not a date")]
KeyPrefix = Annotated[
    str, _form("[a-z0-9][a-z0-9-]{0,19}", "must be of lower-case letters, digits and hyphens, at most 20")
]
Slug = Annotated[
    str,
    _form("[a-z0-9][a-z0-9_-]{0,30}", "the table's name must be of lower-case letters, digits, - and _, at most 31"),
]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
BucketUrl = Annotated[
    str,
    _form(
        r"(s3|gs|az)://[A-Za-z0-9._-]+(/(?!\.{1,2}(/|$))[A-Za-z0-9._=-]+)*/?",
        "is not s3://, gs:// or az:// with a bucket and a prefix of letters, digits and any of . _ = - /",
    ),
]
CommaList = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]
Networks = Annotated[tuple[IPvAnyNetwork, ...], BeforeValidator(_comma_list)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
ProxyUrl = Annotated[SecretStr, AfterValidator(_proxy)]
HttpsUrl = Annotated[str, AfterValidator(_https_unless_loopback)]
CollectorUrl = Annotated[str, AfterValidator(_collector)]
EndpointUrl = Annotated[SecretStr, AfterValidator(_endpoint)]
WebhookSecret = Annotated[SecretStr, AfterValidator(_webhook_secret)]
WebhookPath = Annotated[
    str,
    _form("/[A-Za-z0-9_.~-][A-Za-z0-9/_.~-]*", "must be a path: a slash, then letters, digits and any of / _ . ~ -"),
    AfterValidator(_not_a_probe),
]

_SENTENCES: Final = {
    "missing": "missing",
    "int_parsing": "is not a whole number",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "is empty",
    "too_short": "is empty",
    "string_type": "must be a text in quotes",
    "tuple_type": "must be a list of texts",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "literal_error": "must be {expected}",
    "ip_any_network": "must be IP addresses or networks, separated by commas",
}
"""pydantic's kind of error -> what is wrong, in plain words; other kinds keep pydantic's text."""


def sentence(problem: ErrorDetails, field: FieldInfo | None) -> str:
    """Return what is wrong with a value and an example of a right one."""
    if field is None:
        return problem["msg"]
    unit = "s" if AS_SECONDS in field.metadata else ""
    limits = {name: f"{limit}{unit}" for name, limit in problem.get("ctx", {}).items()}
    text = _SENTENCES.get(problem["type"], problem["msg"].removeprefix("Value error, ")).format(**limits)
    examples = [*(field.examples or ()), field.default]
    if " which is " in text or not isinstance(examples[0], str | int):
        return text
    return f"{text}, for example {examples[0]}{unit}"
