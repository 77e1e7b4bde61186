"""What commands print: no personal data, no more than the terminal shows, and each error in one clear line."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace

from app.dev.sandbox.process import Sandbox
from app.dev.valkey import Valkey
from app.ledger.redis import Redis
from tests.command import Ended
from tests.eventually import eventually
from tests.lab import MUSEUM, PARTNER, SINK, VENUE, Lab, event_of, order
from tests.samples import sample

COMMAND: Final = (sys.executable, "-m", "app.cli")
READERS: Final = (
    ("orders", "list"),
    ("orders", "show", order(1).order_id),
    ("events", "list"),
    ("events", "replay", "--since", "1h", "--yes"),
    ("dead", "list"),
    ("dead", "requeue", "--all", "--yes"),
)
LISTS: Final = {
    ("orders", "list"): "No order matches.",
    ("events", "list"): "No event matches.",
    ("dead", "list"): "No dead letter matches.",
    ("replays", "list"): "No plans.",
    ("audit",): "The audit has no such entry.",
}
TABLES: Final = (*LISTS, ("reconcile",), ("subscription", "list"), ("status",), ("check",))
REFERENCE: Final = "CM-260601081502-9F3A"
GUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
PRINTING: Final = (
    ("orders", "list"),
    ("orders", "list", "--json"),
    ("orders", "explain", order(1).order_id),
    ("--help",),
)


@pytest.fixture
def filled(lab: Lab) -> Lab:
    """One dead order."""
    lab.accept(order(1))
    lab.dead_letter(order(1))
    return lab


class Terminal:
    """A command that runs in a terminal of so many columns."""

    def __init__(self, lab: Lab, *arguments: str, columns: int = 80) -> None:
        self._ours, theirs = pty.openpty()
        env = lab.env | {"COLUMNS": str(columns), "TERM": "xterm"}
        self._running = subprocess.Popen([*COMMAND, *arguments], env=env, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.shown = b""

    def wait_for(self, text: bytes) -> None:
        def is_shown() -> bool:
            if select.select([self._ours], [], [], 0.1)[0]:
                self.shown += os.read(self._ours, 4096)
            return text in self.shown

        eventually(is_shown, 30, what=f"{text!r} on the terminal")

    def answer(self, text: bytes) -> None:
        os.write(self._ours, text)

    def end(self) -> int:
        """Read the rest and return the exit code."""
        try:
            while part := os.read(self._ours, 4096):
                self.shown += part
        except OSError:  # how Linux reports that the other side is closed
            pass
        os.close(self._ours)
        return self._running.wait(30)


def lines(lab: Lab, *arguments: str, columns: int) -> list[str]:
    """Return what a terminal of so many columns shows after the command."""
    terminal = Terminal(lab, *arguments, columns=columns)
    assert terminal.end() == 0, terminal.shown
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.shown.decode()).splitlines()


def ended(lab: Lab, *arguments: str, stdout: Any) -> tuple[int, str]:
    """Return exit code and stderr of a command that prints to `stdout`."""
    done = subprocess.run([*COMMAND, *arguments], env=lab.env, stdout=stdout, stderr=subprocess.PIPE, timeout=60)
    return done.returncode, done.stderr.decode()


@pytest.fixture
def everything(connected: Lab, sandbox: Sandbox) -> Lab:
    """One company with something in each list: the settings name no other."""
    one = {"company_id": VENUE, "partner_id": PARTNER, "count": 1, "reference": REFERENCE}
    sandbox.admin("POST", "orders", one)
    hook = ("subscription", "create", "https://hooks.example.com/webhooks/ota-channel-manager", "--yes")
    assert connected.run_command(*hook, "--company", "venue").code == 0
    file = Path(connected.env["COMPANIES_FILE"])
    file.write_text(file.read_text().partition("[companies.museum]")[0] + f'np_partner_id = "{PARTNER}"\n')
    connected.accept_events(*(replace(event_of(order(n)), reference=REFERENCE) for n in (1, 2)))
    connected.dead_letter(order(1))
    connected.accept_and_fetch(order(3))
    connected.dead_letter_delivery(order(3))
    why = ("--why", "the venue is back, and all its gates are open again since this morning")
    for change in (("orders", "refetch", order(2).order_id), ("events", "replay", "--since", "1h", "--yes")):
        assert connected.run_command(*change, *why).code == 0
    return connected


def ids_of(ended: Ended) -> list[str]:
    """Return the ids and references that a command prints with --json, also those in a sentence."""
    names = ("id", "order_id", "reference", "plan", "selected")
    found = [str(one[name]) for one in ended.objects for name in names if one.get(name)]
    return [text for one in found for text in (one.split(":") if GUID.match(one) else [one] * (" " not in one))]


@pytest.mark.parametrize("columns", [80, 100, 200, None])
def test_no_table_breaks_an_id_or_is_wider_than_the_terminal(everything: Lab, columns: int | None) -> None:
    """People copy ids: they are whole, or their column is hidden and named. A pipe gets everything."""
    for arguments in TABLES:
        shown = everything.on_terminal(columns, *arguments) if columns else everything.run_command(*arguments)

        assert max(map(len, shown.out.splitlines())) <= (columns or 1000), shown.out
        ids = [one for one in ids_of(everything.run_command(*arguments, "--json")) if one != VENUE]
        missing = {one for one in ids if one not in shown.out}
        # Whatever yields, an order and its reference do not.
        assert {one for one in missing if GUID.match(one) or one == REFERENCE} == set(), shown.out
        assert ("Hidden" in shown.err and columns is not None) or not missing, shown.out
        assert " company " not in shown.out.partition("──")[0]


@pytest.mark.parametrize("columns", [40, 50, 60])
def test_the_sentence_above_facts_is_no_wider_than_the_terminal(everything: Lab, columns: int) -> None:
    shown = everything.on_terminal(columns, "status")
    sentence = shown.out.partition("\nalerts ")[0]

    assert " ".join(sentence.split()).startswith("No worker pool runs; 2 orders are pending")
    assert max(map(len, sentence.splitlines())) <= columns, shown.out


def test_a_table_that_does_not_fit_hides_what_is_least_needed_and_puts_the_error_below(everything: Lab) -> None:
    narrow = everything.on_terminal(80, "orders", "list")

    assert narrow.err == "Hidden for lack of room: status, wallets, tickets, coupons. --json shows all.\n"
    assert f"\n    error: {SINK}: ValueError\n" in narrow.out
    assert [line for line in narrow.out.splitlines() if order(2).order_id in line and REFERENCE in line] != []
    assert everything.on_terminal(200, "orders", "list").err == ""


def test_the_company_is_shown_as_soon_as_an_order_is_of_another_one(everything: Lab) -> None:
    everything.accept(order(4, MUSEUM))

    wide, page = everything.on_terminal(200, "orders", "list"), everything.run_command("orders", "list")

    assert wide.out.count(MUSEUM) == page.out.count(MUSEUM) == 1
    assert "venue" in wide.out


def test_a_real_terminal_is_filled_and_a_column_is_hidden_when_one_character_is_missing(filled: Lab) -> None:
    needed = max(len(line.rstrip()) for line in lines(filled, "events", "list", columns=180))

    assert not any("Hidden" in line for line in lines(filled, "events", "list", columns=needed))
    (hidden,) = (line for line in lines(filled, "events", "list", columns=needed - 1) if "Hidden" in line)
    assert "room: outcome." in hidden


@pytest.mark.parametrize("arguments", LISTS, ids=" ".join)
def test_an_empty_list_is_no_failure(lab: Lab, arguments: tuple[str, ...]) -> None:
    """So a script may list what it then handles."""
    for ended in (lab.run_command(*arguments), lab.run_command(*arguments, "--json")):
        assert (ended.code, ended.out, ended.err) == (0, "", f"{LISTS[arguments]}\n")


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_full_disk_under_stdout_is_one_line_and_exit_code_1(filled: Lab, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        assert ended(filled, *arguments, stdout=full) == (1, "Cannot write the output: No space left on device.\n")


@pytest.mark.parametrize("arguments", PRINTING[:-1], ids=" ".join)
def test_a_closed_output_pipe_is_exit_code_141(filled: Lab, arguments: tuple[str, ...]) -> None:
    """As shells report it; 1 would mean "not complete"."""
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        assert ended(filled, *arguments, stdout=theirs) == (141, "")
    finally:
        os.close(theirs)


@pytest.mark.parametrize(
    ("name", "value", "code"), [("maxmemory", "1mb", "OOM"), ("min-replicas-to-write", "1", "NOREPLICAS")]
)
def test_a_redis_without_writes_is_named(own_valkey: Valkey, tmp_path: Any, name: str, value: str, code: str) -> None:
    with Redis.from_url(own_valkey.url) as redis:
        lab = Lab(redis, own_valkey.url, tmp_path)
        lab.accept(order(1))
        redis.config_set(name, value)

        refused = lab.run_command("orders", "refetch", order(1).order_id)

    assert (refused.code, refused.out, len(refused.err.splitlines())) == (3, "", 1)
    assert f"refuses this ({code}): see `ota-receiver check`" in refused.err
    assert not [word for word in ("REDIS_URL", "memory") if word in refused.err]


@pytest.mark.parametrize(
    "url",
    [
        *(
            "redis://:qzx%2Fqzx%23%3F%40@127.0.0.1:1/0",
            "redis://qzx:qzx@qzx@127.0.0.1:1",
            "redis://:qzx\\qzx@[::1]:1",
        ),
        *("rediss://qzx:qzx%zzqzx@127.0.0.1:1/0", "unix://:qzx@/nowhere/socket?db=1"),
    ],
)
def test_no_part_of_user_and_password_is_shown(lab: Lab, url: str) -> None:
    shown = [lab.run_command(*arguments, REDIS_URL=url) for arguments in (("orders", "list"), ("check", "--json"))]

    assert [one.code for one in shown] == [3, 1]
    assert not [one for one in shown if "qzx" in one.out + one.err]


@pytest.mark.parametrize("arguments", [*READERS, ("events", "tail")], ids=" ".join)
def test_an_unavailable_redis_is_one_line_and_exit_code_3(lab: Lab, arguments: tuple[str, ...]) -> None:
    ended = lab.run_command(*arguments, REDIS_URL="redis://:hidden-password@127.0.0.1:1/0")

    assert (ended.code, ended.out, len(ended.err.splitlines())) == (3, "", 1)
    assert ("127.0.0.1:1" in ended.err, "hidden-password" in ended.err) == (True, False)


def test_a_wrong_password_and_wrong_settings_are_named(lab: Lab, redis_url: str) -> None:
    refused = lab.run_command("orders", "list", REDIS_URL=f"redis://:wrong@{redis_url.rpartition('@')[2]}")
    wrong = lab.run_command("orders", "list", REDIS_URL="", COMPANIES_FILE="/nowhere")
    database = lab.run_command("events", "tail", REDIS_URL=f"{redis_url.rpartition('/')[0]}/9999")
    protocol = lab.run_command("events", "tail", REDIS_URL=f"{redis_url}?protocol=3")

    assert (refused.code, len(refused.err.splitlines()), "password" in refused.err) == (3, 1, True)
    assert (database.code, len(database.err.splitlines()), "no database" in database.err) == (3, 1, True)
    assert (protocol.code, "REDIS_URL: has an unknown option" in protocol.err) == (2, True)
    assert (wrong.code, "REDIS_URL" in wrong.err, "COMPANIES_FILE" in wrong.err) == (2, True, True)


@pytest.mark.parametrize(
    ("words", "panels"),
    [
        ((), {"Run": "serve", "Look": "orders", "Repair": "reconcile", "Try": "dev"}),
        (("orders",), {"Look": "explain", "Repair": "cancel"}),
        (("events",), {"Look": "tail", "Repair": "replay"}),
        (("dead",), {"Look": "show", "Repair": "drop"}),
        (("orders", "list"), {}),
        (("status",), {}),
    ],
)
def test_h_shows_the_help_with_the_commands_by_what_they_are_for(
    lab: Lab, words: tuple[str, ...], panels: dict[str, str]
) -> None:
    short, long = lab.run_command(*words, "-h"), lab.run_command(*words, "--help")

    assert (short.code, short.out, short.err) == (0, long.out, "")
    shown = dict(re.findall(r"^(\w+):\n((?:  .*\n)+)", short.out.partition("--help")[2], re.MULTILINE))
    assert shown.keys() == panels.keys()
    assert [name for panel, name in panels.items() if not re.search(rf"^  {name} ", shown[panel], re.MULTILINE)] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("orders", "list", "--since", "monday"),
        ("orders", "list", "--state", "lost"),
        ("orders", "list", "--limit", "0"),
        ("events", "list", "--limit", "9" * 20),
        ("orders", "list", "--since", f"{'9' * 20}d"),
        ("events", "replay", "--since", "1h", "--rate", "1e400"),
        ("dev", "--port", "65536"),
        ("simulate", "--patience", "9" * 400),
        ("orders", "list", "--company", "unknown"),
        ("orders", "show"),
        ("no-such-command",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(lab: Lab, arguments: tuple[str, ...]) -> None:
    wrong = lab.run_command(*arguments)

    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_on_a_terminal_a_question_is_asked_and_no_changes_nothing(lab: Lab, answer: bytes, code: int) -> None:
    lab.accept_and_fetch(order(1))
    terminal = Terminal(lab, "events", "replay", "--since", "1h", "--force")
    terminal.wait_for(b"[y/N]")
    assert b"Fetch 1 order again" in terminal.shown

    terminal.answer(answer)

    assert terminal.end() == code
    assert lab.queued("backfill") == [order(1).order_id] * (1 - code)


CANARY: Final = "canary"
SHOWN: Final = frozenset(
    """
    orderId status partnerId sellToOrderReference buyFromOrderReference sellToLanguage receivedAt jobId itemNumber
    description visitDate visitTime issuedAt currencyCode type
    """.split()  # noqa: SIM905  # as in app/explain/mask.py
)
"""Texts of an order that ops need: its ids and references, and what was sold."""

FETCHED, ERROR, DEAD = order(1), order(2), order(3)


@pytest.fixture
def marked(connected: Lab, sandbox: Sandbox) -> Lab:
    """Orders in every state, their content full of canaries, and two more in the list, of guest@example.com."""
    sandbox.admin("POST", "orders", {"company_id": VENUE, "partner_id": PARTNER, "count": 2, "reference": "WEB"})
    connected.change_companies("[companies.venue]", f'[companies.venue]\nnp_partner_id="{PARTNER}"')
    connected.accept(FETCHED, ERROR, DEAD)
    body = json.loads(sample("order-issued"))
    message = "No stock; mail canary-guest@example.com about it"
    for one, status in ((FETCHED, "Issued"), (ERROR, "Error")):
        changed = {"orderId": one.order_id, "status": status, "statusMessage": message, "newField": CANARY}
        connected.fetch_and_store(one, **_marked(body) | changed)
    connected.dead_letter_delivery(ERROR)
    connected.dead_letter(DEAD)
    return connected


def _marked(part: Any, name: str = "") -> Any:
    """Put a canary into every text that must not be shown."""
    if isinstance(part, dict):
        return {key: _marked(value, key) for key, value in part.items()}
    if isinstance(part, list):
        return [_marked(one, name) for one in part]
    return f"{CANARY}-{name}-0123456789" if isinstance(part, str) and part and name not in SHOWN else part


def test_no_command_shows_a_guest_a_ticket_or_a_link(marked: Lab) -> None:
    (event_id, *_) = [event["id"] for event in marked.run_command("events", "list", "--json").objects]
    commands = [
        *(("orders", command, one.order_id) for command in ("show", "explain") for one in (FETCHED, ERROR, DEAD)),
        ("orders", "list"),
        ("orders", "refetch", FETCHED.order_id),
        ("orders", "erase", FETCHED.order_id, "--dry-run"),
        ("events", "list"),
        ("events", "show", event_id),
        ("events", "replay", "--order", FETCHED.order_id, "--force", "--dry-run"),
        ("replays", "list"),
        ("dead", "list"),
        ("dead", "show", DEAD.order_id),
        ("dead", "show", ERROR.order_id),
        ("dead", "requeue", "--all", "--dry-run"),
        ("reconcile",),
    ]

    ended = marked.run_commands([(*command, *more) for command in commands for more in ((), ("--json",))])

    printed = [one.out + one.err for one in ended]
    assert all(printed)
    assert [one.err for one in ended if one.code > 1] == []
    secrets = (CANARY, "jane doe", "guest@example.com")
    # All these texts are there to be found.
    assert CANARY in marked.run_command("orders", "show", FETCHED.order_id, "--reveal").out
    assert [text for text in printed if any(word in text.lower() for word in secrets)] == []


def test_control_codes_of_upstream_do_not_reach_the_terminal_in_a_question_or_an_error(lab: Lab) -> None:
    lab.accept_and_fetch(order(1), "order-error", status="Bad\x1b[2J")
    cancel = ("orders", "cancel", order(1).order_id)

    terminal = Terminal(lab, *cancel)
    terminal.wait_for(b"[y/N]")
    terminal.answer(b"n\n")
    refused = lab.run_command(*cancel)

    assert (terminal.end(), refused.code) == (1, 2)
    question = "last known status Bad\N{REPLACEMENT CHARACTER}[2J"
    assert (question in terminal.shown.decode(), b"\x1b" in terminal.shown) == (True, False)
    assert (question in refused.err, "\x1b" in refused.err) == (True, False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_the_terminal_cannot_encode_is_replaced(lab: Lab, encoding: str) -> None:
    lab.accept_and_fetch(order(1), "order-error", statusMessage="Ζωο \N{GRINNING FACE}")

    page, raw, unknown = (
        lab.run_command(*arguments, PYTHONIOENCODING=encoding)
        for arguments in (
            ("orders", "show", order(1).order_id),
            ("orders", "show", "--json", order(1).order_id),
            ("orders", "show", "Ζωο"),
        )
    )

    assert (page.code, "??? ?" in page.out) == (0, True)
    assert "Ζωο \N{GRINNING FACE}" in str(raw.objects)
    assert (unknown.code, "???" in unknown.err) == (1, True)
