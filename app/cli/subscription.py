"""The commands for the webhook subscription: list, create, delete, watch. None of them shows a clientState unasked.

`subscription watch`: tells when events cannot come any more, once a change, and can mend it.

A new clientState, and the way to it on which no event is refused: the receiver knows it before upstream does.

A new secret on disk: readable by its owner alone, whole or not at all, and never in the place of one in use.

The address that upstream shall send events to: what it must be, so that nobody else can read them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import msgspec
import typer
from pydantic import Field, SecretStr, TypeAdapter, ValidationError

from app import bootstrap, log, times
from app.cli import console, context
from app.cli.console import AWAY, DONE, FOUND, NEWER, Stop, epilog
from app.cli.context import WEBHOOK_PERMISSIONS, CompanyClient, CompanyClients, advice, asking, company_clients, trouble
from app.errors import RequestRejected, UpstreamError
from app.ids import guid
from app.settings import Company, Seconds, Settings
from app.subscriptions import (
    ACTIVE,
    REPAIR_FAILED,
    REPAIRED,
    UNREACHABLE,
    Sight,
    Watch,
    ends_in,
    for_settled_orders,
    same_address,
    secret_of,
    shown_address,
)
from app.upstream.models import EVENT_NAME, Subscription

_LOOPBACK: Final = {"127.0.0.1", "localhost", "::1"}


def check_address(url: str) -> None:
    """Raise Stop unless upstream can send events there without showing them to anybody."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise Stop("URL is no address.") from None
    if parts.scheme not in {"http", "https"} or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise Stop("URL is no http(s) address: it must start with https://.")
    if parts.scheme == "http" and host not in _LOOPBACK:
        raise Stop("URL must be https: every event carries the clientState.")
    if parts.username is not None or parts.fragment:
        raise Stop("URL must hold neither a user nor a fragment.")


CODES: Final = {AWAY: "no usable answer from the Channel Manager", NEWER: ""}

_log = log.get()
_seconds: Final = TypeAdapter(Annotated[Seconds, Field(ge=1)])


def _duration(text: str) -> int:
    try:
        return _seconds.validate_python(text)
    except ValidationError:
        raise typer.BadParameter("is not a duration such as 90s, 5m or 1h") from None


def watch(
    company: context.CompanyOption = None,
    url: Annotated[
        str | None, typer.Option(help="Only a subscription to this address counts; repair makes it.")
    ] = None,
    every: Annotated[
        int, typer.Option(parser=_duration, metavar="DURATION", help="90s, 5m, 1h.", show_default="5m")
    ] = 300,
    repair: Annotated[bool, typer.Option("--repair", help="Create it again when it is gone or not Active.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Look once, for cron: 0 Active, 1 not, 3 not known.")] = False,
    as_json: context.Json = False,
) -> None:
    """Look at the subscriptions again and again, and tell each change once; Ctrl-C ends it.

    Run one of these, not two, with --repair: two would each create one. For cron: watch --once --repair --url URL.
    """
    if url is not None:
        check_address(url)
    # Without a handler the first process of a container does not even notice the signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DONE))
    with company_clients(company) as here:
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

    def __init__(self, here: CompanyClients, url: str | None, repair: bool, as_json: bool) -> None:
        path = here.settings.webhook_path
        self._watches = [Watch(client.company, client.upstream, path, url) for client in here.all]
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
        text = f"{times.short(times.now())} {sight.company}: {sight.state}, {sight.detail}. {hint}".rstrip()
        told = {"at": times.now()} | msgspec.structs.asdict(sight) | {"advice": hint}
        console.tell(text, told, self._as_json)
        sys.stdout.flush()


def _report(sight: Sight) -> None:
    if sight.state == ACTIVE:
        _log.info("subscription.active", company=sight.company)
    elif sight.state == REPAIRED:
        _log.warning("subscription.repaired", company=sight.company)
    elif sight.state in {UNREACHABLE, REPAIR_FAILED}:
        _log.warning(
            "subscription.check_failed",
            company=sight.company,
            what=sight.state,
            reason=sight.cause,
            http_status=sight.http_status,
        )
    else:
        _log.error("subscription.down", company=sight.company, reason=sight.state)


def check_target(path: Path, in_use: Iterable[SecretStr | None], yes: bool) -> None:
    """Raise Stop if `path` must not be written: it is there and `yes` is not said, or it holds a secret in use."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise Stop(f"{path} is there and is no file.")
    if not yes:
        raise Stop(f"{path} is there already: name another, or overwrite it with --yes.")
    try:
        held = path.read_bytes().strip()
    except OSError as error:
        raise Stop(f"{path} cannot be read ({type(error).__name__}).") from None
    if any(one is not None and one.get_secret_value().encode() == held for one in in_use):
        raise Stop(f"{path} holds a clientState in use, which is needed until the rotation is over: name another.")


def write(path: Path, secret: SecretStr) -> None:
    """Put `secret` into `path` with mode 0600, in one step, in the place of what may be there; raises Stop."""
    try:
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(secret.get_secret_value() + "\n")
                file.flush()
                os.fsync(number)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise Stop(f"{path} cannot be written ({type(error).__name__}).") from None


_BYTES = 32
"""Of chance; 43 characters in base64, of the 50 that a subscription takes (upstream.md 3)."""


def begin(
    settings: Settings,
    company: Company,
    url: str,
    ours: list[Subscription],
    write_to: Path | None,
    reveal: bool,
    yes: bool,
) -> tuple[list[str], dict[str, Any]]:
    """Make a secret, put it where it was asked for, and return the steps that are left: as lines, and as an object.

    Raises Stop, before anything is made, where the file must not be written.
    """
    in_use = (company.client_state, company.client_state_previous)
    if company.client_state_previous is not None:
        question = "A rotation is under way: CLIENT_STATE_PREVIOUS is set, and would be dropped. Begin another?"
        console.confirm(question, yes)
    made = SecretStr(secrets.token_urlsafe(_BYTES))
    if write_to is not None:
        check_target(write_to, in_use, yes)
        write(write_to, made)
    found = _steps(settings, company, url, ours, write_to)
    lines = ["Nothing is changed upstream yet. In this order no event is refused:"]
    lines += [f"{number}. {step}" for number, step in enumerate(found, 1)]
    told: dict[str, Any] = {"company": company.slug, "written_to": str(write_to) if write_to else None, "steps": found}
    if reveal:
        told["client_state"] = made.get_secret_value()
        lines.insert(0, f"New clientState: {made.get_secret_value()}")
    if write_to is not None:
        lines.insert(0, f"A new clientState is in {write_to}.")
    return lines, told


def _steps(
    settings: Settings, company: Company, url: str, ours: list[Subscription], write_to: Path | None
) -> list[str]:
    several = settings.companies_file is not None
    place = f"[companies.{company.slug}] of COMPANIES_FILE: " if several else ""
    names = ["CLIENT_STATE", "CLIENT_STATE_PREVIOUS"]
    current, previous = (name.lower() if several else name for name in names)
    suffix = "_file" if several else "_FILE"
    new = f"{current}{suffix} = {write_to.absolute()}" if write_to else f"{current} = the new one"
    which = f" --company {company.slug}" if several else ""
    old = [one.id for one in ours if one.id and same_address(one.notification_url, url)]
    deletes = [f"ota-receiver subscription delete {one}{which}" for one in old]
    return [
        f"{place}{previous} = what {current} is now; {new}",
        "Restart the web processes, and `subscription watch`: from now on both secrets are taken.",
        f"ota-receiver subscription create {shlex.quote(url)}{which} --yes",
        *(deletes or ["Delete the old subscription: ota-receiver subscription list, and delete."]),
        f'Once ota_events_by_secret_total{{secret="previous"}} has stood still for a day: take {previous} out.',
    ]


cli = console.commands(name="subscription", help="The webhook subscription at the Channel Manager.")

_SHOWN_BY_LIST: Final = "Its id, as `subscription list` shows it."
_CREATE: Final = "ota-receiver subscription create https://hooks.example.com/webhooks/ota-channel-manager"
_WATCH: Final = "ota-receiver subscription watch --repair --url https://hooks.example.com/webhooks/ota-channel-manager"


cli.command(epilog=epilog(_WATCH, codes=CODES))(watch)


@cli.command("list", epilog=epilog("ota-receiver subscription list", codes=CODES))
def list_(company: context.CompanyOption = None, as_json: context.Json = False) -> None:
    """List all subscriptions, also those for other events, and which of our secrets their events carry."""
    rows: list[tuple[CompanyClient, Subscription]] = []
    troubles: list[str] = []
    with company_clients(company) as here:
        for client in here.all:
            try:
                rows += [(client, one) for one in client.upstream.subscriptions()]
            except UpstreamError as error:
                troubles.append(trouble(client.slug, error, WEBHOOK_PERMISSIONS))
    if as_json:
        for client, one in rows:
            console.json_line(_view(client, one))
    elif rows:
        columns = ("=id", "company", "event", "state", "secret", "address")
        console.table("", columns, (_row(client, one) for client, one in rows))
    if troubles:
        raise Stop("\n".join(troubles), AWAY)
    if not rows:
        raise Stop("No subscription.", FOUND)


@cli.command(epilog=epilog(_CREATE, f"{_CREATE} --new-client-state --write-to FILE", codes=CODES))
def create(
    url: Annotated[str, typer.Argument(metavar="URL", help="Public https address of the webhook.")],
    company: context.CompanyOption = None,
    new_client_state: Annotated[
        bool, typer.Option("--new-client-state", help="Only make a new secret, and tell how to rotate to it.")
    ] = False,
    write_to: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the new secret goes; mode 0600.")] = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Print the new secret.")] = False,
    yes: context.Yes = False,
    as_json: context.Json = False,
) -> None:
    """Subscribe URL to settled orders; events will carry CLIENT_STATE of the settings.

    With --new-client-state nothing is subscribed yet: events with a secret that the web processes do not know would
    be answered 401.
    """
    check_address(url)
    if not new_client_state and (write_to or reveal):
        raise Stop("--write-to and --reveal go with --new-client-state.")
    if new_client_state and not (write_to or reveal):
        raise Stop("Say where the new clientState goes: --write-to FILE, or --reveal to see it.")
    with company_clients(company) as here:
        client = here.one()
        with asking(client):
            ours = for_settled_orders(client.upstream.subscriptions())
        same = [one for one in ours if same_address(one.notification_url, url)]
        if not ends_in(url, here.settings.webhook_path):
            console.remark(f"{shown_address(url)} does not end in WEBHOOK_PATH ({here.settings.webhook_path}).")
            console.remark("Unless a proxy maps the path, every event will be answered 404.")
        if new_client_state:
            lines, told = begin(here.settings, client.company, url, ours, write_to, reveal, yes)
            console.tell_lines(lines, told, as_json)
            return
        if same:
            console.confirm(f"{shown_address(url)} is subscribed already, as {_ids(same)}. Subscribe it again?", yes)
        with asking(client, changes=True):
            made = client.upstream.create_subscription(url, client.company.client_state)
        made = _found_again(client, made, url, ours)
    told = _view(client, made) | {"event": EVENT_NAME, "url": shown_address(url)}
    text = f"{client.slug}: {shown_address(url)} is subscribed to {EVENT_NAME} ({told['id'] or 'id not told'})."
    console.tell(text, told, as_json)


@cli.command(epilog=epilog("ota-receiver subscription delete 6f1f0c1e-2b4d-4a57-9c53-0d9d7c1b2a3e", codes=CODES))
def delete(
    subscription_id: Annotated[str, typer.Argument(metavar="ID", help=_SHOWN_BY_LIST)],
    company: context.CompanyOption = None,
    yes: context.Yes = False,
    as_json: context.Json = False,
) -> None:
    """Delete a subscription."""
    wanted = guid(subscription_id)
    if wanted is None:
        raise Stop(f"{subscription_id!r} is not a subscription id. {_SHOWN_BY_LIST}")
    with company_clients(company) as here:
        client, one, others = _find(here, wanted)
        last = one.active and not any(other.active for other in others)
        warning = " It is the last Active one: no event will come any more." if last else ""
        what = f"{one.event_name} to {shown_address(one.notification_url)}, {one.subscription_state}"
        console.confirm(f"Delete {wanted} of {client.slug} ({what})?{warning}", yes)
        with asking(client, changes=True):
            deleted = _deleted(client, wanted)
    if not deleted:
        raise Stop(f"{wanted} is gone already.", FOUND)
    console.tell(f"{wanted} is deleted.", {"company": client.slug, "id": wanted, "deleted": True}, as_json)


def _deleted(client: CompanyClient, subscription_id: str) -> bool:
    """Delete it and return whether it was still there."""
    try:
        client.upstream.delete_subscription(subscription_id)
    except RequestRejected as error:
        if error.reason != "subscription_not_found":
            raise
        return False
    return True


def _found_again(client: CompanyClient, made: Subscription, url: str, before: list[Subscription]) -> Subscription:
    """Return the new subscription as it is listed: the answer to its creation may have been empty (upstream.md 3)."""
    if made.id is not None:
        return made
    known = {one.id for one in before}
    try:
        listed = for_settled_orders(client.upstream.subscriptions())
    except UpstreamError:
        return made
    return next((one for one in listed if one.id not in known and same_address(one.notification_url, url)), made)


def _find(here: CompanyClients, wanted: str) -> tuple[CompanyClient, Subscription, list[Subscription]]:
    """Return the subscription of this id, whose it is, and the others of that company for the same event."""
    for client in here.all:
        with asking(client):
            listed = client.upstream.subscriptions()
        for one in listed:
            if guid(one.id) == wanted:
                return client, one, [other for other in listed if other is not one and _same_event(one, other)]
    raise Stop(f"No subscription {wanted} is there.", FOUND)


def _same_event(one: Subscription, other: Subscription) -> bool:
    return (one.event_name or "").casefold() == (other.event_name or "").casefold()


def _ids(found: list[Subscription]) -> str:
    return ", ".join(one.id or "an unnamed one" for one in found)


def _view(client: CompanyClient, one: Subscription) -> dict[str, object]:
    return {
        "company": client.slug,
        "id": one.id,
        "event": one.event_name,
        "version": one.event_version,
        "url": shown_address(one.notification_url),
        "state": one.subscription_state,
        "secret": secret_of(client.company, one),
        "changed": one.last_modified_date_time,
    }


def _row(client: CompanyClient, one: Subscription) -> tuple[object, ...]:
    secret = secret_of(client.company, one)
    return (one.id, client.slug, one.event_name, one.subscription_state, secret, shown_address(one.notification_url))
