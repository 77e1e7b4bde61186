"""The RQ job. It never raises: the ledger is the truth, and RQ sees success whatever happened."""

from __future__ import annotations

from functools import cache

from rq import get_current_job
from structlog.contextvars import bind_contextvars, clear_contextvars

from app import bootstrap, log, settings
from app.store.keys import OrderKey
from workers.processor import Connection, Processor
from workers.sinks import build

_log = log.get()


def fetch_order(company_id: str, order_id: str) -> None:
    """Do what the order is owed: the one function that workers run."""
    job = get_current_job()
    worker = (job.worker_name if job else None) or "no-worker"
    clear_contextvars()
    bind_contextvars(worker=worker, job_id=job.id if job else None)
    try:
        processor().process(OrderKey(company_id, order_id), worker)
    except Exception as error:
        # What was begun comes back by itself: its lease ends, or the pool sees this worker end.
        _log.error("job.failed", order_id=order_id, error=type(error).__name__, trace=log.trace_of(error))
    finally:
        clear_contextvars()


@cache
def processor() -> Processor:
    """Return this process's processor, with warm connections: the only process-wide state there is.

    Raises SettingsError.
    """
    found = settings.load()
    redis = bootstrap.worker_redis(found)
    http = bootstrap.http(found)
    sinks = build(found.sinks)
    connections = {
        company.np_company_id: Connection(
            company.slug,
            bootstrap.channel_manager(found, company, http),
            bootstrap.budget(found, company, redis),
        )
        for company in found.companies
    }
    return Processor(
        ledger=bootstrap.ledger(found, redis),
        connections=connections,
        sinks=sinks,
        clock=bootstrap.clock,
    )
