"""The RQ jobs of an order, as templates that the scripts fill in: RQ makes every value, we only write them.

RQ's public `create_job` and `to_dict` give the fields; a contract test holds the result against a job that RQ's own
`enqueue` wrote, so that `rq info`, `rq worker` and rq-dashboard see an ordinary job.
"""

from __future__ import annotations

import re
from hashlib import sha1
from typing import Any, Final

from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from app.ids import OrderKey
from app.ledger import policy
from app.ledger.keys import Keys
from app.ledger.redis import Redis

FETCH_ORDER: Final = "workers.jobs.fetch_order"
DELIVER_ORDER: Final = "workers.jobs.deliver_order"
LIVE: Final = "live"
BACKFILL: Final = "backfill"
FAILURE_TTL: Final = 86400
"""Seconds that RQ keeps the hash of a job whose worker was killed; the ledger has the order back long before."""

_COMPANY, _ORDER, _SINK = _ARGUMENTS = ("%company%", "%order%", "%sink%")
_PER_JOB = frozenset({"data", "origin", "created_at", "description", "enqueued_at", "status"})


def queue(name: str, connection: Redis) -> Queue:
    """Return the RQ queue for LIVE, BACKFILL or that of a sink; jobs are readable JSON on both sides."""
    return Queue(connection.names.rq_prefix + name, connection=connection, serializer=JSONSerializer)


def queue_key(name: str, names: Keys) -> str:
    return f"{Queue.redis_queue_namespace_prefix}{names.rq_prefix}{name}"


def sink_queue(sink: str) -> str:
    """Return the queue of the deliveries to a sink."""
    return f"sink-{sink}"


def order_of(job_id: str) -> OrderKey | None:
    """Return the order that the id of a fetch names: `<prefix>-f-<company>-<order>-<generation>...`."""
    found = _FETCH_ID.search(job_id)
    return OrderKey(found[1], found[2]) if found else None


def sink_id(sink: str) -> str:
    """Return what stands for a sink in the id of a job, where RQ takes only letters, numbers, `_` and `-`."""
    return sha1(sink.encode(), usedforsecurity=False).hexdigest()[:8]


def delivery_of(job_id: str) -> tuple[OrderKey, str] | None:
    """Return what the id of a delivery names: `<prefix>-d-<company>-<order>-<sink_id>-<revision>...`."""
    found = _DELIVERY_ID.search(job_id)
    return (OrderKey(found[1], found[2]), found[3]) if found else None


_FETCH_ID: Final = re.compile("-f-([0-9a-f-]{36})-([0-9a-f-]{36})-")
_DELIVERY_ID: Final = re.compile("-d-([0-9a-f-]{36})-([0-9a-f-]{36})-([0-9a-f]{8})-")
QUEUES_KEY: Final = Queue.redis_queues_keys
RESUME: Final = 'rq resume --url "$REDIS_URL"'
"""Ends `rq suspend`. Without an address RQ's command line asks localhost."""


def prefixes(redis: Redis) -> set[str]:
    """Return each KEY_PREFIX whose live queue has held a job on this Redis."""
    queues: Any = redis.smembers(QUEUES_KEY)
    start, end = Queue.redis_queue_namespace_prefix, f"-{LIVE}"
    names = (one.decode(errors="replace") for one in queues)
    return {one.removeprefix(start).removesuffix(end) for one in names if one.endswith(end)}


class JobTemplate:
    """What is the same in every job, made once; the time is put in per call."""

    def __init__(self, names: Keys) -> None:
        job = _job(FETCH_ORDER, _COMPANY, _ORDER)
        self._job: dict[str, Any] = {
            "names": names.rq_prefix,
            "prefix": Job.redis_job_namespace_prefix,
            "queue_prefix": Queue.redis_queue_namespace_prefix,
            "queues": QUEUES_KEY,
            "fetch": _pieces(job),
            "deliver": _pieces(_job(DELIVER_ORDER, _COMPANY, _ORDER, _SINK)),
        }
        fields: list[Any] = ["status", "queued"]
        for field, value in job.to_dict().items():
            if field not in _PER_JOB and value is not None:
                fields += [field, value]
        # Another version of RQ may write other fields, while both are running.
        layout = sha1(repr(fields).encode(), usedforsecurity=False).hexdigest()[:4]
        self._job |= {"fields": fields, "layout": layout}

    def fields(self) -> dict[str, Any]:
        """Return the argument `job` of the scripts that enqueue (prelude.lua, push_job)."""
        return self._job | {"at": utcformat(now())}


def _job(function: str, *arguments: str) -> Job:
    # RQ's constructors ask for a client and never use it: nothing is sent.
    return queue(LIVE, Redis()).create_job(
        function, args=arguments, timeout=policy.JOB_TIMEOUT, result_ttl=0, failure_ttl=FAILURE_TTL
    )


def _pieces(job: Job) -> list[str]:
    """Return the data of a job, split where the arguments stand."""
    return re.split("|".join(_ARGUMENTS), job.data.decode())
