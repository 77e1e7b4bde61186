"""One run over one company's order list: find discrepancies, request their fetches, move the checkpoint.

A run may die between any two steps and is then only repeated: a queued order is pending, and a pending order is not a
discrepancy. Each page needs a permit of the API key, like any other call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal

import msgspec

from app import log
from app.errors import Denied, Unavailable, UpstreamError
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.orders import Backlog
from app.ledger.rate_limit import Permit, RateLimiter
from app.reconcile.compare import Compared, Comparison, Discrepancy
from app.reconcile.state import Checkpoint
from app.upstream.client import ChannelManager
from app.upstream.models import Page

BUSY: Final = frozenset({"permits_full", "window_full", "throttled"})
"""Reasons for which no page was requested that soon pass."""

LONGEST: Final = 5 * policy.MINUTE
"""A run requests no further page after this; the next run reads the rest."""

LIVE_SHARE: Final = 0.2
IDLE_SHARE: Final = 0.8
"""Share of the API key's calls in a minute: while a live order is pending, and while none is."""

LOGGED: Final = 20
"""Discrepancies that a run logs one by one; after a flush of Redis there are 10,000."""

_TRIES: Final = 20
_PAUSE: Final = 0.25
"""Jobs of the backfill queue use the same one permit, so a page may wait about 5 s for it."""

_CHUNK: Final = 200
"""Orders per call of request_fetch.lua: Redis serves others in between."""

Outcome = Literal["complete", "paced", "failed"]
"""`complete`: the whole list was read. `paced`: the share of a minute was used up. `failed`: upstream, see `error`."""

_log = log.get()


class Share(msgspec.Struct, frozen=True):
    """The calls per minute of an API key, and the companies that share the key."""

    per_minute: float
    company_ids: frozenset[str]


class Report(msgspec.Struct):
    """What a run has done so far; `discrepancies` are those queued, by kind."""

    pages: int = 0
    rows: int = 0
    unreadable: int = 0
    discrepancies: Counter[str] = msgspec.field(default_factory=Counter)
    outcome: Outcome = "complete"
    error: UpstreamError | None = None

    @property
    def queued(self) -> int:
        return self.discrepancies.total()


class Listing:
    """Reads the order list of one company within the limits of the backfill queue; `pause` waits so many seconds."""

    def __init__(
        self,
        client: ChannelManager,
        limiter: RateLimiter,
        clock: Callable[[], int],
        pause: Callable[[float], None],
        page_size: int = 1000,
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._clock = clock
        self._pause = pause
        self._page_size = page_size

    def since(self, row_version: int) -> Iterator[tuple[int, Page]]:
        """Yield each page of the orders changed after `row_version`, with the ms at which it was requested.

        Raises UpstreamError; where the limits deny a permit, Unavailable with their reason.
        """
        pages = self._client.list_orders(row_version, self._page_size)
        while True:
            with self._permit() as permit:
                listed_at = self._clock()
                try:
                    page = next(pages)
                except UpstreamError as error:
                    permit.failed(error)
                    raise
            yield listed_at, page
            if page.next_key is None:
                return

    def _permit(self) -> Permit:
        for left in reversed(range(_TRIES)):
            try:
                return self._limiter.permit("backfill")
            except Denied as denied:
                if denied.reason != "permits_full" or not left:
                    raise Unavailable(denied.reason) from None
            self._pause(_PAUSE)
        raise AssertionError("the last try returns or raises")


class Reconcile:
    """The run; `clock` gives ms since 1970."""

    def __init__(
        self,
        *,
        slug: str,
        listing: Listing,
        comparison: Comparison,
        checkpoint: Checkpoint,
        backlog: Backlog,
        ledger: Ledger,
        share: Share,
        queue: Literal["live", "backfill"],
        clock: Callable[[], int],
    ) -> None:
        self._slug = slug
        self._listing = listing
        self._comparison = comparison
        self._checkpoint = checkpoint
        self._backlog = backlog
        self._ledger = ledger
        self._share = share
        self._queue: Literal["live", "backfill"] = queue
        self._clock = clock

    def run(self) -> Report:
        """Read the list from the checkpoint on and queue discrepancies; the report holds an error of upstream."""
        report = Report()
        budget = self._budget()
        deadline = self._clock() + LONGEST
        if budget < 1:  # the jobs in backfill come first
            report.outcome = "paced"
            return report
        watched = self._checkpoint.watched()
        unseen = dict(watched)
        try:
            for listed_at, page in self._listing.since(self._checkpoint.start(self._clock())):
                report.pages += 1
                report.rows += len(page.rows)
                report.unreadable += page.unreadable
                for row in page.rows:
                    unseen.pop(row.order_id, None)
                compared = self._comparison.of_page(page, watched, self._clock())
                if not self._handle(compared, watched, budget, report):
                    return report
                if page.row_version is not None:
                    self._checkpoint.save(page.row_version, listed_at, self._clock())
                used_up = report.pages + report.queued >= budget or self._clock() >= deadline
                if used_up and page.next_key is not None:
                    report.outcome = "paced"
                    return report
        except UpstreamError as error:
            report.outcome, report.error = "failed", error
            return report
        self._handle(self._comparison.of_watched(unseen, self._clock()), watched, budget, report)
        return report

    def _budget(self) -> int:
        """Return how many calls this run may cause; jobs that wait in backfill use the same share."""
        has_live = self._backlog.has_live_pending(self._share.company_ids)
        share = self._share.per_minute * (LIVE_SHARE if has_live else IDLE_SHARE) / len(self._share.company_ids)
        # At least one page and one order: with less, nothing would ever move.
        return max(2, int(share)) - self._backlog.backfill()

    def _handle(self, compared: Compared, watched: dict[str, int], budget: int, report: Report) -> bool:
        """Queue discrepancies while the budget lasts, and save what to watch; return whether all of it was done."""
        left = max(budget - report.pages - report.queued, 0)
        found = compared.discrepancies
        self._request_fetches(found[:left], report)
        if len(found) > left:
            report.outcome = "paced"
            return False
        self._checkpoint.watch(compared.unsettled, self._clock())
        self._checkpoint.unwatch(one for one in compared.settled if one in watched)
        return True

    def _request_fetches(self, found: Sequence[Discrepancy], report: Report) -> None:
        for one in found[: max(LOGGED - report.queued, 0)]:
            _log.warning(
                "reconcile.discrepancy_found",
                company=self._slug,
                order_id=one.order_id,
                kind=one.kind,
                status=one.status,
                stored_status=one.stored_status,
            )
        for at in range(0, len(found), _CHUNK):
            chunk = found[at : at + _CHUNK]
            self._ledger.request_fetch([one.key for one in chunk], queue=self._queue, reason="reconcile")
            report.discrepancies.update(one.kind for one in chunk)
