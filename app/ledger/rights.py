"""The rights that the Redis user needs: every command that a process sends, and the keys of RQ.

tests/acceptance/test_redis_user.py runs the whole service with these rights and no others, so nothing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from redis.exceptions import ResponseError

from app.ledger.keys import Keys
from app.ledger.redis import Redis, code

ALL, WORKERS, COMMANDS, API = "web and workers", "workers", "commands", "API"

_EXAMPLES: Final = {
    ALL: """
        multi | exec | evalsha none 0 | script load none | script exists none | time
        get k | set k 1 | mget k | unlink k | llen k | lrange k 0 0 | rpush k 1 | rpushx k 1
        copy k k | exists k | hget k f | hgetall k | hkeys k | hincrby k f 1 | hmget k f | hset k f 1 | hvals k
        sadd k 1 | srem k 1 | zadd k 1 m | zcard k | zrange k 0 0 | zrevrange k 0 0
        zcount k 0 0 | zscore k m | zrangebyscore k 0 0 | xadd k * f 1 | xrange k - + | xtrim k maxlen 0
    """,
    WORKERS: """
        watch k | del k | expire k 1 | pexpire k 1 | persist k | ttl k | pttl k | scan 0 | dbsize
        blmove k k left right 1 | lmove k k left right | blpop k 1 | lrem k 0 1 | ltrim k 0 0
        hdel k f | hincrbyfloat k f 1 | hsetnx k f 1
        smembers k | zrem k m | zremrangebyscore k 0 0
    """,
    COMMANDS: "rename k k | xdel k 0-1 | xread streams k 0 | xrevrange k + - | zscan k 0",
    API: "incrby k 1",
}
NEEDED: Final[Mapping[str, Sequence[Sequence[str]]]] = {
    who: [one.split() for line in text.strip().splitlines() for one in line.split("|")]
    for who, text in _EXAMPLES.items()
}
"""Who needs it -> commands with arguments of a valid form; `k` stands for a key of ours."""

OPTIONAL: Final = ("info", "config|get", "client|info", "client|setinfo", "client|setname")
"""Sent too, and done without: INFO and CONFIG tell how durable the data is, CLIENT names a connection."""

_OF_RQ: Final = """
    queues queue:* job:* workers* worker:* wip:* execution* ready:* finished:* failed:* results:* suspended
    groups clean_registries:* clean_groups rl-keys
"""
RQ_KEYS: Final = tuple(f"rq:{pattern}" for pattern in _OF_RQ.split())
"""Patterns of the keys of RQ; all others begin with KEY_PREFIX."""

_FIRST: Final = ("multi", "exec", "watch")


def acl_name(command: Sequence[str]) -> str:
    """Return the name of a command as the rules of an ACL write it, such as `script|load`."""
    return "|".join(command[: 2 if command[0] == "script" else 1])


def missing(redis: Redis, *needs: str) -> str:
    """Return what the user may not do that `needs` (keys of NEEDED) do, in one phrase, "" if nothing.

    The commands are queued in a transaction that never runs: the server checks the rights when it queues a command.
    Raises what redis-py raises.
    """
    who = {acl_name(command): need for need in needs for command in NEEDED[need]}
    commands = [command for need in needs for command in NEEDED[need]]
    of_rq = [[command, pattern.replace("*", "probe")] for pattern in RQ_KEYS for command in ("exists", "unlink")]
    connection: Any = redis.connection_pool.get_connection()
    try:
        refused = _refused(connection, redis.names, [command for command in commands if command[0] in _FIRST])
        if "multi" not in refused:
            rest = [command for command in commands if command[0] not in _FIRST]
            refused += _refused(connection, redis.names, [["multi"], *rest, *of_rq])
    finally:
        connection.disconnect()  # which ends the transaction
        redis.connection_pool.release(connection)
    if len({one for one in refused if one.startswith("keys rq:")}) == len(RQ_KEYS):
        refused = ["keys rq:*", *(one for one in refused if not one.startswith("keys rq:"))]
    found: dict[str, list[str]] = {}
    for one in dict.fromkeys(refused):
        found.setdefault(who.get(one, needs[0]), []).append(one)
    return "; ".join(f"{', '.join(ones)} ({need})" for need, ones in found.items())


def _refused(connection: Any, names: Keys, commands: Sequence[Sequence[str]]) -> list[str]:
    """Return the names of the commands that are refused, and the patterns of keys."""
    sent = [[f"{names.prefix}probe" if word == "k" else word for word in command] for command in commands]
    connection.send_packed_command(connection.pack_commands(sent))
    found = []
    for command in sent:
        try:
            connection.read_response()
        except ResponseError as error:
            denied, _, what = code(error).partition(" ")
            if what == "key":
                what = "keys " + next(word for word in command if ":" in word).replace("probe", "*")
            if denied == "NOPERM":
                found.append(what)
    return found
