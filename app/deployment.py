"""The deployment: the worker pools on one Redis, and the companies and sinks that they have declared there.

Every pool writes its configuration with each heartbeat, so that no process and no shell relies on its own settings for
what all must know. During a rolling change pools differ for a while. A sink or a company belongs to the deployment from
its first declaration until pools have run for RETIRED_AFTER without one that declares it. The companies also tell whose
Redis it is while no pool runs: a pool that has none of them is of another deployment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import msgspec

from app.errors import OtherDeployment
from app.heartbeat import HEARTBEAT_WITHIN, Configuration, DeclaredCompany, Heartbeat, decoded
from app.ledger import rq_jobs
from app.ledger.keys import Keys
from app.ledger.redis import Redis, server_time

RETIRED_AFTER: Final = 4320
"""Evaluations of the alerts (three a minute: a day) in which pools run and none declares it. A stopped deployment
forgets nothing, however long it is stopped."""

MOST_WOKEN: Final = 10_000
"""Orders that a starting pool looks at; what waits beyond is due at its time, within minutes."""

_JOBS_A_CALL: Final = 500


class Deployment:
    """What the pools have declared. Every method raises what redis-py raises."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis

    def running(self) -> dict[str, Heartbeat]:
        """Return the last heartbeat of each running pool, by the pool's name; one killed on this machine is none."""
        return self._running(self._redis.names, server_time(self._redis))

    def _running(self, names: Keys, now: int) -> dict[str, Heartbeat]:
        found = self._redis.hgetall(names.pools)
        beats = running({name.decode(errors="replace"): text for name, text in found.items()}, now)
        return {name: beat for name, beat in beats.items() if not beat.is_of_dead_process()}

    def other_prefixes(self) -> list[str]:
        """Return the other values of KEY_PREFIX under which pools run on this Redis."""
        now = server_time(self._redis)
        prefixes = rq_jobs.prefixes(self._redis) - {self._redis.names.prefix.removesuffix(":")}
        return sorted(one for one in prefixes if self._running(Keys(one), now))

    def sinks(self) -> tuple[str, ...]:
        """Return the sinks that orders are delivered to."""
        return tuple(name.decode() for name in self._redis.hkeys(self._redis.names.sinks))

    def companies(self) -> dict[str, DeclaredCompany]:
        """Return each company by its id."""
        return _companies(self._redis.hgetall(self._redis.names.companies))

    def declare(self, pool: str, beat: Heartbeat) -> None:
        """Write the heartbeat of a pool, and what it declares where that is not known yet.

        The first heartbeat also replaces slugs and API keys: the pool that started last is right. It raises
        OtherDeployment, and nothing is written, if the deployment is another one.
        """
        self._redis.transaction(partial(self._declare, pool, beat), self._redis.names.companies)

    def _declare(self, pool: str, beat: Heartbeat, pipe: Any) -> None:
        """Queue the writes of `declare` in a transaction that fails when the companies change meanwhile."""
        declared = _companies(pipe.hgetall(self._redis.names.companies))
        is_first = beat.at == beat.since
        if is_first:
            refuse_undeclared(beat.configuration, declared)
        pipe.multi()
        for sink in beat.configuration.sinks:
            pipe.hsetnx(self._redis.names.sinks, sink, beat.at)
        for company_id, one in beat.configuration.companies.items():
            since = min(declared[company_id].since, beat.since) if company_id in declared else beat.since
            # Redis may have been flushed, and another deployment have come first: who was here longer is right.
            if is_first or company_id not in declared or since < declared[company_id].since:
                text = f"{one.slug} {one.breaker} {since} {one.path} {one.key}"
                pipe.hset(self._redis.names.companies, company_id, text)
        pipe.hset(self._redis.names.pools, pool, msgspec.json.encode(beat))

    def wake(self, pool: str, mine: Configuration) -> int:
        """Make due at once what waits for a company that only `pool` has of all running pools.

        It looks at the MOST_WOKEN orders that are due next, and returns how many it made due. An order whose job waits
        in a queue stays as it is.
        """
        others = [beat.configuration for name, beat in self.running().items() if name != pool]
        companies = {one for one in mine.companies if not any(one in other.companies for other in others)}
        if not companies:
            return 0
        names, now = self._redis.names, server_time(self._redis)
        members = self._redis.zrangebyscore(names.due, f"({now}", "+inf", start=0, num=MOST_WOKEN)
        with self._redis.pipeline(transaction=False) as pipe:
            for member in members:
                pipe.hmget(f"{names.records}{member.decode()}", "job", "error")
            records = pipe.execute(raise_on_error=False)
            woken = 0
            for member, found in zip(members, records, strict=True):
                if isinstance(found, Exception):  # a broken record
                    continue
                job, error = found
                company_id, _, _ = member.decode().partition(":")
                if not job and error == b"unknown_company" and company_id in companies:
                    pipe.hdel(f"{names.records}{member.decode()}", "fetch_at")
                    pipe.zadd(names.due, {member: now}, xx=True, lt=True)
                    woken += 1
            pipe.execute()
        return woken

    def refuse_other(self, mine: Configuration, pool: str = "", since: int = 0) -> None:
        """Raise OtherDeployment if Redis is used by another deployment, or a running pool fetches from elsewhere.

        A `pool` that runs already, `since` then, is refused only for one that goes before it: whose companies were
        declared first, and of two with the same companies the one that began first.
        """
        declared = self.companies()
        if not since:
            refuse_undeclared(mine, declared)

        def rank(name: str, began: float, configuration: Configuration) -> tuple[float, float, str]:
            known = configuration.companies.keys() & declared.keys()
            return min((declared[one].since for one in known), default=began), began, name

        me = rank(pool, since or math.inf, mine)
        for name, beat in self.running().items():
            if rank(name, beat.since, beat.configuration) >= me:
                continue
            reason = _conflict(mine, beat.configuration.companies)
            theirs = beat.configuration.upstream.partition(" ")[0]
            if not reason and theirs not in {"", mine.upstream.partition(" ")[0]}:
                reason = f"its orders come from {theirs}"
            if reason:
                raise OtherDeployment(f"{reason} (pool {name})", "stop all its pools first")

    def retire(self, pools: Mapping[str, Heartbeat]) -> list[str]:
        """Remove what no pool has declared for RETIRED_AFTER, and return it; called with each evaluation."""
        retired = []
        for key, kind in ((self._redis.names.sinks, "sinks"), (self._redis.names.companies, "companies")):
            declared = {name for pool in pools.values() for name in getattr(pool.configuration, kind)}
            for name in (one.decode() for one in self._redis.hkeys(key)):
                if name in declared:
                    self._redis.hdel(self._redis.names.undeclared, name)
                elif self._redis.hincrby(self._redis.names.undeclared, name, 1) >= RETIRED_AFTER:
                    self._redis.hdel(key, name)
                    self._redis.hdel(self._redis.names.undeclared, name)
                    if kind == "sinks":
                        self._forget_deliveries(name)
                    retired.append(name)
        return retired

    def disable(self, sink: str, reason: str) -> bool:
        """Let nothing be delivered to a sink until it is enabled; return False if it was disabled already."""
        now = server_time(self._redis)
        return bool(self._redis.hsetnx(self._redis.names.sinks_disabled, sink, f"{now} {reason}"))

    def disabled(self) -> set[str]:
        """Return the sinks to which nothing is delivered until they are enabled."""
        return {name.decode() for name in self._redis.hkeys(self._redis.names.sinks_disabled)}

    def enable(self, sink: str) -> bool:
        """Deliver to a sink again: what waits is due at once, and its breaker is closed.

        Return False if it was not disabled.
        """
        names, now = self._redis.names, server_time(self._redis)
        if not self._redis.hdel(names.sinks_disabled, sink):
            return False
        self._redis.delete(names.sink_breaker(sink))
        waiting = self._redis.zrangebyscore(names.deliveries(sink), f"({now}", "+inf")
        for at in range(0, len(waiting), _JOBS_A_CALL):
            with self._redis.pipeline(transaction=False) as pipe:
                for member in waiting[at : at + _JOBS_A_CALL]:
                    pipe.hdel(f"{names.records}{member.decode()}", f"{sink}:next_at")
                    pipe.zadd(names.deliveries(sink), {member: now}, xx=True, lt=True)
                pipe.execute(raise_on_error=False)
        return True

    def _forget_deliveries(self, sink: str) -> None:
        """Delete what waits for a retired sink. An order that waits for nothing else gets its end by the due check."""
        names, queue = self._redis.names, rq_jobs.queue(rq_jobs.sink_queue(sink), self._redis)
        while ids := queue.get_job_ids(0, _JOBS_A_CALL):
            self._redis.unlink(*map(queue.job_class.key_for, ids))
            self._redis.ltrim(queue.key, len(ids), -1)
        self._redis.srem(rq_jobs.QUEUES_KEY, queue.key)
        self._redis.hdel(names.sinks_disabled, sink)
        self._redis.delete(names.deliveries(sink), names.sink_failing(sink), names.sink_breaker(sink))


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


def refuse_undeclared(mine: Configuration, declared: Mapping[str, DeclaredCompany]) -> None:
    """Raise OtherDeployment if none of our companies is declared, or one in another tenant or environment.

    It holds also while no pool runs. Nothing is refused before the first pool has declared its companies.
    """
    if reason := _conflict(mine, declared):
        raise OtherDeployment(reason, "see docs/operations.md#may-two-deployments-share-one-redis")


def _conflict(mine: Configuration, others: Mapping[str, DeclaredCompany]) -> str:
    """Return in words why these companies are of another deployment, "" if they may be of ours."""
    both = mine.companies.keys() & others.keys()
    for company_id in both:
        ours, theirs = mine.companies[company_id].place, others[company_id].place
        if theirs not in {"", ours}:
            return f"it has company {others[company_id].slug} in {theirs} and not in {ours}"
    if others and not both:
        return f"it has other companies ({', '.join(one.slug for one in others.values())})"
    return ""


def _companies(found: Mapping[bytes, bytes]) -> dict[str, DeclaredCompany]:
    companies = {}
    for company_id, text in found.items():
        slug, breaker, since, path, key = [*text.decode().split(" ", 4), "", "", "", ""][:5]
        companies[company_id.decode()] = DeclaredCompany(slug, path, breaker, int(since or 0), key)
    return companies
