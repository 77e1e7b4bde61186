"""`subscription watch`: tells when events cannot come any more, once a change, and can mend it."""

from __future__ import annotations

import signal
import sys
import time
from typing import Annotated, Final

import msgspec
import typer
from pydantic import Field, TypeAdapter, ValidationError

from app import bootstrap, log
from app.cli import moment, options, output, webhook_address
from app.cli.check_upstream import WEBHOOK_PERMISSIONS, advice
from app.cli.exits import AWAY, DONE, FOUND
from app.cli.venues import Venues, venues
from app.settings import Seconds
from app.subscriptions import ACTIVE, REPAIR_FAILED, REPAIRED, UNREACHABLE, Sight, Watch

CODES: Final = (
    "Exit codes: 0 done · 1 something is wrong, or nothing was found · 2 usage or settings, or a question that nobody"
    " could answer · 3 the Channel Manager did not answer as it should · 130 interrupted"
)

_log = log.get()
_seconds: Final = TypeAdapter(Annotated[Seconds, Field(ge=1)])


def _duration(text: str) -> int:
    try:
        return _seconds.validate_python(text)
    except ValidationError:
        raise typer.BadParameter("is not a duration such as 90s, 5m or 1h") from None


def watch(
    company: options.Company = None,
    url: Annotated[
        str | None, typer.Option(help="Only a subscription to this address counts; repair makes it.")
    ] = None,
    every: Annotated[
        int, typer.Option(parser=_duration, metavar="DURATION", help="90s, 5m, 1h.", show_default="5m")
    ] = 300,
    repair: Annotated[bool, typer.Option("--repair", help="Create it again when it is gone or not Active.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Look once, for cron: 0 Active, 1 not, 3 not known.")] = False,
    as_json: options.Json = False,
) -> None:
    """Look at the subscriptions again and again, and tell each change once; Ctrl-C ends it.

    Run one of these, not two, with --repair: two would each create one. For cron: watch --once --repair --url URL.
    """
    if url is not None:
        webhook_address.check(url)
    # Without a handler the first process of a container does not even notice the signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DONE))
    with venues(company) as here:
        if url is not None:
            here.one()  # an address belongs to one company
        bootstrap.configure_stderr_log(here.settings)
        rounds = Rounds(here, url, repair, as_json)
        while not once:
            rounds.go()
            time.sleep(every)
        raise typer.Exit(rounds.go())


class Rounds:
    """Looks at every company in turn, and remembers what was told of each."""

    def __init__(self, here: Venues, url: str | None, repair: bool, as_json: bool) -> None:
        path = here.settings.webhook_path
        self._watches = [Watch(venue.company, venue.upstream, path, url) for venue in here.chosen]
        self._repair = repair
        self._as_json = as_json
        self._told: dict[str, list[Sight]] = {}

    def go(self) -> int:
        """Look at all of them, tell what is new, and return the exit code of this round."""
        last = [self._one(watch) for watch in self._watches]
        states = {sight.state for sight in last}
        if states - {ACTIVE, REPAIRED, UNREACHABLE}:
            return FOUND
        return AWAY if UNREACHABLE in states else DONE

    def _one(self, watch: Watch) -> Sight:
        seen = [watch.look()]
        if self._repair and watch.can_repair(seen[0]):
            seen.append(watch.repair())
        slug, last = seen[0].company, seen[-1]
        if seen != self._told.get(slug):
            for sight in seen:
                self._tell(watch, sight)
        # What was repaired is Active until it is seen otherwise: that is no news.
        self._told[slug] = [watch.active()] if last.state == REPAIRED else seen
        return last

    def _tell(self, watch: Watch, sight: Sight) -> None:
        _report(sight)
        hint = sight.advice or (advice(sight.cause, WEBHOOK_PERMISSIONS) if sight.cause else "")
        if self._repair and watch.can_repair(sight):
            hint = "It is made again."
        elif self._repair and sight.state == "missing":
            hint = "It cannot be made again, as its address was never seen: give --url."
        text = f"{moment.short(moment.now())} {sight.company}: {sight.state}, {sight.detail}. {hint}".rstrip()
        told = {"at": moment.now()} | msgspec.structs.asdict(sight) | {"advice": hint}
        output.tell(text, told, self._as_json)
        sys.stdout.flush()


def _report(sight: Sight) -> None:
    if sight.state == ACTIVE:
        _log.info("subscription.active", company=sight.company)
    elif sight.state == REPAIRED:
        _log.warning("subscription.repaired", company=sight.company)
    elif sight.state in {UNREACHABLE, REPAIR_FAILED}:
        _log.warning(
            "subscription.trouble",
            company=sight.company,
            what=sight.state,
            reason=sight.cause,
            http_status=sight.http_status,
        )
    else:
        _log.error("subscription.down", company=sight.company, reason=sight.state)
