"""What really happened to each order, kept apart from the ledger, and what must hold for the ledger after each step.

Steps are numbered within an interleaving; times are the ledger's, in ms.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

import hiredis
from redis.exceptions import NoScriptError, ResponseError

from app.ids import OrderKey
from app.ledger.redis import Redis
from app.ledger.work import Delivery, Fetch
from tests.lab import KEYS


class Lost(AssertionError):
    """An order was not fetched after its last settlement, or the ledger does not hold its newest content."""


@dataclass
class RunningFetch:
    """A fetch that a worker started at this step; `version` is upstream's answer once it was read.

    `repeatable`: it failed, or its worker is known to be dead; its settlement may be fetched again from `not_before`.
    """

    order: OrderKey
    fetch: Fetch
    step: int
    lease_ends: int
    version: int | None = None
    repeatable: bool = False
    not_before: int = 0

    def retry_from(self, time: int) -> None:
        self.repeatable, self.not_before = True, time


@dataclass
class RunningDelivery:
    """A revision that a sink is receiving."""

    order: OrderKey
    delivery: Delivery
    lease_ends: int


@dataclass
class Received:
    """What a sink has received of an order, and is receiving now."""

    delivered: int = 0
    delivery: RunningDelivery | None = None
    rejected: set[int] = field(default_factory=set)

    def complete(self, running: RunningDelivery, outcome: str) -> None:
        if self.delivery is running:
            self.delivery = None
        if outcome == "succeeded":
            self.delivered = max(self.delivered, running.delivery.revision)
        elif outcome in {"dead", "rejected"}:
            self.rejected.add(running.delivery.revision)


@dataclass
class OrderModel:
    """Upstream's version of an order, the steps of its settlements, and what was fetched and delivered of it."""

    order: OrderKey
    names: InitVar[Sequence[str]]
    sinks: dict[str, Received] = field(init=False)
    version: int = 0
    settled_at: list[int] = field(default_factory=list)
    fetched_at: int = -1
    stored_version: int | None = None
    stored_token: int = 0
    deleted: bool = False
    latest: RunningFetch | None = None
    last_timestamp: str = ""

    def __post_init__(self, names: Sequence[str]) -> None:
        self.sinks = {name: Received() for name in names}

    def start_fetch(self, running: RunningFetch, now: int) -> None:
        """Raises AssertionError for a second getOrder of the same settlement without a reason."""
        last = self.latest
        if last is not None:
            assert running.fetch.token > last.fetch.token, "a fencing token was used twice"
            if running.fetch.generation == last.fetch.generation:
                assert last.repeatable or last.lease_ends <= now, f"{running} repeats {last} for no reason"
                assert last.not_before <= now, f"{running} repeats {last} too early"
        self.latest = running

    def exhaust_crashes(self) -> None:
        """Raises AssertionError if the order became dead through crashes in fetches of an older settlement."""
        assert self.latest is not None
        assert self.latest.fetch.generation == len(self.settled_at), f"dead after {self.latest}: {self.settled_at}"

    def store(self, running: RunningFetch, *, settled: bool, deleted: bool = False) -> None:
        """Record that the ledger stored the answer of this fetch, or that the order is deleted upstream."""
        self.stored_token, self.deleted = running.fetch.token, deleted
        if not deleted:
            self.stored_version = running.version
        if settled:
            self.fetched_at = max(self.fetched_at, running.step)

    def check_fetched(self, content: bytes | None) -> None:
        """Raises Lost unless every settlement was fetched after it was accepted, and `content` is the newest."""
        missed = [step for step in self.settled_at if step > self.fetched_at]
        if missed:
            raise Lost(f"{self.order.member}: accepted at {missed}, fetched last at {self.fetched_at}")
        if self.settled_at and not self.deleted and content != b"%d" % self.version:
            raise Lost(f"{self.order.member}: the ledger holds {content!r}, upstream has version {self.version}")


NO_KEY, NEVER, EXPIRES = -2, -1, 1
"""PTTL of a key: there is none, it does not expire, it expires."""

_NUMBERS: Final = (
    "generation",
    "started_generation",
    "fetched_generation",
    "fencing_token",
    "stored_token",
    "revision",
)


class SinkRow(NamedTuple):
    """The delivery of one order to one sink as the ledger has it."""

    delivered: int
    dead: str
    due: int | None


class Row(NamedTuple):
    """One order as the ledger has it; `record`, `history`, `content`, `revisions`: NO_KEY, NEVER or EXPIRES."""

    generation: int
    started: int
    fetched: int
    token: int
    stored: int
    revision: int
    digest: str
    dead: str
    sinks: tuple[SinkRow, ...]
    due: int | None
    died_at: int | None
    record: int
    history: int
    content: int
    revisions: int

    @property
    def fetch_is_pending(self) -> bool:
        return self.fetched < self.generation

    def is_behind(self, sink: SinkRow) -> bool:
        return not sink.dead and sink.delivered < self.revision

    @property
    def all_expire(self) -> bool:
        """Tell whether every key of the order expires."""
        return self.record == self.history == EXPIRES and NEVER not in (self.content, self.revisions)

    @property
    def must_be_kept(self) -> bool:
        """Tell whether a fetch or a delivery is pending, or is a dead letter."""
        return self.fetch_is_pending or any(sink.dead or self.is_behind(sink) for sink in self.sinks)


class Audit:
    """Reads the orders with every script that the connection runs, and compares them with the step before."""

    def __init__(self, connection: SocketRedis, orders: Iterable[OrderKey], sinks: Sequence[str]) -> None:
        self._connection, self._orders, self._sinks = connection, tuple(orders), tuple(sinks)
        nothing = (SinkRow(0, "", None),) * len(sinks)
        self._empty = Row(0, 0, 0, 0, 0, 0, "", "", nothing, None, None, NO_KEY, NO_KEY, NO_KEY, NO_KEY)
        of_orders = [command for order in self._orders for command in _reads(order, sinks)]
        connection.follow([*of_orders, *_DEAD_LETTERS])
        self._each = len(_reads(self._orders[0], sinks))
        self.reset()

    def reset(self) -> None:
        """Expect an empty server."""
        self.rows = dict.fromkeys(self._orders, self._empty)

    def check(self, touched: Iterable[OrderKey]) -> None:
        """Raises AssertionError if a step about `touched` broke a promise, or changed another order."""
        answers = self._connection.followed
        for number, order in enumerate(self._orders):
            before, row = self.rows[order], _row(answers[number * self._each : (number + 1) * self._each])
            if row != before:
                assert order in touched, f"{order.member} was changed by a step about another order"
                self._check(before, row)
                self.rows[order] = row
        self._check_kinds(*answers[-len(_DEAD_LETTERS) :])

    def _check_kinds(self, kinds: list[bytes], dead: list[bytes], dead_deliveries: list[bytes]) -> None:
        """Raises AssertionError unless each dead letter, and nothing else, is in the list of its sink and reason."""
        expected: dict[str, dict[str, int]] = {}
        for member, score in _scores([*dead, *dead_deliveries]).items():
            order, _, sink = member.partition(" ")
            row = self.rows[OrderKey.of(order)]
            reason = row.sinks[self._sinks.index(sink)].dead if sink else row.dead
            expected.setdefault(f"{sink}|{reason}", {})[member] = score
        read = self._connection.execute_command
        names = {kind.decode() for kind in kinds} | expected.keys()
        found = {name: _scores(read("ZRANGE", KEYS.dead_by(name), 0, -1, "WITHSCORES")) for name in names}
        assert found == expected, f"the kinds of dead letters have {found}, not {expected}"

    def _check(self, before: Row, row: Row) -> None:
        assert row.fetched <= row.started <= row.generation, row
        assert row.stored <= row.token, row
        for name in ("generation", "started", "fetched", "token", "stored", "revision"):
            assert getattr(row, name) >= getattr(before, name), f"{name} fell: {before} -> {row}"
        assert (row.revision > before.revision) == (row.digest != before.digest), f"{before} -> {row}"
        assert row.revision <= before.revision + 1, f"{before} -> {row}"
        assert bool(row.dead) == (row.died_at is not None), f"record and list of dead letters differ: {row}"
        assert not row.dead or row.fetch_is_pending, f"dead, but no fetch is pending: {row}"
        if row.fetch_is_pending and not row.dead:
            assert row.due is not None, f"pending, but not in due: {row}"
        for had, sink in zip(before.sinks, row.sinks, strict=True):
            assert sink.delivered >= had.delivered, f"delivered fell: {before} -> {row}"
            if row.is_behind(sink):
                assert sink.due is not None, f"behind, but not on the clock of its sink: {row}"
        if row.must_be_kept:
            assert EXPIRES not in (row.record, row.history, row.content), f"pending, but a key expires: {row}"


def _reads(order: OrderKey, sinks: Sequence[str]) -> list[tuple[str, ...]]:
    of_sinks = [f"{sink}:{field}" for sink in sinks for field in ("revision", "dead")]
    return [
        ("HMGET", KEYS.record(order), *_NUMBERS, "digest", "dead", *of_sinks),
        *(("ZSCORE", KEYS.deliveries(sink), order.member) for sink in sinks),
        ("ZSCORE", KEYS.due, order.member),
        ("ZSCORE", KEYS.dead, order.member),
        ("PTTL", KEYS.record(order)),
        ("PTTL", KEYS.history(order)),
        ("PTTL", KEYS.content(order)),
        ("PTTL", KEYS.revisions(order)),
    ]


_DEAD_LETTERS: Final = (
    ("SMEMBERS", KEYS.dead_kinds),
    ("ZRANGE", KEYS.dead, 0, -1, "WITHSCORES"),
    ("ZRANGE", KEYS.dead_deliveries, 0, -1, "WITHSCORES"),
)


def _scores(flat: list[bytes]) -> dict[str, int]:
    return {member.decode(): int(score) for member, score in zip(flat[::2], flat[1::2], strict=True)}


def _row(answers: list[Any]) -> Row:
    record, *clocks, due, died_at, for_record, for_history, for_content, for_revisions = answers
    digest, dead, *of_sinks = record[len(_NUMBERS) :]
    sinks = zip(of_sinks[::2], of_sinks[1::2], clocks, strict=True)
    return Row._make(
        [
            *(int(value or 0) for value in record[: len(_NUMBERS)]),
            _text(digest),
            _text(dead),
            tuple(SinkRow(int(delivered or 0), _text(why), _ms(score)) for delivered, why, score in sinks),
            _ms(due),
            _ms(died_at),
            *(min(ms, EXPIRES) for ms in (for_record, for_history, for_content, for_revisions)),
        ]
    )


def _text(value: bytes | None) -> str:
    return (value or b"").decode()


def _ms(score: bytes | None) -> int | None:
    return None if score is None else int(float(score))


class SocketRedis(Redis):
    """A client of one socket, without pool and retry, which sends a command and waits for its answer; texts are bytes.

    The property test makes half a million small calls, and Redis's own client takes three times as long for each.

    The commands given to `follow` go with every script in one round trip; `followed` has their latest answers.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()
        self._following, self._followers = b"", 0
        self.followed: list[Any] = []
        self.execute_command("AUTH", address.password)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Return the raw answer; raises redis.ResponseError."""
        name, *values = args
        is_script = name == "EVALSHA"
        command = hiredis.pack_command((*name.split(), *values))
        self._socket.sendall(command + self._following if is_script else command)
        answer = self._answer()
        if is_script:
            self.followed = [self._answer() for _ in range(self._followers)]
        if isinstance(answer, hiredis.ReplyError):
            text = str(answer)
            raise NoScriptError(text) if text.startswith("NOSCRIPT") else ResponseError(text)
        return answer

    def follow(self, commands: Sequence[tuple[Any, ...]]) -> None:
        """Send these commands after every script from now on."""
        self._following, self._followers = b"".join(hiredis.pack_command(one) for one in commands), len(commands)

    def _answer(self) -> Any:
        while (answer := self._reader.gets()) is False:
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionError("the server closed the connection")
            self._reader.feed(received)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self.close()
