"""The commands for the webhook subscription: list, create, delete, watch. They show a clientState only with --reveal.

A new clientState is rotated so that no event is refused: the web processes accept it before upstream sends it. Its file
is readable by its owner alone, written whole or not at all, and never replaces a secret in use.
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import msgspec
import typer
from pydantic import Field, SecretStr, TypeAdapter, ValidationError

from app import bootstrap, log, settings, times
from app.cli import console, context
from app.cli.console import AWAY, DONE, FOUND, NEWER, Stop, epilog
from app.cli.context import WEBHOOK_PERMISSIONS, Companies, advice, trouble
from app.errors import RequestRejected, Unavailable, UnreadableAnswer, UpstreamError
from app.ids import guid
from app.settings import Company, Seconds, Settings
from app.subscriptions import (
    ACTIVE,
    REPAIR_FAILED,
    REPAIRED,
    UNREACHABLE,
    SubscriptionStatus,
    SubscriptionWatch,
    ends_in,
    for_settled_orders,
    same_address,
    secret_of,
    shown_address,
)
from app.upstream.client import ChannelManager
from app.upstream.models import EVENT_NAME, Subscription

_LOOPBACK: Final = {"127.0.0.1", "localhost", "::1"}
_SECRET_BYTES: Final = 32
"""43 characters in base64, of the 50 that a subscription takes (upstream.md 3)."""

_CODES: Final = {AWAY: "no usable answer from the Channel Manager", NEWER: ""}
_ID: Final = "Its id, as `subscription list` shows it."
_CREATE: Final = "ota-receiver subscription create https://hooks.example.com/webhooks/ota-channel-manager"
_WATCH: Final = "ota-receiver subscription watch --repair --url https://hooks.example.com/webhooks/ota-channel-manager"

_log = log.get()
_seconds: Final = TypeAdapter(Annotated[Seconds, Field(ge=1)])

cli = console.commands(name="subscription", help="The webhook subscription at the Channel Manager.")


@dataclass(frozen=True)
class CompanyClient:
    """One company and its client of the Channel Manager."""

    company: Company
    upstream: ChannelManager

    @property
    def slug(self) -> str:
        return self.company.slug


@dataclass(frozen=True)
class CompanyClients:
    """The companies of one command, with their clients."""

    settings: Settings
    all: tuple[CompanyClient, ...]

    def one(self) -> CompanyClient:
        """Return the only one; raises Stop when there are several."""
        if len(self.all) > 1:
            slugs = ", ".join(sorted(one.slug for one in self.all))
            raise Stop(f"There are several companies. Choose one with --company: {slugs}.")
        return self.all[0]


@contextmanager
def company_clients(name: str | None) -> Iterator[CompanyClients]:
    """Open the client of this slug or GUID, those of all companies for None; raises SettingsError, Stop."""
    bootstrap.configure_cli_log()
    found = settings.load()
    company_id = Companies(found.companies).id_of(name)
    companies = [one for one in found.companies if company_id in (None, one.np_company_id)]
    if not companies:
        raise Stop(f"No company {name!r} in the settings.")
    with bootstrap.http(found) as http:
        clients = [CompanyClient(one, bootstrap.channel_manager(found, one, http)) for one in companies]
        yield CompanyClients(found, tuple(clients))


@contextmanager
def _upstream_errors(client: CompanyClient, *, changes: bool = False) -> Iterator[None]:
    """Turn an error of upstream into a Stop. With `changes` it says whether the change may have been made."""
    try:
        yield
    except UpstreamError as error:
        is_uncertain = changes and isinstance(error, Unavailable | UnreadableAnswer)
        unsure = " It may have been done: check with `ota-receiver subscription list` first." if is_uncertain else ""
        raise Stop(f"{trouble(client.slug, error, WEBHOOK_PERMISSIONS)}{unsure}", AWAY) from None


@cli.command("list", epilog=epilog("ota-receiver subscription list", codes=_CODES))
def list_(company: context.CompanyOption = None, as_json: context.Json = False) -> None:
    """List all subscriptions, also those for other events, and which of our secrets their events carry."""
    found: list[tuple[CompanyClient, Subscription]] = []
    troubles: list[str] = []
    with company_clients(company) as here:
        for client in here.all:
            try:
                found += [(client, one) for one in client.upstream.subscriptions()]
            except UpstreamError as error:
                troubles.append(trouble(client.slug, error, WEBHOOK_PERMISSIONS))

    def row(pair: tuple[CompanyClient, Subscription]) -> tuple[object, ...]:
        view = _view(*pair)
        return tuple(view[name] for name in ("id", "company", "event", "state", "secret", "url"))

    console.listing(
        found,
        as_json,
        columns=("=id", "company", "event", "state", "secret", "address"),
        row=row,
        view=lambda pair: _view(*pair),
        nothing="" if troubles else "No subscription.",
    )
    if troubles:
        raise Stop("\n".join(troubles), AWAY)


@cli.command(epilog=epilog(_CREATE, f"{_CREATE} --new-client-state --write-to FILE", codes=_CODES))
def create(
    url: Annotated[str, typer.Argument(metavar="URL", help="Public https address of the webhook.")],
    company: context.CompanyOption = None,
    new_client_state: Annotated[
        bool, typer.Option("--new-client-state", help="Only make a new secret, and show how to rotate to it.")
    ] = False,
    write_to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for the new secret; it gets mode 0600.")
    ] = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Print the new secret.")] = False,
    yes: context.Yes = False,
    as_json: context.Json = False,
) -> None:
    """Subscribe URL to settled orders; events will carry CLIENT_STATE of the settings.

    With --new-client-state nothing is subscribed yet: the web processes would answer 401 to events with a secret that
    is not in their settings.
    """
    _check_address(url)
    if not new_client_state and (write_to or reveal):
        raise Stop("--write-to and --reveal need --new-client-state.")
    if new_client_state and not (write_to or reveal):
        raise Stop("Choose what happens to the new clientState: --write-to FILE, or --reveal to print it.")
    with company_clients(company) as here:
        client = here.one()
        with _upstream_errors(client):
            ours = for_settled_orders(client.upstream.subscriptions())
        same = [one for one in ours if same_address(one.notification_url, url)]
        if not ends_in(url, here.settings.webhook_path):
            console.remark(f"{shown_address(url)} does not end in WEBHOOK_PATH ({here.settings.webhook_path}).")
            console.remark("Unless a proxy maps the path, every event is answered 404.")
        if new_client_state:
            lines, new = _new_client_state(here.settings, client.company, url, same, write_to, reveal, yes)
            console.result(lines, new, as_json)
            return
        if same:
            ids = ", ".join(one.id or "one without an id" for one in same)
            console.confirm(f"{shown_address(url)} is already subscribed, as {ids}. Subscribe it again?", yes)
        with _upstream_errors(client, changes=True):
            made = client.upstream.create_subscription(url, client.company.client_state)
        if made.id is None:
            made = _listed(client, url, ours) or made
    view = _view(client, made) | {"event": EVENT_NAME, "url": shown_address(url)}
    text = f"{client.slug}: {shown_address(url)} is subscribed to {EVENT_NAME} ({made.id or 'id unknown'})."
    console.result(text, view, as_json)


@cli.command(epilog=epilog("ota-receiver subscription delete 6f1f0c1e-2b4d-4a57-9c53-0d9d7c1b2a3e", codes=_CODES))
def delete(
    subscription_id: Annotated[str, typer.Argument(metavar="ID", help=_ID)],
    company: context.CompanyOption = None,
    yes: context.Yes = False,
    as_json: context.Json = False,
) -> None:
    """Delete a subscription."""
    wanted = guid(subscription_id)
    if wanted is None:
        raise Stop(f"{subscription_id!r} is not a subscription id. {_ID}")
    with company_clients(company) as here:
        client, one, listed = _find(here, wanted)
        event = (one.event_name or "").casefold()
        others = [other for other in listed if other is not one and (other.event_name or "").casefold() == event]
        last = one.active and not any(other.active for other in others)
        warning = " It is the last Active one: no more events will arrive." if last else ""
        what = f"{one.event_name} to {shown_address(one.notification_url)}, {one.subscription_state}"
        console.confirm(f"Delete {wanted} of {client.slug} ({what})?{warning}", yes)
        with _upstream_errors(client, changes=True):
            try:
                client.upstream.delete_subscription(wanted)
            except RequestRejected as error:
                if error.reason == "subscription_not_found":
                    raise Stop(f"{wanted} is already deleted.", FOUND) from None
                raise
    console.result(f"{wanted} is deleted.", {"company": client.slug, "id": wanted, "deleted": True}, as_json)


def _duration(text: str) -> int:
    try:
        return _seconds.validate_python(text)
    except ValidationError:
        raise typer.BadParameter("is not a duration such as 90s, 5m or 1h") from None


@cli.command(epilog=epilog(_WATCH, codes=_CODES))
def watch(
    company: context.CompanyOption = None,
    url: Annotated[
        str | None, typer.Option(help="Only a subscription to this address counts; --repair creates it.")
    ] = None,
    every: Annotated[
        int, typer.Option(parser=_duration, metavar="DURATION", help="90s, 5m, 1h.", show_default="5m")
    ] = 300,
    repair: Annotated[bool, typer.Option("--repair", help="Create it again when it is missing or not Active.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Check once, for cron: 0 Active, 1 not, 3 not known.")] = False,
    as_json: context.Json = False,
) -> None:
    """Check the subscriptions repeatedly, and print each change once; Ctrl-C ends it.

    Run only one of these with --repair: two would each create one. For cron: watch --once --repair --url URL.
    """
    if url is not None:
        _check_address(url)
    # Without a handler the first process of a container ignores the signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DONE))
    with company_clients(company) as here:
        if url is not None:
            here.one()  # an address belongs to one company
        bootstrap.configure_log(here.settings, sys.stderr)
        rounds = Rounds(here, url, repair, as_json)
        while not once:
            rounds.check()
            time.sleep(every)
        raise typer.Exit(rounds.check())


class Rounds:
    """Checks every company in turn, and prints what has changed since the last round."""

    def __init__(self, here: CompanyClients, url: str | None, repair: bool, as_json: bool) -> None:
        path = here.settings.webhook_path
        self._watches = [SubscriptionWatch(client.company, client.upstream, path, url) for client in here.all]
        self._repair = repair
        self._as_json = as_json
        self._printed: dict[str, list[SubscriptionStatus]] = {}

    def check(self) -> int:
        """Check all companies and return the exit code of this round."""
        states = {self._one(watch).state for watch in self._watches}
        if states - {ACTIVE, REPAIRED, UNREACHABLE}:
            return FOUND
        return AWAY if UNREACHABLE in states else DONE

    def _one(self, watch: SubscriptionWatch) -> SubscriptionStatus:
        seen = [watch.check()]
        if self._repair and watch.can_repair(seen[0]):
            seen.append(watch.repair())
        slug, last = seen[0].company, seen[-1]
        if seen != self._printed.get(slug):
            for status in seen:
                _log_status(status)
                self._print(watch, status)
        # A repaired subscription is Active: to see it so in the next round is no change.
        self._printed[slug] = [watch.active()] if last.state == REPAIRED else seen
        return last

    def _print(self, watch: SubscriptionWatch, status: SubscriptionStatus) -> None:
        hint = status.advice or (advice(status.cause, WEBHOOK_PERMISSIONS) if status.cause else "")
        if self._repair and watch.can_repair(status):
            hint = "It is created again."
        elif self._repair and status.state == "missing":
            hint = "It cannot be created again, as its address is unknown: give --url."
        now = times.now()
        text = f"{times.short(now)} {status.company}: {status.state}, {status.detail}. {hint}".rstrip()
        console.result(text, {"at": now} | msgspec.structs.asdict(status) | {"advice": hint}, self._as_json)
        sys.stdout.flush()


def _log_status(status: SubscriptionStatus) -> None:
    company, state = status.company, status.state
    if state == ACTIVE:
        _log.info("subscription.active", company=company)
    elif state == REPAIRED:
        _log.warning("subscription.repaired", company=company)
    elif state in {UNREACHABLE, REPAIR_FAILED}:
        why = {"reason": status.cause, "http_status": status.http_status}
        _log.warning("subscription.check_failed", company=company, what=state, **why)
    else:
        _log.error("subscription.down", company=company, reason=state)


def _check_address(url: str) -> None:
    """Raise Stop unless upstream can send events there and nobody else can read them."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise Stop("URL is not an address.") from None
    if parts.scheme not in {"http", "https"} or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise Stop("URL is not a web address: it must start with https://.")
    if parts.scheme == "http" and host not in _LOOPBACK:
        raise Stop("URL must be https: every event carries the clientState.")
    if parts.username is not None or parts.fragment:
        raise Stop("URL must hold neither a user nor a fragment.")


def _new_client_state(
    settings: Settings,
    company: Company,
    url: str,
    same: list[Subscription],
    write_to: Path | None,
    reveal: bool,
    yes: bool,
) -> tuple[list[str], dict[str, Any]]:
    """Make a secret, write it to the file, and return the steps of the rotation: as lines, and as an object.

    `same`: the subscriptions of this address. Raises Stop, before anything is made, when the file must not be written.
    """
    if company.client_state_previous is not None:
        question = "A rotation is under way: CLIENT_STATE_PREVIOUS is set, and would be replaced. Begin another?"
        console.confirm(question, yes)
    new = SecretStr(secrets.token_urlsafe(_SECRET_BYTES))
    if write_to is not None:
        _check_file(write_to, (company.client_state, company.client_state_previous), yes)
        _write(write_to, new)
    found = _steps(settings, company, url, same, write_to)
    lines = ["Nothing is changed upstream yet. In this order no event is refused:"]
    lines += [f"{number}. {step}" for number, step in enumerate(found, 1)]
    view: dict[str, Any] = {"company": company.slug, "written_to": str(write_to) if write_to else None, "steps": found}
    if reveal:
        view["client_state"] = new.get_secret_value()
        lines.insert(0, f"New clientState: {new.get_secret_value()}")
    if write_to is not None:
        lines.insert(0, f"A new clientState is in {write_to}.")
    return lines, view


def _steps(
    settings: Settings, company: Company, url: str, same: list[Subscription], write_to: Path | None
) -> list[str]:
    several = settings.companies_file is not None
    place = f"[companies.{company.slug}] of COMPANIES_FILE: " if several else ""
    names = ["CLIENT_STATE", "CLIENT_STATE_PREVIOUS"]
    current, previous = (name.lower() if several else name for name in names)
    suffix = "_file" if several else "_FILE"
    new = f"{current}{suffix} = {write_to.absolute()}" if write_to else f"{current} = the new secret"
    which = f" --company {company.slug}" if several else ""
    deletes = [f"ota-receiver subscription delete {one.id}{which}" for one in same if one.id]
    return [
        f"{place}{previous} = the present {current}; {new}",
        "Restart the web processes and `subscription watch`: then both secrets are accepted.",
        f"ota-receiver subscription create {shlex.quote(url)}{which} --yes",
        *(deletes or ["Delete the old subscription: ota-receiver subscription list, and delete."]),
        f'When ota_events_by_secret_total{{secret="previous"}} has not changed for a day: remove {previous}.',
    ]


def _check_file(path: Path, in_use: Iterable[SecretStr | None], yes: bool) -> None:
    """Raise Stop if `path` must not be written: it exists and there is no `yes`, or it holds a secret in use."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise Stop(f"{path} exists and is not a file.")
    if not yes:
        raise Stop(f"{path} already exists: choose another file, or overwrite it with --yes.")
    try:
        held = path.read_bytes().strip()
    except OSError as error:
        raise Stop(f"{path} cannot be read ({type(error).__name__}).") from None
    if any(one is not None and one.get_secret_value().encode() == held for one in in_use):
        raise Stop(f"{path} holds a clientState in use, which the rotation still needs: choose another file.")


def _write(path: Path, secret: SecretStr) -> None:
    """Write the secret with mode 0600, replacing the file in one step; raises Stop."""
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


def _listed(client: CompanyClient, url: str, before: list[Subscription]) -> Subscription | None:
    """Return the new subscription as it is listed: the answer to its creation may be empty (upstream.md 3)."""
    known = {one.id for one in before}
    try:
        listed = for_settled_orders(client.upstream.subscriptions())
    except UpstreamError:
        return None
    return next((one for one in listed if one.id not in known and same_address(one.notification_url, url)), None)


def _find(here: CompanyClients, wanted: str) -> tuple[CompanyClient, Subscription, tuple[Subscription, ...]]:
    """Return the client of the company that has this subscription, the subscription, and all of that company."""
    for client in here.all:
        with _upstream_errors(client):
            listed = client.upstream.subscriptions()
        for one in listed:
            if guid(one.id) == wanted:
                return client, one, listed
    raise Stop(f"No subscription {wanted} found.", FOUND)


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
