"""The deployment: the worker pools on one Redis, and the companies and sinks that they have declared there.

Every pool writes its configuration with each heartbeat, so that no process and no shell relies on its own settings for
what all must know. During a rolling change pools differ for a while. A sink or a company belongs to the deployment from
its first declaration until pools have run for RETIRED_AFTER without one that declares it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from app.errors import OtherDeployment
from app.heartbeat import HEARTBEAT_WITHIN, Configuration, Heartbeat, decoded
from app.ledger.redis import Redis, server_time

RETIRED_AFTER: Final = 1440
"""Minutes in which pools run and none declares it. A stopped deployment forgets nothing, however long it is stopped."""


class Deployment:
    """What the pools have declared. Every method raises what redis-py raises."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis

    def running(self) -> dict[str, Heartbeat]:
        """Return the last heartbeat of each running pool, by the pool's name; one killed on this machine is none."""
        texts = {
            name.decode(errors="replace"): text for name, text in self._redis.hgetall(self._redis.names.pools).items()
        }
        beats = running(texts, server_time(self._redis))
        return {name: beat for name, beat in beats.items() if not beat.is_of_dead_process()}

    def sinks(self) -> tuple[str, ...]:
        """Return the sinks that orders are delivered to."""
        return tuple(name.decode() for name in self._redis.hkeys(self._redis.names.sinks))

    def slugs(self) -> dict[str, str]:
        """Return the slug of each company by its id."""
        found = self._redis.hgetall(self._redis.names.companies)
        return {company_id.decode(): text.decode().partition(" ")[0] for company_id, text in found.items()}

    def declare(self, pool: str, beat: Heartbeat) -> None:
        """Write the heartbeat of a pool, and what it declares where that is not known yet.

        The first heartbeat also replaces slugs and API keys: the pool that started last is right.
        """
        with self._redis.pipeline(transaction=True) as pipe:
            for sink in beat.configuration.sinks:
                pipe.hsetnx(self._redis.names.sinks, sink, beat.at)
            write = pipe.hset if beat.at == beat.since else pipe.hsetnx
            for company_id, company in beat.configuration.companies.items():
                write(self._redis.names.companies, company_id, f"{company.slug} {company.breaker}")
            pipe.hset(self._redis.names.pools, pool, msgspec.json.encode(beat))
            pipe.execute()

    def retire(self, pools: Mapping[str, Heartbeat]) -> list[str]:
        """Remove what no pool has declared for RETIRED_AFTER, and return it; one pool calls this, each minute."""
        retired = []
        for key, kind in ((self._redis.names.sinks, "sinks"), (self._redis.names.companies, "companies")):
            declared = {name for pool in pools.values() for name in getattr(pool.configuration, kind)}
            for name in (one.decode() for one in self._redis.hkeys(key)):
                if name in declared:
                    self._redis.hdel(self._redis.names.undeclared, name)
                elif self._redis.hincrby(self._redis.names.undeclared, name, 1) >= RETIRED_AFTER:
                    self._redis.hdel(key, name)
                    self._redis.hdel(self._redis.names.undeclared, name)
                    retired.append(name)
        return retired


def running(pools: Mapping[str, bytes | str], now: int) -> dict[str, Heartbeat]:
    """Return the heartbeats among the fields of `ota:pools` that are younger than HEARTBEAT_WITHIN; `now` in ms."""
    beats = ((name, decoded(text, Heartbeat)) for name, text in pools.items())
    return {name: beat for name, beat in beats if beat is not None and now - beat.at < HEARTBEAT_WITHIN}


def differences(pools: Mapping[str, Heartbeat]) -> dict[str, list[str]]:
    """Return in words what each pool lacks, or has otherwise than the pool that started last; {} if all agree."""
    oldest_first = [name for name, _ in sorted(pools.items(), key=lambda one: one[1].since)]
    companies = {key: one for name in oldest_first for key, one in pools[name].configuration.companies.items()}
    sinks = dict.fromkeys(sink for pool in pools.values() for sink in pool.configuration.sinks)
    found = {}
    for name in oldest_first:
        mine, newest = pools[name].configuration, pools[oldest_first[-1]].configuration
        words = [f"no company {one.slug}" for key, one in companies.items() if key not in mine.companies]
        words += [f"no sink {sink}" for sink in sinks if sink not in mine.sinks]
        for key, one in mine.companies.items():
            if one.path != companies[key].path:
                words.append(f"company {one.slug} at {one.path}")
            elif one.breaker != companies[key].breaker:
                words.append(f"another API key of company {one.slug}")
        if mine.upstream != newest.upstream:
            words.append(f"upstream {mine.upstream}")
        if words:
            found[name] = words
    return found


def refuse_other(mine: Configuration, pools: Mapping[str, Heartbeat]) -> None:
    """Raise OtherDeployment if a pool serves other companies, or one of ours with another tenant or environment.

    A change of anything else may be a rolling one.
    """
    for name, pool in pools.items():
        if reason := next(_conflicts(mine, pool.configuration), ""):
            raise OtherDeployment(name, reason)


def _conflicts(mine: Configuration, other: Configuration) -> Iterator[str]:
    for company_id in mine.companies.keys() & other.companies.keys():
        ours, theirs = (one.companies[company_id].path.rpartition("/")[0] for one in (mine, other))
        if ours != theirs:
            yield f"has company {other.companies[company_id].slug} in {theirs} and not in {ours}"
    if other.companies and not mine.companies.keys() & other.companies.keys():
        yield f"serves other companies ({', '.join(one.slug for one in other.companies.values())})"
