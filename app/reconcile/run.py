"""One run over one company's order list: find discrepancies, request their fetches, move the checkpoint.

A run may die between any two steps and is then only repeated: a queued order is pending, and a pending order is not a
discrepancy. Each page needs a permit of the API key, like any other call.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from operator import itemgetter
from typing import Final, Literal

import msgspec
from structlog.contextvars import bind_contextvars

from app import log
from app.erased_file import ErasedFile
from app.errors import Denied, Unavailable, UpstreamError
from app.ids import OrderKey, new_request_id
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.orders import Archive, LocalCopy
from app.ledger.rate_limit import Permit, RateLimiter
from app.ledger.redis import Redis, server_time
from app.reconcile.compare import STUCK_AFTER, Discrepancy, compare, compare_watched
from app.reconcile.state import ANCHORS_SEEN, OVERLAP, Checkpoint
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

Outcome = Literal["complete", "paced", "failed"]
"""`complete`: the whole list was read. `paced`: the share of a minute was used up. `failed`: upstream, see `error`."""

_log = log.get()


class Report(msgspec.Struct):
    """What a run has done so far; `discrepancies` are those queued, by kind.

    Not queued are `dead` letters that need a person or were fetched for this row already, and orders that differ
    `for_good`.
    """

    pages: int = 0
    rows: int = 0
    unreadable: int = 0
    discrepancies: Counter[str] = msgspec.field(default_factory=Counter)
    dead: int = 0
    for_good: int = 0
    started_over: bool = False
    outcome: Outcome = "paced"
    error: UpstreamError | None = None

    @property
    def queued(self) -> int:
        return self.discrepancies.total()


class Compared(msgspec.Struct, frozen=True):
    """What a page shows, which was requested at `listed_at` (ms); without a page: what the list does not show.

    The order ids in `unsettled` are to be watched, those in `settled` not any more. `highest` is what the checkpoint is
    to be made of, empty if it must stay. `starts_over`: row versions start lower again, and this is the first page of
    the whole list.
    """

    page: Page | None
    listed_at: int
    discrepancies: list[Discrepancy]
    unsettled: list[str]
    settled: list[str]
    highest: Mapping[str, int] = msgspec.field(default_factory=dict)
    starts_over: bool = False

    @property
    def fetchable(self) -> list[Discrepancy]:
        return [one for one in self.discrepancies if one.fetchable]


@dataclass(frozen=True)
class OrderList:
    """The order list of one company, compared page by page with the local copies; writes nothing.

    It is read within the limits of the backfill queue. `order_days`: ORDER_DAYS. Orders in `erased` differ in nothing.
    `clock` (ms since 1970) replaces the time of the Redis server in tests, `pause` waits so many seconds.
    """

    redis: Redis
    company_id: str
    client: ChannelManager
    limiter: RateLimiter
    order_days: int
    erased: ErasedFile
    clock: Callable[[], int] | None = None
    pause: Callable[[float], None] = time.sleep
    page_size: int = 1000

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.redis, self.company_id)

    def now(self) -> int:
        return self.clock() if self.clock is not None else server_time(self.redis)

    def compared(self, start: int) -> Iterator[Compared]:
        """Compare the orders changed after the row version `start`, a page at a time, then the others that are watched.

        Starts over, with the whole list, where the row versions do. Raises UpstreamError; where the limits deny a
        permit, Unavailable with their reason.
        """
        watched, anchors = self.checkpoint.watched(), self.checkpoint.anchors()
        listed: set[str] = set()
        for first in dict.fromkeys((start, 0)):
            highest: dict[str, int] = {}
            is_continued = first == 0
            for number, (page, listed_at) in enumerate(self._pages(first)):
                listed |= (watched.keys() | anchors).intersection(row.order_id for row in page.rows)
                is_continued = is_continued or len(listed & anchors) >= ANCHORS_SEEN
                highest = dict(nlargest(OVERLAP, (highest | page.row_versions).items(), key=itemgetter(1)))
                yield msgspec.structs.replace(
                    self._of_page(page, watched, listed_at),
                    highest=highest if is_continued and len(highest) == OVERLAP else {},
                    starts_over=first != start and number == 0,
                )
            if is_continued:
                break
        yield self._of_unseen({order_id: since for order_id, since in watched.items() if order_id not in listed})

    def _pages(self, start: int) -> Iterator[tuple[Page, int]]:
        """Yield each page and when it was requested (ms)."""
        pages = self.client.list_orders(start, self.page_size)
        page = None
        while page is None or page.next_key is not None:
            with self._permit():
                listed_at = self.now()
                page = next(pages)
            yield page, listed_at

    def _of_page(self, page: Page, watched: Mapping[str, int], listed_at: int) -> Compared:
        rows = {row.order_id: row for row in page.rows}
        compared = Compared(page, listed_at, [], [], [])
        now = self.now()
        oldest = now - self.order_days * policy.DAY
        for (order_id, row), copy in zip(rows.items(), self._read(rows), strict=True):
            since = watched.get(order_id)
            found = compare(self.company_id, row, copy, unsettled_since=since, now=now, oldest=oldest)
            if OrderKey(self.company_id, order_id) in self.erased:
                found = None
            if found == "watch":
                compared.unsettled.append(order_id)
                continue
            if since is not None:
                compared.settled.append(order_id)
            if found is not None:
                compared.discrepancies.append(found)
        return compared

    def _of_unseen(self, watched: Mapping[str, int]) -> Compared:
        """Compare watched orders that are not on any page; those seen only recently stay watched."""
        now = self.now()
        old = {order_id: since for order_id, since in watched.items() if now - since >= STUCK_AFTER}
        found = (
            compare_watched(self.company_id, order_id, copy, since)
            for (order_id, since), copy in zip(old.items(), self._read(old), strict=True)
        )
        kept = [one for one in found if one is not None and one.key not in self.erased]
        return Compared(None, now, kept, [], list(old))

    def _read(self, order_ids: Iterable[str]) -> list[LocalCopy | None]:
        return Archive(self.redis).copies([OrderKey(self.company_id, order_id) for order_id in order_ids])

    def _permit(self) -> Permit:
        reason = ""
        for _ in range(_TRIES):
            try:
                return self.limiter.permit("backfill")
            except Denied as denied:
                reason = denied.reason
            if reason != "permits_full":
                break
            self.pause(_PAUSE)
        raise Unavailable(reason)


@dataclass(frozen=True)
class Reconcile:
    """The run. The API key allows `per_minute` calls, which the companies `company_ids` share.

    `request_id` is in its log lines, and in those of orders that it finds and no event announced.
    """

    slug: str
    order_list: OrderList
    ledger: Ledger
    archive: Archive
    per_minute: float
    company_ids: frozenset[str]
    queue: Literal["live", "backfill"]
    request_id: str = field(default_factory=new_request_id)

    def run(self) -> Report:
        """Read the list from the checkpoint on and queue discrepancies; the report holds an error of upstream."""
        bind_contextvars(request_id=self.request_id)
        report = Report()
        checkpoint, now = self.order_list.checkpoint, self.order_list.now
        deadline = now() + LONGEST
        budget = self._budget()
        if budget < 1:  # the jobs in backfill come first
            return report
        try:
            for found in self.order_list.compared(checkpoint.start(now())):
                if found.page is not None:
                    report.pages += 1
                    report.rows += len(found.page.rows)
                    report.unreadable += found.page.unreadable
                if found.starts_over:
                    checkpoint.forget()
                    report.started_over = True
                    _log.warning("reconcile.started_over", company=self.slug)
                left = max(budget - report.pages - report.queued, 0)
                self._request_fetches(found.fetchable[:left], report)
                if len(found.fetchable) > left:
                    return report
                self._report_others([one for one in found.discrepancies if not one.fetchable], report)
                checkpoint.watch(found.unsettled, now())
                checkpoint.unwatch(found.settled)
                if found.page is None:
                    report.outcome = "complete"
                    return report
                if found.highest:
                    checkpoint.save(found.highest, found.listed_at, now())
                used_up = report.pages + report.queued >= budget or now() >= deadline
                if used_up and found.page.next_key is not None:
                    return report
        except UpstreamError as error:
            report.outcome, report.error = "failed", error
        return report

    def _budget(self) -> int:
        """Return how many calls this run may cause; jobs that wait in backfill use the same share."""
        has_live = self.archive.has_live_pending(self.company_ids)
        share = self.per_minute * (LIVE_SHARE if has_live else IDLE_SHARE) / len(self.company_ids)
        # At least one page and one order: with less, nothing would ever move.
        return max(2, int(share)) - self.archive.backfill()

    def _request_fetches(self, found: Sequence[Discrepancy], report: Report) -> None:
        for one in found[: max(LOGGED - report.queued, 0)]:
            _log.warning("reconcile.discrepancy_found", company=self.slug, **_logged(one))
        rows = {one.key: one.row for one in found}
        self.ledger.request_fetch(
            rows, queue=self.queue, reason="reconcile", listed_rows=rows, request_id=self.request_id
        )
        report.discrepancies.update(one.kind for one in found)

    def _report_others(self, found: Sequence[Discrepancy], report: Report) -> None:
        """Log what is not fetched: dead letters in each run, orders that differ for good once for each row."""
        for_good = [one for one in found if one.for_good]
        dead = [one for one in found if not one.for_good]
        rows = {one.order_id: one.row for one in for_good}
        new = self.order_list.checkpoint.report_for_good(rows, self.order_list.order_days * policy.DAY)
        for one in [one for one in for_good if one.order_id in new][: max(LOGGED - report.for_good, 0)]:
            _log.warning("reconcile.differs_for_good", company=self.slug, **_logged(one))
        for one in dead[: max(LOGGED - report.dead, 0)]:
            _log.warning("reconcile.discrepancy_found", company=self.slug, **_logged(one))
        report.for_good += len(for_good)
        report.dead += len(dead)


def _logged(one: Discrepancy) -> dict[str, str]:
    fields = {"order_id": one.order_id, "kind": one.kind, "status": one.status, "stored_status": one.stored_status}
    return fields | ({"request_id": one.request_id} if one.request_id else {})
