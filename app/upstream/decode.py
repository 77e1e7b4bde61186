"""JSON from the Channel Manager → frozen values; one odd field must never cost a paid order.

Every field is read by itself. A value that is absent, "", the all-zero GUID or unreadable becomes None, a missing list
(); an unknown field stays in `extra`. Only a field without `| None` is required: UnreadableAnswer if it is missing.
The wire format is that of upstream.md 1 ("treat "" and absent alike, parse numbers as Decimal").
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, date, datetime, time
from decimal import Decimal, InvalidOperation
from functools import cache
from hashlib import sha256
from typing import Any, ClassVar, Final, NewType, TypeVar, get_args, get_origin

import msgspec
from pydantic import SecretStr

from app.body import decoded
from app.errors import UnreadableAnswer
from app.ids import EMPTY_GUID, guid

Guid = NewType("Guid", str)
"""A canonical GUID: lower case, with hyphens, without braces."""

MAX_PARTS: Final = 200_000
"""Objects and lists in one answer. The 16 MiB that an answer may have hold 35,000 wallets with a ticket each, which are
104,000; of empty wallets they hold 5.6 million, which cost 35 s and 1.5 GiB."""

MAX_VALUES: Final = 1_000_000
"""Values in one answer, counted by their commas; those 35,000 wallets have 560,000."""

_LONGEST_REQUIRED = 50  # the event carries the same texts in 50 characters (upstream.md 0)
_LARGEST_WHOLE = 2**63  # of upstream's types, and of what consumers have for whole numbers
_LARGEST_EXPONENT = 30  # beyond any money; printing 1E+999999999 in full would take a gigabyte


class Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """One object of an answer.

    It may appear in a traceback or a log line, so its repr shows only the fields named in `shown`: codes, counts and
    states, never a person, a ticket number or a link.
    """

    shown: ClassVar[tuple[str, ...]] = ()

    extra: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Keep rich, which prints locals in tracebacks, to what repr shows; a list is shown as its length."""
        values = [(name, getattr(self, name)) for name in self.shown]
        return [(name, len(value) if isinstance(value, tuple) else value) for name, value in values]


P = TypeVar("P", bound=Part)


def decode(raw: bytes) -> Any:
    """Return the JSON in `raw` with every fraction as a Decimal of the digits that were sent.

    Raises UnreadableAnswer, and nothing else, if it is no JSON or holds too much.
    """
    return _decoded(_DECODER, raw)


def digest(raw: bytes) -> str:
    """Return 64 hex digits that stay the same as long as the content of the body does.

    Neither white space, nor the order of keys, nor 200 against 200.0 changes it.
    Raises UnreadableAnswer, and nothing else, if the body is no JSON.
    """
    return sha256(_ENCODER.encode(_decoded(_CANONICAL_DECODER, raw))).hexdigest()


def build(kind: type[P], raw: object) -> P:
    """Return a `kind` with each of its fields read from the decoded object `raw`.

    Raises UnreadableAnswer if a required field is missing.
    """
    members = raw if isinstance(raw, dict) else {}
    readers = _readers(kind)
    values = {name: read(members.get(key)) for key, (name, read) in readers.items()}
    return kind(**values, extra={key: value for key, value in members.items() if key not in readers})


def build_all(kind: type[P], raw: object) -> tuple[P, ...]:
    """Return one `kind` for each object in the decoded list `raw`; () if it is no list."""
    return tuple(build(kind, one) for one in raw if isinstance(one, dict)) if isinstance(raw, list) else ()


def _number(text: str) -> Decimal | str:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent that no Decimal holds: the field is odd, the order is not
        return text


def _shortest_number(text: str) -> Decimal | int | str:
    number = _number(text)
    if isinstance(number, str) or abs(number.adjusted()) > _LARGEST_EXPONENT:
        return number
    if number == number.to_integral_value():
        return int(number)
    return Decimal(f"{number:f}".rstrip("0"))  # not normalize(): that rounds to 28 digits


_DECODER = msgspec.json.Decoder(float_hook=_number)
_CANONICAL_DECODER = msgspec.json.Decoder(float_hook=_shortest_number)
_ENCODER = msgspec.json.Encoder(order="deterministic", decimal_format="number")


def _decoded(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    # A few ms, before anything is built. In texts these characters are rare.
    if raw.count(b"{") + raw.count(b"[") > MAX_PARTS or raw.count(b",") > MAX_VALUES:
        raise UnreadableAnswer("too_many_values")
    try:
        return decoded(decoder.decode, raw)
    except (ValueError, RecursionError):  # msgspec's errors and UnicodeDecodeError are ValueErrors
        raise UnreadableAnswer("unreadable_answer") from None


def _required_guid(raw: object) -> Guid:
    found = guid(raw)
    if found is None:
        raise UnreadableAnswer("unreadable_answer")
    return Guid(found)


def _required_text(raw: object) -> str:
    if not isinstance(raw, str) or not 1 <= len(raw) <= _LONGEST_REQUIRED:
        raise UnreadableAnswer("unreadable_answer")
    return raw


def _text(raw: object) -> str | None:
    if isinstance(raw, bool) or not isinstance(raw, str | int | Decimal):
        return None
    text = str(raw)  # a reference number may be sent as a number
    return text if text not in ("", EMPTY_GUID) else None


def _secret(raw: object) -> SecretStr | None:
    text = _text(raw)
    return SecretStr(text) if text is not None else None


def _decimal(raw: object) -> Decimal | None:
    text = _text(raw)
    number = _number(text) if text else None
    if not isinstance(number, Decimal) or not number.is_finite() or abs(number.adjusted()) > _LARGEST_EXPONENT:
        return None
    return number


def _whole(raw: object) -> int | None:
    number = _decimal(raw)
    if number is None or number != number.to_integral_value() or not -_LARGEST_WHOLE <= number < _LARGEST_WHOLE:
        return None
    return int(number)


def _datetime(raw: object) -> datetime | None:
    """Read a time; the seventh digit of a fraction is cut, a missing zone is UTC (upstream.md 1)."""
    if not isinstance(raw, str) or "T" not in raw:
        return None
    try:
        found = datetime.fromisoformat(raw)
        found = found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
    return found if found.year > 1 else None  # Business Central writes "no time" as year 1


def _date(raw: object) -> date | None:
    with suppress(TypeError, ValueError):
        day = date.fromisoformat(raw)  # type: ignore[arg-type]  # anything but a string is a TypeError
        return day if day.year > 1 else None
    return None


def _time(raw: object) -> time | None:
    with suppress(TypeError, ValueError):
        return time.fromisoformat(raw)  # type: ignore[arg-type]  # anything but a string is a TypeError
    return None


_Reader = Callable[[object], Any]
_READER_OF: dict[object, _Reader] = {
    Guid: _required_guid,
    str: _required_text,
    str | None: _text,
    SecretStr | None: _secret,
    bool: lambda raw: raw is True,
    int | None: _whole,
    Decimal | None: _decimal,
    datetime | None: _datetime,
    date | None: _date,
    time | None: _time,
}


@cache
def _readers(kind: type[Part]) -> dict[str, tuple[str, _Reader]]:
    """Return, for each key on the wire, the field's name and what reads it."""
    return {
        field.encode_name: (field.name, _reader(field.type))
        for field in msgspec.structs.fields(kind)
        if field.name != "extra"
    }


def _reader(wanted: Any) -> _Reader:
    if get_origin(wanted) is tuple:
        part = get_args(wanted)[0]
        return lambda raw: build_all(part, raw)
    return _READER_OF[wanted]
