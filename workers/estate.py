"""What ended workers and dead pools leave behind: what they held is due at once, not when its lease ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from redis import Redis
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE
from rq.utils import as_text

from app import bootstrap, log
from app.store import clockwork, keys
from app.store.budget import Budget
from app.store.jobs import queue
from app.store.keys import OrderKey
from app.store.ledger import Ledger
from app.store.pools import Heartbeat, read_heartbeat
from app.store.work import Ending
from workers import process

CENSUS_KEPT: Final = 24 * 60 * clockwork.MINUTE
"""How long the census of a silent pool is kept: where no one can tell that it is dead, its leases have long ended."""

_log = log.get()


class Estate:
    """The books of one pool about its workers; their names are `<pool>-<lane>-<number>`."""

    def __init__(self, redis: Redis, ledger: Ledger, budgets: Sequence[Budget]) -> None:
        self._redis = redis
        self._ledger = ledger
        self._budgets = budgets
        self._me = process.identity()
        self.pool = f"{self._me.machine[:8]}-{self._me.pid}-{self._me.started}"

    def let_go(self, worker: str, how: Ending) -> OrderKey | None:
        """Make due what an ended worker held, and what RQ had given it but it had not begun; return the former.

        The slots it held are free at once, or a killed pool would keep the next one waiting for its leases.
        """
        now = bootstrap.clock()
        for budget in self._budgets:
            budget.reclaim(worker, now)
        held = self._ledger.abandon(worker, now, how)
        in_between = queue(lane_of(worker), self._redis).intermediate_queue_key
        lost = [as_text(job_id) for job_id in self._redis.lrange(in_between, 0, -1)]
        lost += [as_text(one) for one in self._redis.smembers(WORKER_EXECUTIONS_KEY_TEMPLATE.format(worker))]
        self._ledger.nudge(_orders(lost), now)
        return held

    def beat(self, workers: Iterable[str]) -> None:
        """Say that this pool lives, and who works for it."""
        census = Heartbeat(self._me.machine, self._me.pid, self._me.started, list(workers), bootstrap.clock())
        self._redis.hset(keys.POOLS, self.pool, msgspec.json.encode(census))

    def leave(self) -> None:
        """Take this pool out of the list: its workers have ended and hold nothing."""
        self._redis.hdel(keys.POOLS, self.pool)

    def bury_dead_pools(self) -> None:
        """Let go of what the workers of a killed pool held, where this machine can tell that it is dead."""
        for name, text in self._redis.hgetall(keys.POOLS).items():
            census = read_heartbeat(text)
            if census is None:
                continue
            if bootstrap.clock() - census.beat > CENSUS_KEPT:
                self._redis.hdel(keys.POOLS, name)
            elif process.Identity(census.machine, census.pid, census.started).is_dead():
                for one in census.workers:
                    self.let_go(one, "killed")
                self._redis.hdel(keys.POOLS, name)
                _log.warning("pool.orphans", pool=as_text(name), workers=len(census.workers))


def lane_of(worker: str) -> str:
    """Return the queue in a worker's name."""
    return worker.rsplit("-", 2)[1]


def _orders(job_ids: Iterable[str]) -> list[OrderKey]:
    """Return the orders that job ids name: `f-<company>-<order>-<wanted>...`."""
    return [OrderKey(one[2:38], one[39:75]) for one in job_ids if one.startswith("f-") and len(one) > 76]
