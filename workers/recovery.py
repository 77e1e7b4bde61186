"""What ended workers and dead pools leave behind is due at once, not when its lease ends.

A pool writes a heartbeat with its identity and the names of its workers. The next pool on the same machine finds the
heartbeat of a killed one, and releases what its workers held.
"""

from __future__ import annotations

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
        queue_name = worker.rsplit("-", 2)[1]
        given = self._redis.lrange(queue(queue_name, self._redis).intermediate_queue_key, 0, -1)
        given += self._redis.smembers(WORKER_EXECUTIONS_KEY_TEMPLATE.format(worker))
        return self._ledger.release_worker(worker, how, [order for one in given if (order := _order(as_text(one)))])

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


def _order(job_id: str) -> OrderKey | None:
    """Return the order that a job id of ours names: `f-<company>-<order>-<generation>...`."""
    return OrderKey(job_id[2:38], job_id[39:75]) if job_id.startswith("f-") and len(job_id) > 76 else None
