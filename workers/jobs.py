"""The RQ job. It never raises: retries are the ledger's work, and RQ sees success whatever happened."""

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
_processor: Processor | None = None
"""This process's processor, with its connections: the only process-wide state."""


def fetch_order(company_id: str, order_id: str) -> None:
    """Fetch the order if it is pending and deliver it: the one function that workers run."""
    job = get_current_job()
    worker = (job.worker_name if job else None) or "no-worker"
    clear_contextvars()
    bind_contextvars(worker=worker, job_id=job.id if job else None)
    try:
        _current_processor().process(OrderKey(company_id, order_id), worker)
    except BaseException as error:
        # The order becomes due again: its lease ends, or the pool sees this worker end.
        _log.error("job.failed", order_id=order_id, error=type(error).__name__, trace=log.trace_of(error))
    finally:
        clear_contextvars()


def prepare(found: Settings) -> None:
    """Build this process's processor before its first job; raises SettingsError for a sink that cannot be imported."""
    use(_build(found))


def use(processor: Processor) -> None:
    """Make `processor` the one that this process's jobs use."""
    global _processor
    _processor = processor


def _current_processor() -> Processor:
    """Return this process's processor; a plain `rq worker` builds it at its first job. Raises SettingsError."""
    if _processor is None:
        prepare(settings.load())
    assert _processor is not None
    return _processor


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
