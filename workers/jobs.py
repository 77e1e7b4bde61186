"""The RQ jobs. They never raise: retries are the ledger's work, and RQ sees success whatever happened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import TypeVar

from rq import get_current_job
from structlog.contextvars import bind_contextvars, clear_contextvars

from app import bootstrap, log, settings
from app.deployment import Deployment
from app.ids import OrderKey
from app.settings import Settings
from app.traces import OFF, Tracer
from workers.delivery import Deliverer
from workers.processor import Connection, Processor
from workers.sinks.build import build
from workers.sinks.output import SinkOutput

_log = log.get()
T = TypeVar("T")

_processor: Processor | None = None
_deliverer: Deliverer | None = None
"""The only process-wide state: what the jobs of this process run on."""


def fetch_order(company_id: str, order_id: str) -> None:
    """Fetch the order if it is pending: the one function that the workers of live and backfill run."""
    with _job(order_id) as worker:
        (_processor or _alone(prepare)).process(OrderKey(company_id, order_id), worker)


def deliver_order(company_id: str, order_id: str, sink: str) -> None:
    """Deliver the latest revision to the sink, if that is due: the one function that the workers of a sink run."""
    with _job(order_id) as worker:
        (_deliverer or _alone(import_sinks)).process(OrderKey(company_id, order_id), sink, worker)


@contextmanager
def _job(order_id: str) -> Iterator[str]:
    """Yield the name of the worker; log what the block raises, and name its job in every line of it."""
    job = get_current_job()
    worker = (job.worker_name if job else None) or "no-worker"
    clear_contextvars()
    bind_contextvars(worker=worker, job_id=job.id if job else None)
    try:
        yield worker
    except BaseException as error:
        # The order becomes due again: its lease ends, or the pool sees this worker end.
        _log.error("job.failed", order_id=order_id, error=type(error).__name__, trace=log.trace_of(error))
    finally:
        clear_contextvars()


def prepare(found: Settings, tracer: Tracer = OFF) -> Processor:
    """Build the processor of this process and of its later children; it connects with its first job."""
    global _processor
    redis, http = bootstrap.worker_redis(found), bootstrap.http(found)
    connections = {
        company.np_company_id: Connection(
            company.slug,
            bootstrap.channel_manager(found, company, http, tracer),
            bootstrap.rate_limiter(found, company, redis),
        )
        for company in found.companies
    }
    ledger = bootstrap.ledger(found, redis, bootstrap.sink_names(found))
    _processor = Processor(ledger, Deployment(redis), connections, bootstrap.erasure(found, redis), tracer)
    return _processor


def import_sinks(found: Settings, *names: str, tracer: Tracer = OFF) -> Deliverer:
    """Build the deliverer of this process for the sinks with these names, or for all.

    Raises SettingsError for one that cannot be used.
    """
    global _deliverer
    output = SinkOutput()
    with output.caught():
        sinks = build(one for one in found.declared_sinks if not names or one.name in names)
    redis = bootstrap.worker_redis(found)
    ledger, erasure = bootstrap.ledger(found, redis, bootstrap.sink_names(found)), bootstrap.erasure(found, redis)
    slugs = {company.np_company_id: company.slug for company in found.companies}
    slug_of = partial(_slug, slugs, Deployment(redis))
    filters = {one.name: one.unwanted for one in found.declared_sinks}
    _deliverer = Deliverer(ledger, sinks, filters, slug_of, erasure, output, tracer)
    return _deliverer


def _slug(own: Mapping[str, str], deployment: Deployment, company_id: str) -> str:
    """Return the name of a company of ours or of another pool; its id if no pool has declared it for a day."""
    if company_id in own:
        return own[company_id]
    declared = deployment.companies().get(company_id)
    return declared.slug if declared else company_id


def try_sinks(found: Settings) -> None:
    """Import the sinks and end this process; raises SettingsError for one that cannot be used."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        build(found.declared_sinks)
    os._exit(0)  # a thread that a module has started would keep it


def _alone(build_for: Callable[[Settings], T]) -> T:
    """Build what the jobs of a plain `rq worker` run on, with its first job."""
    found = settings.load()
    # What a sink prints goes to the log, and by structlog's own format it would come back to the sink's stdout.
    bootstrap.configure_log(found)
    return build_for(found)
