"""The RQ job. It never raises: retries are the ledger's work, and RQ sees success whatever happened."""

from __future__ import annotations

import os
from contextlib import redirect_stderr, redirect_stdout

from rq import get_current_job
from structlog.contextvars import bind_contextvars, clear_contextvars

from app import bootstrap, log, settings
from app.deployment import Deployment
from app.ids import OrderKey
from app.settings import Settings
from workers.processor import Connection, Processor
from workers.sinks.build import build
from workers.sinks.output import SinkOutput

_log = log.get()

_processor: Processor | None = None
"""The only process-wide state: what the jobs of this process run on."""


def fetch_order(company_id: str, order_id: str) -> None:
    """Fetch the order if it is pending and deliver it: the one function that workers run."""
    job = get_current_job()
    worker = (job.worker_name if job else None) or "no-worker"
    clear_contextvars()
    bind_contextvars(worker=worker, job_id=job.id if job else None)
    try:
        (_processor or _prepare_alone()).process(OrderKey(company_id, order_id), worker)
    except BaseException as error:
        # The order becomes due again: its lease ends, or the pool sees this worker end.
        _log.error("job.failed", order_id=order_id, error=type(error).__name__, trace=log.trace_of(error))
    finally:
        clear_contextvars()


def prepare(found: Settings) -> Processor:
    """Build the processor of this process and of its later children, without sinks; it connects with its first job."""
    global _processor
    redis, http = bootstrap.worker_redis(found), bootstrap.http(found)
    connections = {
        company.np_company_id: Connection(
            company.slug,
            bootstrap.channel_manager(found, company, http),
            bootstrap.rate_limiter(found, company, redis),
        )
        for company in found.companies
    }
    ledger, erasure = (
        bootstrap.ledger(found, redis, [one.name for one in found.declared_sinks]),
        bootstrap.erasure(found, redis),
    )
    _processor = Processor(ledger, Deployment(redis), connections, {}, erasure)
    return _processor


def _prepare_alone() -> Processor:
    """Build the processor of a plain `rq worker`, with its first job."""
    found = settings.load()
    # What a sink prints goes to the log, and by structlog's own format it would come back to the sink's stdout.
    bootstrap.configure_log(found)
    return import_sinks(found)


def import_sinks(found: Settings) -> Processor:
    """Complete the processor of this process; raises SettingsError for a sink that cannot be imported."""
    output = SinkOutput()
    with output.caught():
        sinks = build(found.declared_sinks)  # first, so that no job runs without them
    processor = _processor or prepare(found)
    processor.sinks, processor.output = sinks, output
    return processor


def try_sinks(found: Settings) -> None:
    """Import the sinks and end this process; raises SettingsError for one that cannot be used."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        build(found.declared_sinks)
    os._exit(0)  # a thread that a module has started would keep it
