"""What ended workers and dead pools leave behind: what they held is due at once, not when its lease ends.

Also how a child dies with its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from redis import Redis
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE
from rq.utils import as_text

from app import log
from app.identity import Identity, identity
from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.ledger import Ledger
from app.ledger.rate_limit import RateLimiter
from app.ledger.redis import server_time
from app.ledger.rq_jobs import queue
from app.ledger.work import WorkerEnd
from app.snapshot import Heartbeat, read_heartbeat

_PR_SET_PDEATHSIG: Final = 1


def die_with(parent: int) -> None:
    """End this process when its parent ends, also by SIGKILL; call first thing in a child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


CENSUS_KEPT: Final = 24 * 60 * policy.MINUTE
"""How long the census of a silent pool is kept: where no one can tell that it is dead, its leases have long ended."""

_log = log.get()


class Estate:
    """The books of one pool about its workers; their names are `<pool>-<lane>-<number>`."""

    def __init__(self, redis: Redis, ledger: Ledger, limiters: Sequence[RateLimiter]) -> None:
        self._redis = redis
        self._ledger = ledger
        self._limiters = limiters
        self._me = identity()
        self.pool = f"{self._me.machine[:8]}-{self._me.pid}-{self._me.started}"

    def let_go(self, worker: str, how: WorkerEnd) -> OrderKey | None:
        """Make due what an ended worker held, and what RQ had given it but it had not begun; return the former.

        The slots it held are free at once, or a killed pool would keep the next one waiting for its leases.
        """
        for limiter in self._limiters:
            limiter.release_worker(worker)
        in_between = queue(lane_of(worker), self._redis).intermediate_queue_key
        lost = [as_text(job_id) for job_id in self._redis.lrange(in_between, 0, -1)]
        lost += [as_text(one) for one in self._redis.smembers(WORKER_EXECUTIONS_KEY_TEMPLATE.format(worker))]
        return self._ledger.release_worker(worker, how, _orders(lost))

    def beat(self, workers: Iterable[str]) -> None:
        """Say that this pool lives, and who works for it."""
        census = Heartbeat(self._me.machine, self._me.pid, self._me.started, list(workers), server_time(self._redis))
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
            if server_time(self._redis) - census.beat > CENSUS_KEPT:
                self._redis.hdel(keys.POOLS, name)
            elif Identity(census.machine, census.pid, census.started).is_dead():
                for one in census.workers:
                    self.let_go(one, "killed")
                self._redis.hdel(keys.POOLS, name)
                _log.warning("pool.recovered", pool=as_text(name), workers=len(census.workers))


def lane_of(worker: str) -> str:
    """Return the queue in a worker's name."""
    return worker.rsplit("-", 2)[1]


def _orders(job_ids: Iterable[str]) -> list[OrderKey]:
    """Return the orders that job ids name: `f-<company>-<order>-<wanted>...`."""
    return [OrderKey(one[2:38], one[39:75]) for one in job_ids if one.startswith("f-") and len(one) > 76]
