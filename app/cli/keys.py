"""The commands for keys of the API: create, list, revoke."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from app import times
from app.api.keys import NAME, SCOPES, ApiKey, ApiKeys
from app.cli import console, context
from app.cli.command import FOUND, Stop, command, commands
from app.cli.context import open_context
from app.ledger.feed import Feed

cli = commands(name="keys", help="Keys of the API: who may read orders and the feed.")


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise typer.BadParameter("is not 1 to 31 lower-case letters, digits, - and _")
    return text


def _scope(text: str) -> str:
    if text not in SCOPES:
        raise typer.BadParameter(f"is not {' or '.join(SCOPES)}")
    return text


@command(
    cli,
    "ota-receiver keys create --name billing --scope feed --why 'new billing service'",
    "ota-receiver keys create --name desk --scope orders:read --scope feed --json",
    options="who why",
)
def create(
    name: Annotated[
        str, typer.Option("--name", parser=_name, metavar="NAME", help="Who uses it; of the feed, the consumer.")
    ],
    scopes: Annotated[
        list[str], typer.Option("--scope", parser=_scope, metavar="|".join(SCOPES), help="What it allows; repeatable.")
    ],
    from_now: Annotated[
        bool, typer.Option("--from-now", help="Let a new consumer of the feed begin with what comes from now on.")
    ] = False,
) -> None:
    """Make a key and print it, alone on stdout. It is shown this once: Redis has only its digest.

    Keys of one name share the place of their consumer in the feed. To rotate a key, create another of the same name,
    use it, and revoke the old one. A new consumer begins with the oldest order that is kept, or --from-now.
    """
    if from_now and "feed" not in scopes:
        raise Stop("--from-now needs --scope feed.")
    allowed = tuple(one for one in SCOPES if one in scopes)
    with open_context() as here:
        if from_now and not Feed(here.redis).start_at_end(name):
            raise Stop(f"The consumer {name!r} has a place in the feed already: create its key without --from-now.")
        context.note(here.redis, "key-create", f"{name}: {', '.join(allowed)}")
        key_id, text = ApiKeys(here.redis).create(name, allowed)
    console.result(text, {"id": key_id, "name": name, "scopes": allowed, "key": text})
    console.remark(f"Key {key_id} of {name}. Keep it now: it is not shown again.")


@command(cli, "ota-receiver keys list")
def list_() -> None:
    """List the keys, also the revoked ones, oldest first."""
    with open_context() as here:
        keys = ApiKeys(here.redis)
        used = keys.used()
        found = [_view(key_id, key, used.get(key_id, 0)) for key_id, key in keys.all().items()]
    columns: tuple[console.Column, ...] = (
        "=id",
        "name",
        ("scopes", lambda one: tuple(one["scopes"])),
        "@created_at",
        "@last_used_at",
        "@revoked_at",
    )
    console.listing(found, columns, dict, nothing="There is no key. Make one: ota-receiver keys create")


@command(cli, "ota-receiver keys revoke 3f9c01ab --why 'left the team'", options="who why")
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="Short id, as `keys list` shows it.")]) -> None:
    """End a key, at once and for good. The place of its consumer in the feed stays."""
    with open_context() as here:
        keys = ApiKeys(here.redis)
        key = keys.all().get(key_id)
        if key is None or key.revoked_at:
            raise Stop(f"There is no valid key {key_id!r}. See: ota-receiver keys list", FOUND)
        context.note(here.redis, "key-revoke", f"{key.name}: {key_id}")
        keys.revoke(key_id)
    console.result(f"Key {key_id} of {key.name} is revoked.", {"id": key_id, "name": key.name, "revoked": True})


def _view(key_id: str, key: ApiKey, used_at: int) -> dict[str, Any]:
    """Return a key for machines, without its digest."""
    fields = msgspec.structs.asdict(key) | {"last_used_at": used_at}
    del fields["sha256"]
    at = {
        name: times.from_ms(fields[name]) if fields[name] else None
        for name in ("created_at", "last_used_at", "revoked_at")
    }
    return {"id": key_id} | fields | at
