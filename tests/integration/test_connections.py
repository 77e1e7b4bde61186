"""What one connection may take of the web process: time, bytes, requests ahead; and what all of them together may."""

from __future__ import annotations

import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from redis import Redis

from app.dev.valkey import Valkey
from tests.eventually import eventually
from tests.integration.webserver import HOOK, Kept, Web, item, serving, settings_of_one_company
from tests.integration.wire import good, post, read_all, read_answer, rss_kb, statuses, talk

# The service with little patience and few seats.
HASTY = """
from app import bootstrap, settings
from app.web.server import Bounds
from app.web.server import Server
found = settings.load()
bootstrap.configure_log(found)
Server(bootstrap.web_app(found), found.host, found.port, Bounds(seats=20, head=0.3, flush=0.3, parting=0.3)).run()
"""

# As a login shell on Linux starts it: no more than 1024 open files, unless it asks.
FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sys.argv = ["ota-receiver", "serve"]
from app.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def web(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serving(tmp_path_factory.mktemp("web"), settings_of_one_company(valkey.url)) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = settings_of_one_company(valkey.url)
    with serving(tmp_path_factory.mktemp("hasty"), settings, [sys.executable, "-c", HASTY]) as running:
        yield running


@pytest.fixture(autouse=True)
def kept(redis_client: Redis) -> Kept:
    """What each test leaves in a Redis that was empty when it began."""
    return Kept(redis_client)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process, the client, open as many connections as it may."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 4000:
        pytest.skip("the hard limit of open files is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


class TestHeads:
    """A head has to come whole, soon, and within bounds."""

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (post(good(), *[f"x{number}: 1" for number in range(99)]), 431),
            (post(good(), *[f"x{number}: 1" for number in range(50_000)]), 431),
            (post(good(), "x: " + "y" * 65_536), 431),
            (post(good(), "x: " + "y" * 3_000_000), 431),
            (b"POST " + HOOK.encode() + b" HTTP/1.1\r\nx: " + b"y" * 200_000, 431),
            (b"GET /" + b"a" * 65_536 + b" HTTP/1.1\r\nhost: test\r\n\r\n", 431),
            (b"GET /" + b"a" * 3_000_000, 431),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
            (b"GET http://x HTTP/1.1\r\nhost: test\r\n\r\n", 400),
            (post(good(), "transfer-encoding: chunked", "content-length: 3"), 400),
            (post(b"zz\r\n", "transfer-encoding: chunked"), 400),
        ],
        ids=lambda value: repr(value)[:24] + str(len(value)) if isinstance(value, bytes) else "",
    )
    def test_what_is_out_of_bounds_is_4xx_and_ends_the_connection(
        self, web: Web, kept: Kept, sent: bytes, status: int
    ) -> None:
        assert statuses(talk(web, sent)) == [status]
        assert not kept.events()

    def test_a_head_within_bounds_is_taken(self, web: Web) -> None:
        fields = [f"x{number}: {'y' * 600}" for number in range(95)]

        assert statuses(talk(web, post(good(), *fields, "connection: close"))) == [200]

    def test_a_head_that_never_ends_is_408_however_busily_it_comes(self, hasty: Web) -> None:
        with hasty.connect() as connection:
            started = time.monotonic()
            connection.sendall(b"POST / HTTP/1.1\r\n")
            connection.settimeout(0.02)
            answer = b""
            while not answer:
                connection.sendall(b"x: y\r\n")
                with suppress(TimeoutError):
                    answer = connection.recv(65536)
                assert time.monotonic() - started < 3

        assert statuses(answer) == [408]

    @pytest.mark.parametrize("sent", [b"", b"\r\n\r\n"], ids=repr)
    def test_a_connection_without_a_request_is_closed_without_a_word(self, hasty: Web, sent: bytes) -> None:
        """A 408 might be taken for the answer to a request that is just being sent."""
        assert talk(hasty, sent) == b""

    @pytest.mark.parametrize("sent", [b"\r\n", b"POST / HTTP/1.1\r\n"], ids=repr)
    def test_between_two_requests_patience_is_as_short_once_something_came(self, hasty: Web, sent: bytes) -> None:
        with hasty.connect() as connection:
            connection.sendall(post(good()))
            assert statuses(read_answer(connection)) == [200]
            started = time.monotonic()
            connection.sendall(sent)

            assert statuses(read_all(connection)) in ([], [408])
            assert time.monotonic() - started < 3

    def test_a_body_that_nobody_wanted_and_never_ends_is_cut_off(self, hasty: Web) -> None:
        with hasty.connect() as connection:
            connection.sendall(post(b"", "content-length: 100000000", path="/nowhere"))
            assert statuses(read_answer(connection)) == [404]

            def cut_off() -> bool:
                try:
                    connection.sendall(b"x" * 1000)
                except ConnectionError:
                    return True
                return False

            eventually(cut_off, what="the connection is closed")


class TestTurns:
    """Requests are answered in turn, and what is wrong with a later one does not cost an earlier one its answer."""

    def test_requests_sent_ahead_are_answered_up_to_a_bound(self, web: Web, kept: Kept) -> None:
        answers = statuses(talk(web, post(good()) * 60))

        assert answers == [200] * (len(answers) - 1) + [429]
        assert len(answers) == 18

    @pytest.mark.parametrize("rest", [b"garbage\r\n\r\n", post(b"zz\r\n", "transfer-encoding: chunked")], ids=repr)
    @pytest.mark.parametrize("requests", [1, 2, 3])
    def test_rubbish_behind_good_requests_is_refused_after_their_answers(
        self, web: Web, kept: Kept, requests: int, rest: bytes
    ) -> None:
        sent = b"".join(post(good()) for _ in range(requests))

        assert statuses(talk(web, sent + rest)) == [200] * requests + [400]
        assert len(kept.events()) == requests

    def test_who_ends_its_side_after_a_request_is_answered(self, web: Web, kept: Kept) -> None:
        with web.connect() as connection:
            connection.sendall(post(good()) * 3)
            connection.shutdown(socket.SHUT_WR)

            assert statuses(read_all(connection)) == [200] * 3

    def test_a_refused_body_does_not_cost_the_sender_its_answer(self, web: Web) -> None:
        """Closing on unread bytes is a reset, which would destroy the 413: the sender would try for ever."""
        assert statuses(talk(web, post(b"x" * 3_000_000))) == [413]

    def test_another_protocol_is_not_spoken(self, web: Web) -> None:
        asked = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"

        assert statuses(talk(web, asked + b"\x81\x05hello")) == [404]

    def test_who_does_not_read_its_answers_is_dropped(self, hasty: Web) -> None:
        """It would hold its place for ever."""
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", hasty.port))
            connection.settimeout(5)
            request = b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: test\r\n\r\n"

            def reset() -> bool:
                try:
                    connection.sendall(request * 10)
                except (ConnectionError, TimeoutError):
                    return True
                return False

            eventually(reset, 20, what="the connection is dropped")


class TestCrowds:
    """However many come, memory is bounded and who has events to deliver gets through, or is told when to come back."""

    def test_idle_connections_give_way_to_new_ones(self, hasty: Web) -> None:
        with ExitStack() as crowd:
            for _ in range(60):
                crowd.enter_context(hasty.connect())

            assert statuses(talk(hasty, post(good(), "connection: close"))) == [200]

    def test_who_never_sent_anything_goes_before_who_rests_between_requests(self, hasty: Web) -> None:
        with ExitStack() as crowd, hasty.connect() as warm:
            warm.sendall(post(good()))
            assert statuses(read_answer(warm)) == [200]
            for _ in range(60):
                crowd.enter_context(hasty.connect())
            assert statuses(talk(hasty, post(good(), "connection: close"))) == [200]

            warm.sendall(post(good()))

            assert statuses(read_answer(warm)) == [200]

    @pytest.mark.usefixtures("many_files")
    def test_two_thousand_idle_connections_hinder_nobody(self, tmp_path: Path, valkey: Valkey) -> None:
        """Also where the process was started with 1024 open files."""
        settings = settings_of_one_company(valkey.url)
        with serving(tmp_path, settings, [sys.executable, "-c", FEW_FILES]) as web, ExitStack() as crowd:
            assert web.deliver(item())["queued"] == 1
            before = rss_kb(web)
            for number in range(2000):
                crowd.enter_context(web.connect()).sendall(b"POST / HTTP/1.1\r\n" if number % 2 else b"")
                if number % 200 == 0:
                    assert statuses(talk(web, post(good(), "connection: close"))) == [200]

            assert statuses(talk(web, post(good(), "connection: close"))) == [200]
            assert web.deliver(item())["queued"] == 1
            open_files = len(list(Path(f"/proc/{web.process.pid}/fd").iterdir()))
            assert 1100 < open_files < 1300
            assert rss_kb(web) - before < 30_000

    @pytest.mark.usefixtures("many_files")
    def test_one_request_too_many_is_503_and_told_when_to_come_back(self, web: Web, kept: Kept) -> None:
        with ExitStack() as crowd:
            slow = [crowd.enter_context(web.connect()) for _ in range(1000)]
            for connection in slow:
                connection.sendall(post(b"{", "content-length: 500"))

            def refused() -> bytes:
                answer = talk(web, post(good(), "connection: close"))
                assert statuses(answer) == [503]
                return answer

            answer = eventually(refused, what="the thousand are under way").lower()
            assert b"retry-after: 5\r\n" in answer
            assert b"connection: close\r\n" in answer
            assert b'"reason":"overloaded"' in answer
            assert web.http.get("/healthz").status_code == 200

        assert eventually(lambda: web.post(good()).status_code == 200, what="there is room again")
