"""The page of one order, the same view as `orders explain`, and what one may do to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import msgspec
from starlette.responses import Response

from app import audit, times
from app.errors import BrokenRecord, NotKnown, UnreadableAnswer
from app.explain.order_diff import Difference, difference
from app.explain.order_history import Step, took
from app.explain.order_view import OrderView, Outstanding, asset_rows, error_words, sink_state, view_of
from app.explain.stores import Stores
from app.ids import OrderKey, guid
from app.ledger.dead_letters import DeadLetter
from app.ledger.history import LONGEST
from app.ledger.record import OrderRecord, SinkRecord
from app.operations import Operations
from app.ops.access import Refused
from app.ops.app import Screen, Visit, see_other
from app.ops.pages import Pages
from app.ops.search import LONGEST_SOUGHT, address, results
from app.texts import commands_apart

ADDRESS: Final = "/orders/{order_id}"

MOST_ROWS: Final = 100
"""Wallets, tickets and coupons on a page, and changes of a revision; a page stays below 60 KB."""

STEPS_SHOWN: Final = 30
"""Steps of the history that are not folded, the latest."""

REVISIONS_SHOWN: Final = 10

What = Literal["requeue", "refetch", "redeliver", "discard"]

NOTICES: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "fetch_queued": ("ok", "The refetch was queued. What comes of it is shown below."),
        "fetch_waiting": ("info", "A job for its fetch was waiting already, so no other one was added."),
        "fetch_broken": ("bad", "Nothing was done: a key of the order in Redis is broken."),
        "requeued": ("ok", "It was requeued, with all attempts. What comes of it is shown below."),
        "redelivered": ("ok", "The delivery was queued, with all attempts. What comes of it is shown below."),
        "redelivery_disabled": (
            "warn",
            "The delivery was queued, but the sink was disabled: it waits until someone enables the sink.",
        ),
        "redelivery_waiting": ("info", "Its delivery to this sink was outstanding already."),
        "discarded": ("ok", "The dead letter was discarded."),
        "erased": ("warn", "Nothing was done: the order was erased, and is no longer fetched or delivered."),
        "was_discarded": ("warn", "Nothing was done: it had been discarded since you read the page."),
        "was_delivered": ("warn", "Nothing was done: it had been delivered since you read the page."),
        "was_requeued": ("warn", "Nothing was done: it had been requeued, or had ended, since you read the page."),
        "was_changed": ("warn", "Nothing was done: it had failed again since you read the page. Look, then decide."),
    }
)
"""What an action has done, by the code that stands in the address afterwards: kind of the notice, and sentence."""


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """One button of the page; `sink` is "" for the fetch. `seen` stands for the state that it was offered for."""

    what: What
    label: str
    text: str
    sink: str = ""
    seen: str = ""


class Offered(NamedTuple):
    """An order as an action finds it, and what whoever asks for it may do."""

    by: Operations
    key: OrderKey
    record: OrderRecord
    letters: list[DeadLetter]
    actions: tuple[Action, ...]


class Row(NamedTuple):
    """A step of the history as the page shows it; `day` only where it is not that of the step before."""

    at: str
    day: str
    clock: str
    since: str
    text: str
    repeated: str


class OrderScreens:
    """The page of an order and its actions; `operations` makes the operations of a person, for a reason."""

    def __init__(self, pages: Pages, operations: Callable[[str, str], Operations]) -> None:
        self._pages = pages
        self._operations = operations

    def screens(self) -> Iterator[Screen]:
        yield Screen(ADDRESS, self.show, frozenset({"company", "revision", "done", "seen"}))
        fields = frozenset({"company", "why"})
        yield Screen(f"{ADDRESS}/refetch", self.refetch, fields, "POST")
        yield Screen(f"{ADDRESS}/requeue", self.requeue, fields | {"seen"}, "POST")
        yield Screen(f"{ADDRESS}/redeliver", self.redeliver, fields | {"seen", "sink"}, "POST")
        yield Screen(f"{ADDRESS}/discard", self.discard, fields | {"seen", "sink", "sure"}, "POST")

    def show(self, visit: Visit) -> Response:
        """Return the page of the order, or of the companies that have one with this id."""
        done, revision = visit.query.get("done", ""), _number(visit.query.get("revision", ""))
        if done and done not in NOTICES:
            raise _bad("This page takes no such `done`.")
        try:
            found = _orders(visit, visit.query)
            view = view_of(visit.stores, found[0]) if len(found) == 1 else None
        except BrokenRecord as error:
            raise _broken(error) from None
        except NotKnown:
            return results(self._pages, visit, visit.path["order_id"][:LONGEST_SOUGHT], [], is_whole=True)
        stores, key = visit.stores, found[0]
        if view is None:
            companies = [(stores.slug(one.company_id), address(stores, one)) for one in found]
            values: dict[str, Any] = {"order_id": key.order_id, "companies": companies}
            return self._pages.page("companies.html", visit.user, visit.here, **values)
        actions = tuple(actions_of(stores, view.record, stores.dead_letters.of(key, waiting=True)))
        offer = _token(*((one.what, one.sink, one.seen) for one in actions))
        seen = visit.query.get("seen", offer)
        values = _values(stores, view) | {
            "notice": NOTICES.get(done),
            "poll": address(stores, key, revision=revision, done=done, seen=seen),
            "difference": _difference(stores, view, revision),
            "actions": actions,
            "has_changed": seen != offer,
        }
        return self._pages.page("order.html", visit.user, visit.here, **values)

    def refetch(self, visit: Visit) -> Response:
        """Request its fetch. Repeated, no second job is added while one waits."""
        by, key, *_ = self._offered(visit)
        done = by.refetch({key: ""}, queue="live", what="refetch", selected=key.member)
        outcomes = {"erased": done.erased, "fetch_broken": done.broken, "fetch_waiting": done.waiting}
        return _back(visit, key, next((code for code, is_so in outcomes.items() if is_so), "fetch_queued"))

    def requeue(self, visit: Visit) -> Response:
        """Try its dead fetch, and its deliveries that failed, again now. Repeated, nothing is done."""
        by, key, record, letters, actions = self._offered(visit)
        if not _is_offered(actions, "requeue", "", visit):
            return _back(visit, key, meanwhile(record, ""))
        done = by.requeue(letters, queue="live", selected=key.member, count=len(letters))
        happened = done.deliveries or done.fetches.queued or done.fetches.waiting
        return _back(visit, key, "requeued" if happened else "was_requeued")

    def redeliver(self, visit: Visit) -> Response:
        """Deliver the stored revision to one sink again. Repeated, nothing is done until that delivery has ended."""
        by, key, record, _, actions = self._offered(visit)
        stores = visit.stores
        sink = visit.form.get("sink", "")
        if sink not in stores.sinks:
            detail = f"No worker pool has declared it. There are: {', '.join(stores.sinks) or 'none'}."
            raise Refused(HTTPStatus.BAD_REQUEST, "unknown_sink", "There is no such sink", detail)
        if not _is_offered(actions, "redeliver", sink, visit):
            return _back(visit, key, meanwhile(record, sink))
        outcome = by.redeliver(key, sink)
        code = {"queued": "redelivered", "waiting": "redelivery_waiting", "passed": "was_requeued"}[outcome]
        if outcome == "queued" and sink in stores.deployment.disabled():
            code = "redelivery_disabled"
        return _back(visit, key, code)

    def discard(self, visit: Visit) -> Response:
        """Discard one dead letter for good, if it is the one that was seen. Repeated, nothing is done."""
        by, key, record, letters, actions = self._offered(visit)
        sink = visit.form.get("sink", "")
        if visit.form.get("sure") != "yes":
            detail = "Tick the box that says that it is for good, and press the button again. Nothing was done."
            raise Refused(HTTPStatus.BAD_REQUEST, "not_sure", "Discard it for good?", detail)
        if not _is_offered(actions, "discard", sink, visit):
            return _back(visit, key, meanwhile(record, sink))
        selected = f"{key.member} to {sink}" if sink else key.member
        done = by.discard([one for one in letters if one.sink == sink], selected=selected, count=1)
        return _back(visit, key, "discarded" if done else "was_requeued")

    def _offered(self, visit: Visit) -> Offered:
        """Return the order of a form, and what the page would offer for it now; raises Refused."""
        by, stores = self._operations(visit.user.who, visit.why()), visit.stores
        try:
            found = _orders(visit, visit.form)
            record = stores.orders.record(found[0])
            letters = stores.dead_letters.of(found[0], waiting=True)
        except BrokenRecord as error:
            raise _broken(error) from None
        except NotKnown:
            record = None
        if record is None:
            detail = "There is no such order (any more). Nothing was done."
            raise Refused(HTTPStatus.NOT_FOUND, "unknown_order", "Order not found", detail)
        if len(found) > 1:
            raise _bad("Several companies have this order: name one with `company`.")
        key = record.key
        return Offered(by, key, record, letters, tuple(actions_of(stores, record, letters)))


def actions_of(stores: Stores, record: OrderRecord, letters: Sequence[DeadLetter]) -> Iterator[Action]:
    """Yield what makes sense for an order in this state; `letters`: its dead letters, and deliveries that wait.

    An action is done only where the page would offer the same now: no one acts on a failure that they have not seen.
    """
    if record.erased_at:
        return
    dead = {*([""] if record.dead else []), *(sink.name for sink in record.dead_sinks)}
    if letters:
        text = f"Tries again now, with all attempts: {'; '.join(map(_failure, letters))}."
        yield Action(what="requeue", label="Requeue", text=text, seen=_token(*(_seen(one, dead) for one in letters)))
    if not record.dead:
        text = "Fetches it again now (one getOrder). New content becomes a new revision, and is delivered."
        yield Action(what="refetch", label="Refetch", text=text)
    of_sinks, failing = {one.name: one for one in record.sinks}, {one.sink for one in letters}
    for sink in stores.sinks if record.revision else ():
        one = of_sinks.get(sink) or SinkRecord(sink, record.revision)
        # What did not fail comes by itself; a single failure is what Requeue is about.
        if (sink in failing and len(letters) == 1) or (sink not in failing and record.is_behind(one)):
            continue
        text = f"Delivers revision {record.revision} as it is stored, with the same idempotency key. No getOrder."
        seen = _token(record.revision, one.revision, one.dead, one.discarded, sink in failing)
        yield Action(what="redeliver", label=f"Deliver again to {sink}", text=text, sink=sink, seen=seen)
    for letter in letters:
        if letter.sink in dead:
            what = f"the delivery to {letter.sink}" if letter.sink else "the fetch"
            after = "The next revision is delivered again." if letter.sink else "A new event, or a refetch, fetches it."
            text = f"Ends {what} for good ({letter.reason}). {after}"
            seen = _token(_seen(letter, dead))
            yield Action(what="discard", label=f"Discard {what}", text=text, sink=letter.sink, seen=seen)


def meanwhile(record: OrderRecord, sink: str) -> str:
    """Return the code of the notice that says why an action was not done: what became of the fetch, or of a sink."""
    if record.erased_at:
        return "erased"
    if not sink:
        return "was_changed" if record.dead else "was_discarded" if record.is_discarded else "was_requeued"
    one = next((one for one in record.sinks if one.name == sink), SinkRecord(sink))
    if one.dead:
        return "was_changed"
    if 0 < record.revision <= one.discarded:
        return "was_discarded"
    return "was_requeued" if record.is_behind(one) else "was_delivered"


def _is_offered(actions: Sequence[Action], what: What, sink: str, visit: Visit) -> bool:
    seen = visit.form.get("seen", "")
    return any((one.what, one.sink, one.seen) == (what, sink, seen) for one in actions)


def _failure(letter: DeadLetter) -> str:
    return f"the delivery to {letter.sink} ({letter.reason})" if letter.sink else f"the fetch ({letter.reason})"


def _seen(letter: DeadLetter, dead: set[str]) -> str:
    # The next attempt of a delivery that waits moves by itself.
    return f"{letter.sink} {letter.reason} {times.to_ms(letter.at)}" if letter.sink in dead else f"{letter.sink} waits"


def _token(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode(errors="replace")).hexdigest()[:12]


def _back(visit: Visit, key: OrderKey, done: str) -> Response:
    return see_other(address(visit.stores, key, done=done))


def _orders(visit: Visit, given: Mapping[str, str]) -> list[OrderKey]:
    """Return the orders with the id in the path, of the company given if one is; raises NotKnown without any."""
    stores, text, company = visit.stores, visit.path["order_id"], given.get("company")
    order_id = guid(text)
    company_id = next((one for one, slug in stores.slugs.items() if slug == company), guid(company))
    if order_id is None or (company is not None and company_id is None):
        raise NotKnown(text)
    visit.line["order_id"] = order_id
    found = stores.find_whole(order_id, company_id)
    if not found:
        raise NotKnown(text)
    return found


def _values(stores: Stores, view: OrderView) -> dict[str, Any]:
    """Return what the template shows of the order itself."""
    rows = list(asset_rows(view.order.items)) if view.order is not None else []
    headline, kind = _headline(view)
    return {
        "view": view,
        "address": address(stores, view.record.key),
        "headline": headline,
        "kind": kind,
        "next": commands_apart(view.next),
        "outstanding": list(_outstanding(view)),
        "error": error_words(view.record),
        "sinks": [(one, sink_state(view, one)) for one in view.sinks],
        "took": list(took(view.durations)),
        "steps": list(_rows(view.steps)),
        "folded": max(0, len(view.steps) - STEPS_SHOWN),
        "kept": LONGEST,
        "rows": rows[:MOST_ROWS],
        "rows_left": len(rows) - MOST_ROWS,
        "most_rows": MOST_ROWS,
        "revisions_shown": REVISIONS_SHOWN,
        "audit": audit.of_order(stores.redis, view.record.key),
        "fields": list(_fields(view.record)),
    }


def _difference(stores: Stores, view: OrderView, revision: int | None) -> Difference | None:
    """Return what a revision changed; None where nothing is stored, or it cannot be read. Raises Refused."""
    if not view.record.revision or view.record.erased_at:
        return None
    try:
        return difference(stores, view.record.key, revision)
    except UnreadableAnswer:
        return None
    except NotKnown as error:
        raise Refused(HTTPStatus.NOT_FOUND, "unknown_revision", "No such revision", str(error)) from None


def _headline(view: OrderView) -> tuple[str, str]:
    """Return whether anything is missing in words, and the kind of its badge."""
    if view.state == "erased":
        return "ERASED", "idle"
    if view.complete:
        return "COMPLETE", "ok"
    is_dead = view.state == "dead" or bool(view.record.dead_sinks)
    return "NOT COMPLETE", "bad" if is_dead else "warn"


def _outstanding(view: OrderView) -> Iterator[tuple[str, Outstanding, list[str]]]:
    """Yield what is outstanding, what has failed for good first: the kind of its sign, and why it waits."""
    dead = {*([""] if view.state == "dead" else []), *(sink.name for sink in view.record.dead_sinks)}
    found = [("bad" if one.sink in dead else "info" if one.next else "warn", one) for one in view.outstanding]
    for kind, one in sorted(found, key=lambda pair: pair[0] != "bad"):
        yield kind, one, commands_apart(one.why)


def _rows(steps: Sequence[Step]) -> Iterator[Row]:
    day = ""
    for step in steps:
        at, until = step.at.astimezone(UTC), step.until.astimezone(UTC)
        this_day = f"{at:%Y-%m-%d}"
        ends = f"{until:%H:%M:%S}" if until.date() == at.date() else f"{until:%m-%d %H:%M:%S}"
        yield Row(
            at=f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03}Z",
            day="" if this_day == day else this_day,
            clock=f"{at:%H:%M:%S}.{at.microsecond // 1000:03}",
            since="" if step.since_ms is None else f"+{times.span(step.since_ms)}",
            text=step.text,
            repeated="" if step.times == 1 else f"{step.times} times until {ends}",
        )
        day = this_day


def _fields(record: OrderRecord) -> Iterator[tuple[str, object]]:
    """Yield the fields of the record that hold something, as `orders explain --json` names them."""
    for field in msgspec.structs.fields(record):
        value = getattr(record, field.name)
        if value not in (None, "", 0) and field.name != "sinks":
            yield field.name, value


def _number(text: str) -> int | None:
    if text and not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise _bad("`revision` is the number of a revision.")
    return int(text) if text else None


def _bad(detail: str) -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, "bad_parameter", "The address has a wrong filter", detail)


def _broken(error: BrokenRecord) -> Refused:
    title = "The record of this order is unreadable"
    return Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "broken_record", title, str(error))
