"""Redis as the ledger uses it: its scripts, its errors as one of ours, the version of its data, walks in pages.

Only this package, and what opens the clients, knows the exceptions of redis-py.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from errno import ECONNRESET, EPIPE, errorcode
from functools import cache, partial
from importlib.resources import files
from socket import gaierror
from typing import Any, Final, TypeVar, cast

import msgspec
from redis import Redis as PlainRedis
from redis.asyncio import ConnectionPool
from redis.asyncio import Redis as PlainAsyncRedis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    InvalidResponse,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as NoAnswer
from redis.retry import Retry

from app import log
from app.errors import OldServer, OtherSchema, StoreUnavailable
from app.ledger.keys import DEFAULT_PREFIX, Keys

WORKER_TIMEOUT: Final = 10.0
"""Seconds. No sender waits for a worker, but a hanging Redis must not hold one for ever."""

_CONNECT_TIMEOUT: Final = 1.0

_log = log.get()


_WITH_PERMITS: Final = frozenset({"acquire_permit", "release_permit", "start_fetch"})
"""The scripts that take and release permits, and share permits.lua."""


@cache
def source(name: str) -> str:
    """Return the text of the script `name` of the folder lua, after what it shares with others."""
    folder = files("app.ledger").joinpath("lua")
    parts = ("prelude", "permits", name) if name in _WITH_PERMITS else ("prelude", name)
    return "\n".join(folder.joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in parts)


def load_scripts() -> None:
    """Read every script, so that processes forked later share the texts."""
    for file in files("app.ledger").joinpath("lua").iterdir():
        source(file.name.removesuffix(".lua"))


class Redis(PlainRedis):
    """A client, with the names of its deployment's keys: those of the default prefix, unless `client_of` made it."""

    names = Keys(DEFAULT_PREFIX)


class AsyncRedis(PlainAsyncRedis):
    """The same for the web process."""

    names = Keys(DEFAULT_PREFIX)


C = TypeVar("C", Redis, AsyncRedis)


def client_of(kind: type[C], url: str, prefix: str, **options: Any) -> C:
    """Return a client for the deployment with this KEY_PREFIX; `options` as of `from_url`."""
    client = cast("C", kind.from_url(url, **options))
    client.names = Keys(prefix)
    return client


def fresh(redis: AsyncRedis) -> AsyncRedis:
    """Return a client of the same server that has no connection yet; close it after use."""
    pool = redis.connection_pool
    client = cast("AsyncRedis", AsyncRedis.from_pool(ConnectionPool(pool.connection_class, **pool.connection_kwargs)))
    client.names = redis.names
    return client


def packed(names: Keys, **named: Any) -> bytes:
    """Return ARGV[1] of every script: the named arguments, the prefix of all keys and the version of the schema.

    Scripts take None for absent: `now` (ms since 1970) replaces the time of the Redis server, and `schema` is None for
    scripts that only read.
    """
    return msgspec.msgpack.encode({"prefix": names.prefix, "schema": VERSION, **named})


def server_time(redis: Redis) -> int:
    """Return the time of the Redis server in ms since 1970: the one clock of all machines."""
    seconds, microseconds = redis.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


class Script:
    """One Lua script, called with named arguments; `clock` replaces the time of the Redis server in tests."""

    def __init__(self, redis: Redis, name: str, clock: Callable[[], int] | None = None) -> None:
        self._run = redis.register_script(source(name))
        self._names = redis.names
        self._clock = clock

    def __call__(self, *blobs: bytes, **named: Any) -> Any:
        """Return the answer of the script, whose header names the arguments; `blobs` are ARGV from 2 on.

        Raises OtherSchema, and what redis-py raises.
        """
        if self._clock is not None:
            named.setdefault("now", self._clock())
        try:
            return self._run(args=[packed(self._names, **named), *blobs])
        except ResponseError as error:
            raise other_schema(error) or error from None


SERVER_STATES: Final = frozenset(
    "OOM READONLY MISCONF NOREPLICAS NOPERM BUSY LOADING MASTERDOWN CLUSTERDOWN".split()  # noqa: SIM905  # as in Lua
)
"""Codes of errors that concern all orders: the server refuses, whichever order it is. prelude.lua has the same."""

_STATE: Final = re.compile(rf"\b(?:{'|'.join(sorted(SERVER_STATES))})\b")
"""Redis 6.2 puts the error of a command into the text of the script's error."""

_NO_DATABASE: Final = "DB index is out of range"
_CODE: Final = re.compile(r"[A-Z]{3,20}\b")
_IN_PIPELINE: Final = "of pipeline caused error: "
"""What redis-py puts before the text of the server, after the command with all its arguments."""
_DENIED: Final = re.compile(r"(?i)no permissions to (?:run the '([\w|-]+)' command|access)")
"""In a script the server puts this text into an error with another code."""


def for_worker(url: str, prefix: str) -> Redis:
    """Return the client of the workers, the pool and the commands; one try, then the caller decides."""
    return client_of(
        Redis,
        url,
        prefix,
        socket_timeout=WORKER_TIMEOUT,
        socket_connect_timeout=_CONNECT_TIMEOUT,
        retry=Retry(NoBackoff(), 0),
    )


@contextmanager
def for_command(url: str, prefix: str) -> Iterator[Redis]:
    """Open Redis for a command.

    Raises OtherSchema for data of another version, and StoreUnavailable when Redis fails, here or in the block.
    """
    redis = for_worker(url, prefix)
    with translated_errors(redis), redis:
        refuse_other_schema(redis)
        yield redis


@contextmanager
def translated_errors(redis: Redis) -> Iterator[None]:
    """Turn redis-py's errors into StoreUnavailable.

    An OSError is none of them, as redis-py has its own for those of its sockets: it may come from stdout.
    """
    try:
        yield
    except RedisError as error:
        raise StoreUnavailable(cause(error, redis)) from None


def code(error: BaseException) -> str:
    """Return the error code of the server, such as OOM or NOREPLICAS, else the type; the text may hold data.

    NOPERM is followed by the command that the user may not run.
    """
    text = str(error).rpartition(_IN_PIPELINE)[2]
    if isinstance(error, ResponseError):
        if denied := _DENIED.search(text):
            return f"NOPERM {denied[1] or 'key'}"
        if "EXEC without MULTI" in text:  # redis-py goes on after a refused MULTI
            return "NOPERM multi"
        if state := _STATE.search(text):
            return state[0]
    found = getattr(error, "status_code", None) or text.partition(" ")[0]
    return found if _CODE.fullmatch(found) else type(error).__name__


def cause(error: BaseException, redis: Any) -> str:
    """Return in one sentence why the Redis of this client failed, and what to do.

    It names host and port, or the path of a socket, and no other part of REDIS_URL; no text of the server.
    """
    pool = redis.connection_pool
    given, is_tls = pool.connection_kwargs, "ssl" in pool.connection_class.__name__.lower()
    at = given.get("path") or f"{given.get('host', 'localhost')}:{given.get('port', 6379)}"
    return f"Redis at {at} {_what_failed(error, given, is_tls=is_tls)}"


def _what_failed(error: BaseException, given: Mapping[str, Any], *, is_tls: bool) -> str:
    text, below = str(error), _below(error)
    if isinstance(error, AuthenticationError):
        if "must be called with the client already" in text or "Authentication required" in text:
            return "needs a password: put user and password into REDIS_URL"
        return "refuses user and password of REDIS_URL: wrong password, or the user is missing or off"
    if isinstance(error, BusyLoadingError):
        return "loads its data: wait"
    if isinstance(error, ResponseError):
        if _NO_DATABASE in text:
            return f"has no database {given.get('db')}: correct the number at the end of REDIS_URL"
        return f"refuses this ({code(error)}): see `ota-receiver check`"
    if isinstance(error, InvalidResponse):
        if '"\\x15"' in text:  # the first byte of a TLS alert
            return "speaks TLS on this port: use rediss:// in REDIS_URL"
        return "is no Redis: another program answers on this port; correct REDIS_URL"
    if isinstance(below, ssl.SSLCertVerificationError):
        verify = "name its CA with ?ssl_ca_certs=FILE at the end of REDIS_URL, or correct the certificate"
        return f"has a certificate that is not trusted ({below.verify_message}): {verify}"
    if isinstance(below, ssl.SSLError):
        return f"fails to speak TLS on this port ({below.reason}): if it has no TLS, use redis:// in REDIS_URL"
    if isinstance(below, gaierror):
        return "is unknown: there is no such host name; correct REDIS_URL, or the name server"
    if isinstance(below, ConnectionRefusedError):
        return "refuses connections: start it, or correct REDIS_URL"
    if isinstance(below, FileNotFoundError):
        missing = "that socket" if "path" in given else "a file that REDIS_URL names"
        return f"cannot be reached: {missing} is missing"
    if "max number of clients" in text:
        return "has no room for another connection: raise maxclients"
    if isinstance(error, NoAnswer | TimeoutError):
        no_tls = "; if this port has no TLS, use redis:// in REDIS_URL" if is_tls else ""
        return f"does not answer in time: it hangs, or a firewall drops the packets{no_tls}"
    if isinstance(below, OSError) and below.errno not in {None, ECONNRESET, EPIPE}:
        return f"cannot be reached ({errorcode.get(below.errno, 'unknown error')}): look at the network between us"
    tls = "" if is_tls else "; if this port needs TLS, use rediss:// in REDIS_URL"
    return f"closes the connection: it stops or restarts{tls}"


def _below(error: BaseException) -> BaseException:
    """Return the error that redis-py has translated."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # one of them is there
    return error


def is_refusal(error: BaseException) -> bool:
    """Return whether the server answered and refused; an error of the connection, user or database is none."""
    return isinstance(error, ResponseError) and _NO_DATABASE not in str(error)


def is_wrong_type(answer: object) -> bool:
    """Return whether a key has another type: the fault of that one order, not of Redis."""
    return isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE")


class Outage:
    """Whether a process, `role`, can use Redis: an outage is logged as it begins and as it ends. For one thread."""

    def __init__(self, role: str, redis: Redis) -> None:
        self._role = role
        self._redis = redis
        self._since: float | None = None

    def begin(self, error: Exception) -> None:
        """Note that Redis has failed, or holds data of another version."""
        if self._since is not None:
            return
        self._since = time.monotonic()
        if isinstance(error, OtherSchema):
            _log.error("service.other_schema", held=error.held, ours=VERSION)
        else:
            log_outage(self._role, code(error), cause(error, self._redis))

    def end(self) -> None:
        """Note that Redis has answered."""
        if self._since is not None:
            _log.warning("redis.recovered", role=self._role, away_s=round(time.monotonic() - self._since, 1))
            self._since = None


def log_outage(role: str, code: str, cause: str) -> None:
    """Log that this process cannot use Redis: it refuses with a code of the server, or cannot be reached."""
    if _CODE.match(code):
        _log.error("redis.refused", role=role, error=code, cause=cause)
    else:
        _log.warning("redis.unavailable", role=role, error=code, cause=cause)


VERSION: Final = 5
"""The version of the layout in Redis. No code brings old data up to date: data of another version is refused."""

LOWEST: Final = (6, 2)
"""Redis 6.2 added ZADD LT and XTRIM MINID; the first Valkey is 7.2."""


def old_server(hello: Any) -> OldServer | None:
    """Return what is wrong with the server that gave this answer to HELLO, None if it is new enough.

    HELLO and not INFO, which a user may be forbidden to run.
    """
    names = hello if isinstance(hello, dict) else dict(zip(hello[::2], hello[1::2], strict=True))
    name, version = (names[field].decode() for field in (b"server", b"version"))
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return OldServer(f"{name.title()} {version}", "Redis 6.2 or Valkey 7.2") if numbers < LOWEST else None


def refuse_old_server(redis: Redis) -> None:
    """Raise OldServer for a server that lacks commands of the scripts; before a start."""
    client: Any = redis
    if old := old_server(client.execute_command("HELLO")):
        raise old


_REFUSED: Final = "OTHERSCHEMA "


def other_schema(error: Exception) -> OtherSchema | None:
    """Return the OtherSchema that a script answered with, None for another error."""
    if isinstance(error, OtherSchema):
        return error
    text = str(error)
    return OtherSchema(text.removeprefix(_REFUSED), VERSION) if text.startswith(_REFUSED) else None


def refuse_other_schema(redis: Redis) -> None:
    """Raise OtherSchema if Redis holds data of another version; for readers, and before a start."""
    held: Any = redis.get(redis.names.schema)
    if is_other_schema(held):
        raise OtherSchema(held.decode(errors="replace"), VERSION)


def is_other_schema(held: bytes | None) -> bool:
    """Return whether the value of the key `ota:schema` names another version."""
    return held is not None and held != str(VERSION).encode()


PAUSE: Final = 0.5
"""Seconds between two attempts: a failover takes seconds, and a worker has nothing else to do."""

T = TypeVar("T")


def retry_until(redis: Redis, deadline: float, step: Callable[[], T]) -> T:
    """Return what `step` returns; while Redis is unavailable call it again, each time on a fresh connection.

    After `deadline` (time.monotonic) raise what it raises. A step must be harmless when the server did it already and
    only the answer was lost.
    """
    while True:
        try:
            return step()
        except RedisError as error:
            if not is_unavailable(error):
                raise
            # After a failover an old connection may lead to what is a replica now.
            redis.connection_pool.disconnect()
            if time.monotonic() + PAUSE > deadline:
                raise
        time.sleep(PAUSE)


def is_unavailable(error: BaseException) -> bool:
    """Return whether Redis is at fault, which concerns all orders, and not the command, which concerns one."""
    if isinstance(error, ResponseError):
        return code(error).partition(" ")[0] in SERVER_STATES
    return isinstance(error, RedisError)


PAGE: Final = 200
"""Members or entries a call: Redis serves others in between."""

Scored = tuple[str, int]
"""A member and its score, here always ms since 1970."""


def newest_first(redis: Redis, zset: str, since: int | None = None, until: int | None = None) -> Iterator[list[Scored]]:
    """Yield pages from the highest score down; `since` and `until` are ms and inclusive.

    A member that changes meanwhile moves to the front, which is behind us: nothing is shown twice or skipped.
    """
    return _pages(redis, zset, "+inf" if until is None else until, "-inf" if since is None else since, desc=True)


def oldest_first(redis: Redis, zset: str, since: int | None = None, until: int | None = None) -> Iterator[list[Scored]]:
    """Yield pages from the lowest score up; without `until` a member that changes meanwhile comes again."""
    return _pages(redis, zset, "-inf" if since is None else since, "+inf" if until is None else until, desc=False)


def _pages(redis: Redis, zset: str, start: int | str, end: int | str, *, desc: bool) -> Iterator[list[Scored]]:
    client: Any = redis

    # All members of a score are read by one call, at most those that a few scripts wrote in the same ms: a page that
    # began within a score would repeat members, or skip some once others are removed.
    def read(first: int | str, last: int | str, limit: int) -> list[Scored]:
        by_score = {"byscore": True, "desc": desc, "offset": 0, "num": limit, "withscores": True}
        return [(member.decode(), int(score)) for member, score in client.zrange(zset, first, last, **by_score)]

    while page := read(start, end, PAGE):
        edge = page[-1][1]
        if len(page) < PAGE:
            yield page
            return
        before = [one for one in page if one[1] != edge]
        yield before or read(edge, edge, -1)
        start = edge if before else f"({edge}"


def stream_pages(
    redis: Redis, stream: str, low: str = "-", high: str = "+", *, newest_first: bool = False, count: int = PAGE
) -> Iterator[list[tuple[bytes, dict[bytes, bytes]]]]:
    """Yield the entries of a stream, `count` a page; each is its id and its fields.

    `low` and `high` are ids, inclusive unless one begins with `(`. Entries that are added meanwhile come too, unless
    `high` excludes them.
    """
    while True:
        read = partial(redis.xrevrange, stream, high, low) if newest_first else partial(redis.xrange, stream, low, high)
        page: Any = read(count=count)
        if not page:
            return
        yield page
        edge = f"({page[-1][0].decode()}"
        low, high = (low, edge) if newest_first else (edge, high)
