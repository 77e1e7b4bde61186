"""What ended workers and dead pools leave behind is due at once, not when its lease ends.

A pool writes a heartbeat with its identity and the names of its workers. The next pool on the same machine finds the
heartbeat of a killed one, and releases what its workers held.
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
from app.heartbeat import Heartbeat, decoded
from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.ledger import Ledger
from app.ledger.rate_limit import RateLimiter
from app.ledger.redis import server_time
from app.ledger.rq_jobs import queue
from app.ledger.work import WorkerEnd

HEARTBEAT_KEPT: Final = policy.DAY
"""How long (ms) the heartbeat of a silent pool is kept where this machine cannot tell that the pool is dead."""

_PR_SET_PDEATHSIG: Final = 1

_log = log.get()


class WorkerRecovery:
    """The heartbeat of one pool, and the release of what ended workers held; its methods raise what Redis raises."""

    def __init__(self, redis: Redis, ledger: Ledger, limiters: Sequence[RateLimiter]) -> None:
        self._redis = redis
        self._ledger = ledger
        self._limiters = limiters
        me = Heartbeat.of_this_process((), 0)
        self._pool = f"{me.machine[:8]}-{me.pid}-{me.started}"

    def worker_name(self, queue_name: str, number: int) -> str:
        """Return the name of this pool's worker `number`."""
        return f"{self._pool}-{queue_name}-{number}"

    def release(self, worker: str, how: WorkerEnd) -> OrderKey | None:
        """Make due what an ended worker held and the jobs it had been given but not started.

        Return the order it held, if any. Its permits are free at once: the next pool does not wait for their leases.
        """
        for limiter in self._limiters:
            limiter.release_worker(worker)
        intermediate = queue(queue_of(worker), self._redis).intermediate_queue_key
        lost = [as_text(job_id) for job_id in self._redis.lrange(intermediate, 0, -1)]
        lost += [as_text(job_id) for job_id in self._redis.smembers(WORKER_EXECUTIONS_KEY_TEMPLATE.format(worker))]
        return self._ledger.release_worker(worker, how, _orders(lost))

    def heartbeat(self, workers: Iterable[str]) -> None:
        """Write that this pool is alive and which workers it has."""
        beat = Heartbeat.of_this_process(workers, server_time(self._redis))
        self._redis.hset(keys.POOLS, self._pool, msgspec.json.encode(beat))

    def remove_heartbeat(self) -> None:
        """Remove this pool from the list: its workers have ended and hold nothing."""
        self._redis.hdel(keys.POOLS, self._pool)

    def recover_dead_pools(self) -> None:
        """Release what the workers of killed pools held, where this machine can tell that the pool is dead."""
        for name, text in self._redis.hgetall(keys.POOLS).items():
            beat = decoded(text, Heartbeat)
            if beat is None:
                continue
            if server_time(self._redis) - beat.at > HEARTBEAT_KEPT:
                self._redis.hdel(keys.POOLS, name)
            elif beat.is_of_dead_process():
                for worker in beat.workers:
                    self.release(worker, "killed")
                self._redis.hdel(keys.POOLS, name)
                _log.warning("pool.recovered", pool=as_text(name), workers=len(beat.workers))


def queue_of(worker: str) -> str:
    """Return the queue in a worker's name: `<pool>-<queue>-<number>`."""
    return worker.rsplit("-", 2)[1]


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends, also by SIGKILL (Linux). Call it first in a child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before prctl.
    if os.getppid() != parent:
        os._exit(1)


def _orders(job_ids: Iterable[str]) -> list[OrderKey]:
    """Return the orders that job ids name: `f-<company>-<order>-<generation>...`."""
    return [OrderKey(one[2:38], one[39:75]) for one in job_ids if one.startswith("f-") and len(one) > 76]
