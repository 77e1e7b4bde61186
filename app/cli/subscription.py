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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import msgspec
import typer
from pydantic import Field, SecretStr, TypeAdapter, ValidationError

from app import bootstrap, settings, subscriptions, times
from app.cli import console
from app.cli.command import AWAY, DONE, FOUND, LOOPBACK, NO_ANSWER, Stop, command, commands, flags
from app.cli.context import WEBHOOK_PERMISSIONS, advice, chosen, note, trouble
from app.errors import RequestRejected, StoreUnavailable, Unavailable, UnreadableAnswer, UpstreamError
from app.explain.stores import slugs_of
from app.ids import guid
from app.ledger.redis import Redis, for_command, translated_errors
from app.setting_values import Seconds
from app.settings import Company, Settings
from app.subscriptions import SubscriptionMemory, SubscriptionStatus, SubscriptionWatch
from app.upstream.client import ChannelManager
from app.upstream.models import EVENT_NAME, Subscription

_CHANGE_SECONDS: Final = 5
"""After the start of a change until a pool looks at its result."""

_SECRET_BYTES: Final = 32
"""43 characters in base64, of the 50 that a subscription takes (upstream.md 3)."""

_CODES: Final = {AWAY: "Redis unavailable: nothing was changed", NO_ANSWER: "no usable answer from the Channel Manager"}
_ID: Final = "Its id, as `subscription list` shows it."
_CREATE: Final = "ota-receiver subscription create https://hooks.example.com/webhooks/ota-channel-manager"
_DELETE: Final = "ota-receiver subscription delete 6f1f0c1e-2b4d-4a57-9c53-0d9d7c1b2a3e"
_WATCH: Final = "ota-receiver subscription watch --repair --url https://hooks.example.com/webhooks/ota-channel-manager"

_seconds: Final = TypeAdapter(Annotated[Seconds, Field(ge=1)])

Client = tuple[Company, ChannelManager]

cli = commands(name="subscription", help="The webhook subscription at the Channel Manager.")


@contextmanager
def _open_clients() -> Iterator[tuple[Settings, list[Client]]]:
    """Open the client of the company that was chosen, else those of all; raises SettingsError, Stop."""
    bootstrap.configure_cli_log()
    found = settings.load()
    _, companies = chosen(found.companies, slugs_of(found.companies, {}))
    if not companies:
        raise Stop(f"No company {flags().company!r} in the settings.")
    with bootstrap.http(found) as http:
        yield found, [(one, bootstrap.channel_manager(found, one, http)) for one in companies]


def _only(clients: list[Client]) -> Client:
    """Return the only client; raises Stop when there are several."""
    if len(clients) > 1:
        slugs = ", ".join(sorted(company.slug for company, _ in clients))
        raise Stop(f"There are several companies. Choose one with --company: {slugs}.")
    return clients[0]


@contextmanager
def _upstream_errors(company: Company, *, changes: bool = False) -> Iterator[None]:
    """Turn an error of upstream into a Stop. With `changes` it says whether the change may have been made."""
    try:
        yield
    except UpstreamError as error:
        is_uncertain = changes and isinstance(error, Unavailable | UnreadableAnswer)
        unsure = " It may have been done: check with `ota-receiver subscription list` first." if is_uncertain else ""
        raise Stop(f"{trouble(company.slug, error, WEBHOOK_PERMISSIONS)}{unsure}", NO_ANSWER) from None


def _note_change(loaded: Settings, what: str, company: Company, about: str) -> None:
    """Write a change to the audit before it is made, and let a pool check after it.

    Raises StoreUnavailable, without which nothing may be changed.
    """
    with for_command(loaded.redis_url.get_secret_value(), loaded.key_prefix) as redis:
        note(redis, what, f"{company.slug}: {about}")
        SubscriptionMemory(redis, company.np_company_id).check_in(_CHANGE_SECONDS * 1000)


@command(cli, "ota-receiver subscription list", options="company", codes=_CODES)
def list_() -> None:
    """List all subscriptions and which secret their events carry. Also those for other events."""
    found: list[dict[str, object]] = []
    troubles: list[str] = []
    with _open_clients() as (_, clients):
        for one, upstream in clients:
            try:
                found += [_view(one, subscription) for subscription in upstream.subscriptions()]
            except UpstreamError as error:
                troubles.append(trouble(one.slug, error, WEBHOOK_PERMISSIONS))
    company = ("?company",) if len({one["company"] for one in found}) > 1 else ()
    columns = ("=id", *company, "state", "secret", (">address", "url"), ">event")
    console.listing(found, columns, dict, nothing="" if troubles else "No subscription.")
    if troubles:
        raise Stop("\n".join(troubles), NO_ANSWER)


@command(cli, _CREATE, f"{_CREATE} --new-client-state --write-to FILE", options="company yes who why", codes=_CODES)
def create(
    url: Annotated[str, typer.Argument(metavar="URL", help="Public https address of the webhook.")],
    new_client_state: Annotated[
        bool, typer.Option("--new-client-state", help="Only make a new secret, and show the steps of the rotation.")
    ] = False,
    write_to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for the new secret; it gets mode 0600.")
    ] = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Print the new secret.")] = False,
) -> None:
    """Subscribe URL to settled orders. The events will carry CLIENT_STATE of the settings.

    With --new-client-state nothing is subscribed yet: until the web processes have the new secret in their settings,
    they answer 401 to its events.
    """
    _check_address(url)
    if not new_client_state and (write_to or reveal):
        raise Stop("--write-to and --reveal need --new-client-state.")
    if new_client_state and not (write_to or reveal):
        raise Stop("Choose what happens to the new clientState: --write-to FILE, or --reveal to print it.")
    with _open_clients() as (loaded, clients):
        of, upstream = _only(clients)
        with _upstream_errors(of):
            ours = subscriptions.for_settled_orders(upstream.subscriptions())
        same = [one for one in ours if subscriptions.same_address(one.notification_url, url)]
        if not subscriptions.ends_in(url, loaded.webhook_path):
            console.remark(f"{subscriptions.shown_address(url)} does not end in WEBHOOK_PATH ({loaded.webhook_path}).")
            console.remark("Unless a proxy maps the path, every event is answered 404.")
        if new_client_state:
            _make_client_state(loaded, of, url, same, write_to, reveal)
            return
        if same:
            ids = ", ".join(one.id or "one without an id" for one in same)
            console.confirm(f"{subscriptions.shown_address(url)} is already subscribed, as {ids}. Subscribe it again?")
        _note_change(loaded, "subscription-create", of, subscriptions.shown_address(url))
        with _upstream_errors(of, changes=True):
            made = upstream.create_subscription(url, of.client_state)
        if made.id is None:  # the answer to a creation may be empty (upstream.md 3)
            known = {one.id for one in ours}
            with contextlib.suppress(UpstreamError):
                listed = subscriptions.for_settled_orders(upstream.subscriptions())
                new = (one for one in listed if one.id not in known)
                made = next((one for one in new if subscriptions.same_address(one.notification_url, url)), made)
    view = _view(of, made) | {"event": EVENT_NAME, "url": subscriptions.shown_address(url)}
    text = f"{of.slug}: {subscriptions.shown_address(url)} is subscribed to {EVENT_NAME} ({made.id or 'id unknown'})."
    console.result(text, view)


@command(cli, _DELETE, options="company yes who why", codes=_CODES)
def delete(subscription_id: Annotated[str, typer.Argument(metavar="ID", help=_ID)]) -> None:
    """Delete a subscription."""
    wanted = guid(subscription_id)
    if wanted is None:
        raise Stop(f"{subscription_id!r} is not a subscription id. {_ID}")
    with _open_clients() as (loaded, clients):
        for of, upstream in clients:
            with _upstream_errors(of):
                listed = upstream.subscriptions()
            one = next((one for one in listed if guid(one.id) == wanted), None)
            if one is not None:
                break
        else:
            raise Stop(f"No subscription {wanted} found.", FOUND)
        event = (one.event_name or "").casefold()
        others = [other for other in listed if other is not one and (other.event_name or "").casefold() == event]
        last = one.active and not any(other.active for other in others)
        warning = " It is the last Active one: no more events will arrive." if last else ""
        what = f"{one.event_name} to {subscriptions.shown_address(one.notification_url)}, {one.subscription_state}"
        console.confirm(f"Delete {wanted} of {of.slug} ({what})?{warning}")
        _note_change(
            loaded, "subscription-delete", of, f"{wanted} to {subscriptions.shown_address(one.notification_url)}"
        )
        with _upstream_errors(of, changes=True):
            try:
                upstream.delete_subscription(wanted)
            except RequestRejected as error:
                if error.reason == "subscription_not_found":
                    raise Stop(f"{wanted} is already deleted.", FOUND) from None
                raise
    console.result(f"{wanted} is deleted.", {"company": of.slug, "id": wanted, "deleted": True})


def _duration(text: str) -> int:
    try:
        return _seconds.validate_python(text)
    except ValidationError:
        raise typer.BadParameter("is not a duration such as 90s, 15m or 2h30m") from None


@command(cli, _WATCH, options="company who why", codes=_CODES)
def watch(
    url: Annotated[
        str | None,
        typer.Option(help="Only a subscription to this address counts, instead of WEBHOOK_URL; --repair creates it."),
    ] = None,
    every: Annotated[
        int,
        typer.Option(
            parser=_duration, metavar="DURATION", help="Time between two checks: 90s, 5m, 1h.", show_default="5m"
        ),
    ] = 300,
    repair: Annotated[
        bool, typer.Option("--repair", help="Create it again, once, when it is missing or not Active.")
    ] = False,
    once: Annotated[
        bool, typer.Option("--once", help="Check once, for cron. Exits 0: Active, 1: not Active, 6: unknown.")
    ] = False,
) -> None:
    """Check the subscriptions repeatedly, and print each change once.

    Ctrl-C ends it. The worker pools check too, and raise an alert; they repair nothing. After a repair that did not
    help, and within an hour after one that did, no other is made: by no watch on any machine. For cron: watch --once
    --repair --url URL.
    """
    if url is not None:
        _check_address(url)
    # Without a handler the first process of a container ignores the signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DONE))
    with contextlib.ExitStack() as stack:
        loaded, clients = stack.enter_context(_open_clients())
        if url is not None:
            _only(clients)  # an address belongs to one company
        bootstrap.configure_log(loaded, sys.stderr)
        address = url or loaded.webhook_url
        watches = [(of, SubscriptionWatch(of, client, loaded.webhook_path, address)) for of, client in clients]
        printed: dict[str, list[SubscriptionStatus]] = {}
        redis = stack.enter_context(bootstrap.worker_redis(loaded)) if repair else None
        while not once:
            _check(watches, redis, printed)
            time.sleep(every)
        raise typer.Exit(_check(watches, redis, printed))


def _check(
    watches: list[tuple[Company, SubscriptionWatch]], redis: Redis | None, printed: dict[str, list[SubscriptionStatus]]
) -> int:
    """Check every company, print what differs from `printed` and keep it there; return the exit code.

    With `redis`, which remembers repairs, it repairs what it can.
    """
    states: set[str] = set()
    for of, watch in watches:
        seen = [watch.check()]
        if redis is not None:
            seen += _repaired(redis, of, watch, seen[0])
        slug, state = seen[0].company, seen[-1].state
        if seen != printed.get(slug):
            for status in seen:
                subscriptions.log_status(status)
                _print(watch, status, redis is not None)
        # A repaired subscription is Active: to see it so in the next round is no change.
        printed[slug] = [watch.active()] if state == subscriptions.REPAIRED else seen
        states.add(state)
    if states - {subscriptions.ACTIVE, subscriptions.REPAIRED, subscriptions.UNREACHABLE}:
        return FOUND
    return NO_ANSWER if subscriptions.UNREACHABLE in states else DONE


def _repaired(
    redis: Redis, of: Company, watch: SubscriptionWatch, seen: SubscriptionStatus
) -> list[SubscriptionStatus]:
    """Return the result of a repair, or why there is none; [] if none is needed or possible."""
    memory = SubscriptionMemory(redis, of.np_company_id)
    try:
        with translated_errors(redis):
            if seen.state == subscriptions.ACTIVE:
                memory.works()
            if not watch.can_repair(seen):
                return []
            if began := memory.begin_repair():
                at = times.short(times.from_ms(began))
                return [
                    watch.not_repaired(f"it was repaired {at}, which did not last: not repeated", "repaired_before")
                ]
            note(redis, "subscription-repair", f"{of.slug}: {watch.url}, {seen.state}")
            return [watch.repair(memory)]
    except StoreUnavailable as error:
        if seen.state == subscriptions.ACTIVE:
            return []
        return [watch.not_repaired(f"not repaired, as Redis would not remember it: {error}", "redis_unavailable")]


def _print(watch: SubscriptionWatch, status: SubscriptionStatus, repair: bool) -> None:
    hint = status.advice or (advice(status.cause, WEBHOOK_PERMISSIONS) if status.cause else "")
    if repair and watch.can_repair(status):
        hint = ""
    elif repair and status.state == "missing":
        hint = "It cannot be created again, as its address is unknown: give --url."
    now = times.now()
    text = f"{times.short(now)} {status.company}: {status.state}, {status.detail}. {hint}".rstrip()
    console.result(text, {"at": now} | msgspec.structs.asdict(status) | {"advice": hint})


def _check_address(url: str) -> None:
    """Raise Stop unless upstream can send events there, and only the receiver can read them."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise Stop("URL is not an address.") from None
    if parts.scheme not in {"http", "https"} or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise Stop("URL is not a web address: it must start with https://.")
    if parts.scheme == "http" and host not in LOOPBACK:
        raise Stop("URL must be https: every event carries the clientState.")
    if parts.username is not None or parts.fragment:
        raise Stop("URL must hold neither a user nor a fragment.")


def _make_client_state(
    settings: Settings, company: Company, url: str, same: list[Subscription], write_to: Path | None, reveal: bool
) -> None:
    """Make a secret, write it to the file, and print the steps of the rotation.

    `same`: the subscriptions of this address. Raises Stop, before anything is made, when the file must not be written.
    """
    if company.client_state_previous is not None:
        console.confirm("A rotation is under way: CLIENT_STATE_PREVIOUS is set, and would be replaced. Begin another?")
    new = SecretStr(secrets.token_urlsafe(_SECRET_BYTES))
    if write_to is not None:
        in_use = filter(None, (company.client_state, company.client_state_previous))
        _write(write_to, new, [one.get_secret_value().encode() for one in in_use])
    found = _steps(company, url, same, write_to, f" --company {company.slug}" if settings.companies_file else "")
    lines = ["Nothing is changed upstream yet. In this order no event is refused:"]
    lines += [f"{number}. {step}" for number, step in enumerate(found, 1)]
    view: dict[str, Any] = {"company": company.slug, "written_to": str(write_to) if write_to else None, "steps": found}
    if reveal:
        view["client_state"] = new.get_secret_value()
        lines.insert(0, f"New clientState: {new.get_secret_value()}")
    if write_to is not None:
        lines.insert(0, f"A new clientState is in {write_to}.")
    console.result(lines, view)


def _steps(company: Company, url: str, same: list[Subscription], write_to: Path | None, which: str) -> list[str]:
    """Return the steps; the first fits where CLIENT_STATE comes from: a value is given once, as itself or as a file."""
    deletes = [f"ota-receiver subscription delete {one.id}{which}" for one in same if one.id]
    changes, previous = _changes(company, write_to)
    return [
        f"In {company.origin('client_state').place}: {'; '.join(changes)}.",
        "Restart the web processes and `subscription watch`: then both secrets are accepted.",
        f"ota-receiver subscription create {shlex.quote(url)}{which} --yes",
        *(
            deletes
            or ["Find the id of the old one with `subscription list`, and delete it with `subscription delete ID`."]
        ),
        f'When ota_events_by_secret_total{{secret="previous"}} has not changed for a day: remove {previous}.',
    ]


def _changes(company: Company, write_to: Path | None) -> tuple[list[str], str]:
    """Return how the settings change, and the name of the setting that then holds the previous secret."""
    origin = company.origin("client_state")
    is_table = origin.place.startswith("COMPANIES_FILE")
    setting = '{} = "{}"'.format if is_table else "{}={}".format

    def name(of: str, is_file: object) -> str:
        found = f"{of}_file" if is_file else of
        return found if is_table else found.upper()

    previous = name("client_state_previous", origin.file)
    changes = [f"rename {name('client_state', origin.file)} to {previous}"]
    if company.client_state_previous is not None:
        changes.insert(0, f"remove {name('client_state_previous', company.origin('client_state_previous').file)}")
    if write_to is not None:
        changes.append(f"add {setting(name('client_state', True), write_to.absolute())}")
        changes.append("the web processes must be able to read this file (in a container it must be mounted)")
    elif origin.file:
        changes.append(f"write the new secret to a file, and name it in {name('client_state', True)}")
    else:
        changes.append(f"add {setting(name('client_state', False), 'the new secret')}")
    return changes, previous


def _write(path: Path, secret: SecretStr, in_use: list[bytes]) -> None:
    """Write the secret with mode 0600, in one step.

    Raises Stop when the file exists and there is no --yes, when it holds a secret `in_use`, and when writing fails.
    """
    try:
        if os.path.lexists(path):
            if not path.is_file():
                raise Stop(f"{path} exists and is not a file.")
            if not flags().yes:
                raise Stop(f"{path} already exists: choose another file, or overwrite it with --yes.")
            if path.read_bytes().strip() in in_use:
                raise Stop(f"{path} holds a clientState in use, which the rotation still needs: choose another file.")
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            new = Path(folder, path.name)
            with open(os.open(new, os.O_CREAT | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
                file.write(secret.get_secret_value() + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    except OSError as error:
        raise Stop(f"{path} cannot be written ({type(error).__name__}).") from None


def _view(company: Company, one: Subscription) -> dict[str, object]:
    return {
        "company": company.slug,
        "id": one.id,
        "event": one.event_name,
        "version": one.event_version,
        "url": subscriptions.shown_address(one.notification_url),
        "state": one.subscription_state,
        "secret": subscriptions.secret_of(company, one),
        "changed": one.last_modified_date_time,
    }
