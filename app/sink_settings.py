"""The declared sinks: the table `[sinks.<name>]` of SINKS_FILE for each kind, and the short form of SINKS.

Each kind is one class here, and one file of the same name in workers/sinks/. docs/sinks.md explains them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from app.declared import Declared, tables, unknown_names, validated
from app.setting_values import AbsolutePath, BucketUrl, EndpointUrl, RedisUrl, Slug, Text, WebhookSecret

EVERY: Final = "all"
"""What commands take for every sink, so that no sink may have this name."""


class SinkSettings(Declared):
    """What every sink has. Its `name` is that of its table, or its whole specification in SINKS."""

    name: str
    kind: str
    companies: tuple[Text, ...] = Field(
        default=(), description="Companies whose orders it gets, by their names; all without it.", examples=["museum"]
    )
    statuses: tuple[Text, ...] = Field(
        default=(), description="Statuses of orders that it gets; all without it.", examples=["Issued"]
    )
    workers: int = Field(
        ge=1, le=64, default=2, description="Its worker processes in each pool: as many orders are delivered at once."
    )

    @property
    def is_short(self) -> bool:
        """Return whether the sink is an entry of SINKS."""
        return not self._origins

    def unwanted(self, company: str, status: str) -> str:
        """Return why the sink does not get an order of this company (slug) in this status, "" if it gets it."""
        if self.companies and company not in self.companies:
            return f"company {company}"
        return f"status {status}" if self.statuses and status not in self.statuses else ""


class PythonSink(SinkSettings):
    """A function of the user."""

    kind: Literal["python"] = "python"
    function: Text = Field(
        description="`package.module:function`, or `entry:NAME` of an installed package.",
        examples=["mypackage.orders:on_order"],
    )


class HttpsSink(SinkSettings):
    """POST to an HTTP endpoint, signed per Standard Webhooks."""

    kind: Literal["https"] = "https"
    allow_private: bool = Field(
        default=False, description="Whether the address may be a private, loopback or link-local one."
    )
    url: EndpointUrl = Field(
        description="Address of the endpoint, a secret as it may hold a token.",
        examples=["https://shop.example.com/hooks/orders"],
    )
    secret: WebhookSecret = Field(
        description="Secret that signs each request, as Standard Webhooks writes it.",
        examples=["the output of echo whsec_$(openssl rand -base64 32)"],
    )
    secret_previous: WebhookSecret | None = Field(
        default=None,
        description="The secret before: each request is signed with both during a rotation.",
        examples=["the secret until now"],
    )
    format: Literal["standard", "cloudevents"] = Field(
        default="standard", description="`standard`, or `cloudevents` for CloudEvents 1.0 in structured mode."
    )
    headers_file: Path | None = Field(
        default=None,
        description="File of further headers, one `Name: value` a line, such as `Authorization`.",
        examples=["/run/secrets/shop-headers"],
    )


class SqlSink(SinkSettings):
    """Tables in a database, by SQLAlchemy."""

    kind: Literal["sql"] = "sql"
    url: SecretStr = Field(
        description="Address of the database, as SQLAlchemy writes it.",
        examples=["postgresql+psycopg://user:password@host/database"],
    )


class RedisStreamSink(SinkSettings):
    """A stream of a Redis server."""

    kind: Literal["redis-stream"] = "redis-stream"
    url: RedisUrl = Field(description="Address of the server.", examples=["redis://:password@redis:6379/1"])
    stream: Text = Field(default="ota-orders", description="Key of the stream.")
    max_length: int = Field(ge=1, default=100_000, description="Entries about which the stream is trimmed to.")


class FilesSink(SinkSettings):
    """Files of JSON lines, one a day and process."""

    kind: Literal["files"] = "files"
    folder: AbsolutePath = Field(
        description="Folder of the files, which must exist.", examples=["/var/lib/ota-receiver/orders"]
    )


class ObjectSink(SinkSettings):
    """One object for each revision in S3, GCS or Azure."""

    kind: Literal["object"] = "object"
    url: BucketUrl = Field(
        description="Address of the bucket, and a prefix of the keys: `s3://`, `gs://` or `az://`.",
        examples=["s3://bucket/orders"],
    )
    allow_http: bool = Field(
        default=False, description="Whether the address that `AWS_ENDPOINT_URL` or its like names may be without TLS."
    )


KINDS: Final[dict[str, type[SinkSettings]]] = {
    "https": HttpsSink,
    "sql": SqlSink,
    "redis-stream": RedisStreamSink,
    "files": FilesSink,
    "object": ObjectSink,
    "python": PythonSink,
}


def _not_every(value: str) -> str:
    if value == EVERY:
        raise ValueError(f"the table's name must not be {EVERY}, which means every sink")
    return value


SinkName = Annotated[Slug, AfterValidator(_not_every)]


class _Named(Declared):
    """What of a table can be checked before its kind is known."""

    name: SinkName = Field(examples=["shop"])
    kind: Annotated[
        Literal["https", "sql", "redis-stream", "files", "object", "python"], BeforeValidator(str.lower)
    ] = Field(examples=["https"])


def setting_of(name: str) -> str:
    """Return the setting that declares the sink of this name: only a specification in SINKS has a colon."""
    return "SINKS" if ":" in name else "SINKS_FILE"


def of_specification(specification: str, workers: int = 2) -> PythonSink:
    """Return the sink of an entry of SINKS: `python:package.module:function` or `entry:NAME`."""
    return PythonSink(name=specification, function=specification, workers=workers)


def of_file(path: Path, problems: list[str]) -> Iterator[tuple[SinkSettings, str]]:
    """Yield each sink of the file and the place of its table; each problem gets a line in `problems`."""
    names = {name for kind in KINDS.values() for name in kind.model_fields if name != "name"}
    for table in tables("SINKS_FILE", "sinks", path, problems, example='kind = "https"', named_by="name", names=names):
        known = {name: value for name, value in table.values.items() if name == "kind"}
        named = validated(_Named, {**known, "name": table.name}, problems, table.places)
        if named is None:
            continue
        kind = KINDS[named.kind]
        problems += unknown_names(table, [name for name in kind.model_fields if name != "name"])
        given = {**table.values, "name": table.name, "kind": named.kind}
        if sink := validated(kind, given, problems, table.places):
            yield sink, table.place
