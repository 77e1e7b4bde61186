"""Redis failing under a command, as one error of ours: only this package knows redis-py's exceptions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError, ResponseError

from app.errors import ReceiverError, SettingsError

_CODE: Final = re.compile("[A-Z]{2,20}")
_IN_PIPELINE: Final = "of pipeline caused error: "
"""What redis-py puts before the server's words, after the command with all its arguments."""


class StoreUnavailable(ReceiverError):
    """Redis did not do what it was asked; the text is one line for people, without password or foreign words."""


@contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Turn redis-py's errors into StoreUnavailable; `url` gives the address that the text names.

    An OSError is none of them, as redis-py has its own for those of its sockets: it may come from stdout.
    """
    where = address(url)
    try:
        yield
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        what = f"refuses us ({type(error).__name__}): correct user and password in REDIS_URL"
        raise StoreUnavailable(f"Redis at {where} {what}") from None
    except ResponseError as error:
        what = f"refuses this ({_code(error)}): see `ota-receiver check`"
        raise StoreUnavailable(f"Redis at {where} {what}") from None
    except RedisError as error:
        what = f"does not answer ({type(error).__name__}): start it, or correct REDIS_URL"
        raise StoreUnavailable(f"Redis at {where} {what}") from None


def _code(error: ResponseError) -> str:
    """Return the server's word for it, such as OOM or NOREPLICAS; what follows it may hold anything."""
    word = error.status_code or str(error).rpartition(_IN_PIPELINE)[2].partition(" ")[0]
    return word if _CODE.fullmatch(word) else type(error).__name__


@contextmanager
def readable_url() -> Iterator[None]:
    """Turn the ValueError that redis-py raises for an address it cannot read into SettingsError."""
    try:
        yield
    except ValueError:
        raise SettingsError("REDIS_URL: is not an address of the form redis://, rediss:// or unix://") from None


def address(url: str) -> str:
    """Return host and port, or the path of a socket: what of REDIS_URL may be shown."""
    try:
        parts = urlsplit(url)
        return f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path or "an unknown address"
    except ValueError:
        return "an unknown address"
