"""The RQ job. It never raises: the ledger is the truth, and RQ sees success whatever happened."""

from __future__ import annotations

from rq import get_current_job
from structlog.contextvars import bind_contextvars, clear_contextvars

from app import bootstrap, log, settings
from app.ids import OrderKey
from app.settings import Settings
from workers.delivery import Deliverer
from workers.processor import Connection, Processor
from workers.sinks import build

_log = log.get()
_runtime: dict[str, Processor] = {}
"""The only process-wide state there is."""


def fetch_order(company_id: str, order_id: str) -> None:
    """Do what the order is owed: the one function that workers run."""
    job = get_current_job()
    worker = (job.worker_name if job else None) or "no-worker"
    clear_contextvars()
    bind_contextvars(worker=worker, job_id=job.id if job else None)
    try:
        processor().process(OrderKey(company_id, order_id), worker)
    except BaseException as error:
        # What was begun comes back by itself: its lease ends, or the pool sees this worker end.
        _log.error("job.failed", order_id=order_id, error=type(error).__name__, trace=log.trace_of(error))
    finally:
        clear_contextvars()


def prepare(found: Settings) -> None:
    """Build this process's processor before its first job, from settings that are known to be good.

    Raises SettingsError for a sink that cannot be imported.
    """
    use(_build(found))


def use(one: Processor) -> None:
    """Do this process's jobs with this processor from now on."""
    _runtime["processor"] = one


def processor() -> Processor:
    """Return this process's processor, with warm connections; a plain `rq worker` builds it at its first job.

    Raises SettingsError.
    """
    if "processor" not in _runtime:
        prepare(settings.load())
    return _runtime["processor"]


def _build(found: Settings) -> Processor:
    redis = bootstrap.worker_redis(found)
    http = bootstrap.http(found)
    sinks = build(found.sinks)
    connections = {
        company.np_company_id: Connection(
            company.slug,
            bootstrap.channel_manager(found, company, http),
            bootstrap.rate_limiter(found, company, redis),
        )
        for company in found.companies
    }
    ledger = bootstrap.ledger(found, redis)
    return Processor(ledger=ledger, connections=connections, deliverer=Deliverer(ledger=ledger, sinks=sinks))
