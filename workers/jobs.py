"""The RQ job. It never raises: retries are the ledger's work, and RQ sees success whatever happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rq import get_current_job
from structlog.contextvars import bind_contextvars, clear_contextvars

from app import bootstrap, log, settings
from app.ids import OrderKey
from app.ledger.ledger import Ledger
from app.settings import Settings
from workers.delivery import Deliverer
from workers.processor import Connection, Processor
from workers.sinks import build

_log = log.get()


class Clients(NamedTuple):
    """The ledger, and by company id how its orders are fetched; nothing of it is connected before the first job."""

    ledger: Ledger
    connections: Mapping[str, Connection]


_clients: Clients | None = None
_processor: Processor | None = None
"""The only process-wide state: the clients, perhaps built by the pool before its fork, and what jobs run on."""


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


def prepare_clients(found: Settings) -> None:
    """Build the clients, unless they are there. The pool calls it before it forks: its workers share the memory."""
    global _clients
    if _clients is not None:
        return
    redis, http = bootstrap.worker_redis(found), bootstrap.http(found)
    connections = {
        company.np_company_id: Connection(
            company.slug,
            bootstrap.channel_manager(found, company, http),
            bootstrap.rate_limiter(found, company, redis),
        )
        for company in found.companies
    }
    _clients = Clients(bootstrap.ledger(found, redis), connections)


def prepare(found: Settings) -> None:
    """Build this process's processor before its first job; raises SettingsError for a sink that cannot be imported."""
    prepare_clients(found)
    assert _clients is not None
    deliverer = Deliverer(ledger=_clients.ledger, sinks=build(found.sinks))
    use(Processor(ledger=_clients.ledger, connections=_clients.connections, deliverer=deliverer))


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
