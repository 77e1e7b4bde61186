"""The sink files on a real disk: each line whole and on it, files that belong to one process and day, a full disk."""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from rq.timeouts import JobTimeoutException

from app.sink_settings import FilesSink
from tests.samples import document, example_of
from workers.sinks import Context
from workers.sinks.build import build
from workers.sinks.contract import Sink, Unavailable
from workers.sinks.files import Files

DOCUMENT = document("order-issued")
LINE = DOCUMENT.encode() + b"\n"
UNUSED = cast("Context", None)


def declared(folder: Path) -> FilesSink:
    return FilesSink(name="archive", folder=folder)


def sink_of(folder: Path) -> Sink:
    return build([declared(folder)])["archive"]


def numbered(number: int) -> Any:
    return document("order-issued", revision=number)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def revisions(folder: Path) -> list[int]:
    """Return the revisions of all whole lines, repeats too."""
    lines = [line for path in files(folder) for line in path.read_bytes().split(b"\n")[:-1]]
    return [json.loads(line)["revision"] for line in lines]


def test_the_reader_of_the_page_gets_each_content_once_and_no_torn_line(tmp_path: Path) -> None:
    read = example_of("files")["read"]
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    for one in (DOCUMENT, document("order-draft", idempotency_key="other"), DOCUMENT):
        sink_of(tmp_path).deliver(one, UNUSED)
    with files(tmp_path)[0].open("ab") as file:
        file.write(bytes(50) + b"\n" + LINE[:50])

    known: set[str] = set()
    assert {one["idempotencyKey"] for one in read(tmp_path, today, known)} == {DOCUMENT.idempotency_key, "other"}
    assert list(read(tmp_path, today, known)) == []


def test_each_delivery_is_a_line_of_one_file_that_only_the_service_may_read(tmp_path: Path) -> None:
    sink = sink_of(tmp_path)

    sink.deliver(DOCUMENT, UNUSED)
    sink.deliver(DOCUMENT, UNUSED)

    (file,) = files(tmp_path)
    assert file.read_bytes() == LINE * 2
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.name.startswith(f"{datetime.now(UTC):%Y-%m-%d}-")


def test_each_day_has_a_new_file_and_a_clock_that_is_set_back_opens_none_again(tmp_path: Path) -> None:
    now = [datetime(2026, 11, 27, 23, 59, 59, 999_999, UTC)]
    sink = Files(declared(tmp_path), lambda: now[0])
    for number, at in enumerate((now[0], datetime(2026, 11, 28, tzinfo=UTC), now[0])):
        now[0] = at
        sink.deliver(numbered(number), UNUSED)

    assert sorted(path.name[:17] for path in files(tmp_path)) == [*["2026-11-27-235959"] * 2, "2026-11-28-000000"]
    assert sorted(revisions(tmp_path)) == [0, 1, 2]


def test_a_file_or_symbolic_link_that_is_there_is_never_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "name")
    target = tmp_path / "target"
    target.write_bytes(b"")
    (tmp_path / "2026-11-27-120000-name.jsonl").symlink_to(target)
    now = [datetime(2026, 11, 27, 12, tzinfo=UTC)]
    sink = Files(declared(tmp_path), lambda: now[0])

    with pytest.raises(Unavailable, match="File exists"):
        sink.deliver(DOCUMENT, UNUSED)
    now[0] += timedelta(seconds=1)
    sink.deliver(DOCUMENT, UNUSED)

    assert (target.read_bytes(), len(files(tmp_path))) == (b"", 2)


WRITER = """
import sys
from pathlib import Path
from tests.integration.test_sink_files import UNUSED, numbered, sink_of

sink = sink_of(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    sink.deliver(numbered(number), UNUSED)
print("delivered", flush=True)
sys.stdin.read() if sys.argv[4:] else None
"""
ROOT = Path(__file__).parents[2]


def test_two_processes_never_write_to_one_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    both = [subprocess.Popen([*command, *span], cwd=ROOT) for span in (("0", "50"), ("50", "100"))]

    assert [one.wait(20) for one in both] == [0, 0]

    assert [len(path.read_bytes().splitlines()) for path in files(tmp_path)] == [50, 50]
    assert sorted(revisions(tmp_path)) == list(range(100))


def test_a_kill_between_the_write_and_our_acknowledgement_leaves_the_line_and_a_repeat_adds_one(
    tmp_path: Path,
) -> None:
    """With the same key, in another file: that of the ended process is not opened again, whatever its last line is."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), "1", "2", "wait"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"delivered\n"
        process.kill()
    (of_the_dead,) = files(tmp_path)
    with of_the_dead.open("ab") as file:
        file.write(LINE[:100])  # killed within the write of a second line
    before = of_the_dead.read_bytes()

    sink_of(tmp_path).deliver(DOCUMENT, UNUSED)

    assert of_the_dead.read_bytes() == before == LINE + LINE[:100]
    assert revisions(tmp_path) == [1, 1]
    assert len(files(tmp_path)) == 2


FULL = """
import sys
from pathlib import Path
from tests.integration.test_sink_files import UNUSED, numbered, sink_of
from workers.sinks.contract import Unavailable

folder = Path(sys.argv[1])
filler, number = folder / "filler", 0
filler.write_bytes(bytes(100_000))
sink = sink_of(folder)
try:
    while True:
        sink.deliver(numbered(number), UNUSED)
        number += 1
except Unavailable as error:
    print(error.reason)
for _ in range(20):
    try:
        sink.deliver(numbered(number), UNUSED)
        number += 1
    except Unavailable:
        pass
filler.unlink()
sink.deliver(numbered(number), UNUSED)
for path in folder.glob("*.jsonl"):
    content = path.read_bytes()
    print("file", len(content), content.endswith(b"\\n"), content.count(b"\\n"))
print("acknowledged", number + 1)
"""


def test_on_a_full_disk_no_line_is_torn_and_the_next_one_is_written_when_there_is_room(tmp_path: Path) -> None:
    """A real small disk, which needs a mount namespace of its own."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    small = 'mount -t tmpfs -o size=200k disk "$0" && exec "$@"'
    if subprocess.run([*mount, small, tmp_path, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no small disk: this machine forbids `unshare --user --mount`")

    ended = subprocess.run(
        [*mount, small, tmp_path, sys.executable, "-c", FULL, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    reason, *found, last = ended.stdout.splitlines()
    lines = [line.split() for line in found]
    assert reason == "No space left on device"
    assert [one[2] for one in lines] == ["True"] * len(lines)
    assert last == f"acknowledged {sum(int(one[3]) for one in lines)}"
    assert len(lines) <= 3, "a disk that stays full gets no file for each attempt"


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Let no file of this process grow over `size`: a write that crosses it is cut, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("whole_lines", [0, 1, 3])
def test_a_line_that_was_cut_is_taken_back_and_never_swallows_the_next_one(tmp_path: Path, whole_lines: int) -> None:
    sink = sink_of(tmp_path)
    with limited(whole_lines * len(LINE) + 100):
        for number in range(1, whole_lines + 1):
            sink.deliver(numbered(number), UNUSED)
        with pytest.raises(Unavailable, match="File too large"):
            sink.deliver(numbered(9), UNUSED)
    sink.deliver(numbered(9), UNUSED)

    assert [path.read_bytes()[-1:] for path in files(tmp_path)] == [b"\n"] * len(files(tmp_path))
    assert sorted(revisions(tmp_path)) == [*range(1, whole_lines + 1), 9]
    assert len(files(tmp_path)) == (2 if whole_lines else 1), "a file without a line is removed"


def _remove_the_file(folder: Path) -> None:
    files(folder)[0].unlink()


def _replace_the_file(folder: Path) -> None:
    path = files(folder)[0]
    path.rename(folder / "taken")
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [_remove_the_file, _replace_the_file])
def test_a_line_in_a_file_that_was_taken_away_is_written_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    sink = sink_of(tmp_path)
    sink.deliver(numbered(1), UNUSED)
    harm(tmp_path)

    with pytest.raises(Unavailable, match="No such file or directory"):
        sink.deliver(numbered(2), UNUSED)
    sink.deliver(numbered(2), UNUSED)

    assert revisions(tmp_path) == [2]


def test_a_folder_that_is_gone_is_not_made_and_its_return_is_noticed(tmp_path: Path) -> None:
    """It is where a disk was mounted: a folder made there would fill the disk below."""
    folder = tmp_path / "mounted"
    sink = sink_of(folder)
    for _ in range(2):
        with pytest.raises(Unavailable, match="No such file or directory"):
            sink.deliver(DOCUMENT, UNUSED)
    folder.mkdir()
    sink.deliver(DOCUMENT, UNUSED)
    shutil.rmtree(folder)
    with pytest.raises(Unavailable, match="No such file or directory"):
        sink.deliver(DOCUMENT, UNUSED)
    folder.write_bytes(b"")
    with pytest.raises(Unavailable, match="Not a directory"):
        sink.deliver(DOCUMENT, UNUSED)


def test_a_time_limit_within_a_delivery_leaves_a_file_that_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the disk fails to sync: what the system holds of such a file is not trusted again."""
    sink = sink_of(tmp_path)
    sink.deliver(numbered(1), UNUSED)
    for number, error in enumerate((JobTimeoutException(), OSError(5, "canary"), KeyboardInterrupt()), 2):
        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", _raising(error))
            with pytest.raises(Unavailable if isinstance(error, OSError) else type(error)) as raised:
                sink.deliver(numbered(number), UNUSED)
        assert "canary" not in str(raised.value)
        sink.deliver(numbered(number), UNUSED)

    assert sorted(revisions(tmp_path)) == [1, 2, 3, 4]
    assert len(files(tmp_path)) == 4


def _raising(error: BaseException) -> Callable[[int], None]:
    def fail(_: int) -> None:
        raise error

    return fail


def test_a_line_and_the_name_of_its_file_are_on_the_disk_before_a_delivery_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync
    synced: list[int | str] = []

    def note(file: int) -> None:
        synced.append("folder" if os.path.samestat(os.fstat(file), tmp_path.stat()) else os.fstat(file).st_size)
        sync(file)

    monkeypatch.setattr(os, "fsync", note)
    sink = sink_of(tmp_path)
    sink.deliver(DOCUMENT, UNUSED)
    sink.deliver(DOCUMENT, UNUSED)

    assert synced == [len(LINE), "folder", 2 * len(LINE)]


def test_a_relative_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a whole path, from / on"):
        declared(Path("orders"))
