"""Limits of one connection and of all together, of a web process and of nginx before it (deploy/nginx.conf)."""

from __future__ import annotations

import inspect
import json
import os
import resource
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.server import ServerState

from app.dev.processes import Process, free_port
from app.dev.valkey import Valkey
from app.ledger.redis import Redis
from app.web import server
from tests.eventually import eventually
from tests.lab import Lab
from tests.service import (
    HOOK,
    SELF_SIGNED,
    SERVE,
    Web,
    good,
    is_up,
    item,
    post,
    read_all,
    read_answer,
    rss_kb,
    serve_changed,
    serving,
    settings_of_one_company,
    statuses,
    talk,
    trickle,
)

pytestmark = pytest.mark.usefixtures("redis_client")

# Short time-outs and few connections.
HASTY = "from app.web import server; server.CONNECTIONS, server.STALL_SECONDS = 20, 0.3"

# As a login shell on Linux starts it: no more than 1024 open files, unless the process asks for more.
FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
"""


@pytest.fixture(scope="module")
def web(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serving(tmp_path_factory.mktemp("web"), settings_of_one_company(valkey.url)) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = settings_of_one_company(valkey.url)
    with serving(tmp_path_factory.mktemp("hasty"), settings, serve_changed(HASTY)) as running:
        yield running


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process, the client, open thousands of connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 4000:
        pytest.skip("the hard limit of open files is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def refuses(connection: socket.socket, sent: bytes) -> bool:
    """Return whether the other side has closed; raises TimeoutError if it does not read these bytes."""
    try:
        connection.sendall(sent)
    except ConnectionError:
        return True
    return False


def test_uvicorn_has_the_internals_that_the_server_uses() -> None:
    """A minor version of uvicorn may change any of them: app/web/server.py must then be read again."""
    protocol, cycle = httptools_impl.HttpToolsProtocol, httptools_impl.RequestResponseCycle
    overridden = {
        protocol: "connection_made connection_lost data_received eof_received pause_writing resume_writing"
        " on_message_begin on_headers_complete on_message_complete on_response_complete send_400_response"
        " _unsupported_upgrade_warning",
        uvicorn.Server: "handle_exit on_tick shutdown",
    }
    used: dict[Callable[..., object], str] = {
        protocol.__init__: "HttpRequestParser(self) lenient_data_after_close=True"
        " loop server_state connections transport flow pipeline cycle headers",
        protocol.on_message_begin: 'self.url self.headers "state":self.app_state.copy()',
        protocol.connection_made: "self.connections.add(self) self.flow",
        protocol.on_url: "self.url+=url",
        protocol.data_received: "self._unset_keepalive_if_required() self.send_400_response"
        " self._unsupported_upgrade_warning",
        protocol.on_headers_complete: "self.cycle=RequestResponseCycle( self.pipeline.appendleft",
        protocol.shutdown: "self.cycle.keep_alive=False",
        protocol._start_asgi_task: "self.config.reset_contextvars context=contextvars.Context()",
        cycle.__init__: "self.transport=transport keep_alive response_started response_complete",
        cycle.receive: 'self.transport.write(b"HTTP/1.1100Continue self.transport.is_closing()',
        cycle.send: 'self.transport.write(b"".join(content))'
        " ifnotself.keep_alive:self.transport.close()self.on_response()",
        cycle.run_asgi: "self.transport.close()",
        uvicorn.Server.startup: "config.http_protocol_class( self.servers",
        uvicorn.Server.main_loop: "asyncio.sleep(0.1) self.on_tick(counter)",
        uvicorn.Server.shutdown: "self.server_state.connections timeout_graceful_shutdown",
        ServerState.__init__: "connections default_headers",
    }
    for owner, names in overridden.items():
        assert set(names.split()) <= owner.__dict__.keys()
    for function, texts in used.items():
        source = "".join(inspect.getsource(function).split())
        assert not [text for text in texts.split() if text not in source], function
    assert httptools_impl.STATUS_LINE[431].startswith(b"HTTP/1.1 431 ")
    assert issubclass(server.Connection, protocol)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "::"])
def test_every_address_of_the_host_is_listened_on(host: str) -> None:
    """An address of IPv6 only would refuse IPv4 while `health` asks on IPv6 and is content."""
    port = free_port()
    listeners = server.listen(host, port)
    try:
        for address in {"localhost": ["127.0.0.1"], "::": ["127.0.0.1", "::1"]}.get(host, [host]):
            socket.create_connection((address, port), timeout=5).close()
        with pytest.raises(OSError, match="in use"):
            server.listen(host, port)
    finally:
        for one in listeners:
            one.close()


def test_a_port_that_is_taken_is_named_and_ends_serve_with_1(web: Web, valkey: Valkey, tmp_path: Path) -> None:
    env = {**os.environ, **settings_of_one_company(valkey.url), "PORT": str(web.port)}
    ended = subprocess.run(SERVE, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False)

    (line,) = [one for one in map(json.loads, ended.stdout.splitlines()) if one["event"] == "service.cannot_listen"]
    assert ended.returncode == 1
    assert line["reason"].startswith(f"HOST 127.0.0.1, PORT {web.port}: Address already in use")
    assert "Traceback" not in ended.stdout + ended.stderr


class TestHeads:
    """A head must arrive whole, in time and within its size."""

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
    def test_a_head_or_framing_out_of_bounds_is_refused(self, web: Web, lab: Lab, sent: bytes, status: int) -> None:
        """A reset may destroy the answer to a head that is larger than the buffers: only a proxy reads on."""
        with web.connect() as connection:
            refuses(connection, sent)
            answer = read_answer(connection)

        assert statuses(answer) == [status] or (not answer and len(sent) > 65_536)
        assert not lab.events()
        assert web.http.get("/healthz").status_code == 200

    def test_a_head_within_bounds_is_accepted(self, web: Web) -> None:
        fields = [f"x{number}: {'y' * 600}" for number in range(95)]

        assert statuses(talk(web, post(good(), *fields, "connection: close"))) == [200]

    @pytest.mark.parametrize("before", [1, 15], ids="after {} requests".format)
    def test_the_start_of_a_head_counts_without_the_requests_before_it(self, web: Web, before: int) -> None:
        """A client that pipelines more than a chunk may end each chunk in the middle of a head."""
        request = post(good() + b" " * (48_000 // before))
        begin, rest = request[:40], request[40:]
        with web.connect() as connection:
            connection.sendall(begin)
            for _ in range(3):
                web.process.pause()  # so that all is one chunk
                connection.sendall(rest + request * (before - 1) + begin)
                web.process.resume()
                assert [statuses(read_answer(connection)) for _ in range(before)] == [[200]] * before

    def test_a_head_that_never_ends_is_408_although_bytes_keep_coming(self, hasty: Web) -> None:
        assert statuses(trickle(hasty, b"POST / HTTP/1.1\r\n", b"x: y\r\n")) == [408]

    @pytest.mark.parametrize("sent", [b"", b"\r\n\r\n"], ids=repr)
    def test_a_connection_without_a_request_is_closed_without_an_answer(self, hasty: Web, sent: bytes) -> None:
        """The client could take a 408 for the answer to a request that it is just sending."""
        assert talk(hasty, sent) == b""

    @pytest.mark.parametrize(("sent", "answers"), [(b"\r\n", []), (b"POST / HTTP/1.1\r\n", [408])], ids=repr)
    def test_the_time_limit_of_a_head_holds_between_requests(self, hasty: Web, sent: bytes, answers: list[int]) -> None:
        with hasty.connect(post(good())) as connection:
            assert statuses(read_answer(connection)) == [200]
            started = time.monotonic()
            connection.sendall(sent)

            assert statuses(read_all(connection)) == answers
            assert time.monotonic() - started < 8

    def test_an_unwanted_body_that_never_ends_is_cut_off(self, hasty: Web) -> None:
        with hasty.connect(post(b"", "content-length: 100000000", path="/nowhere")) as connection:
            assert statuses(read_answer(connection)) == [404]

            eventually(lambda: refuses(connection, b"x" * 1000), what="the connection is closed")


class TestOrderOfAnswers:
    """A fault of a later request costs no earlier request its answer."""

    @pytest.mark.parametrize("rest", [[b"garbage\r\n\r\n"], [post(good()) for _ in range(40)]], ids=["garbage", "more"])
    def test_it_closes_after_the_answers_to_earlier_requests(self, web: Web, lab: Lab, rest: list[bytes]) -> None:
        answers = statuses(talk(web, b"".join([*(post(good()) for _ in range(3)), *rest])))

        assert answers == [200] * len(answers)
        assert 3 <= len(answers) <= 18
        assert len(lab.events()) == len(answers)

    def test_a_client_that_ends_its_side_after_a_request_is_answered(self, web: Web) -> None:
        with web.connect() as connection:
            connection.sendall(post(good()) * 3)
            connection.shutdown(socket.SHUT_WR)

            assert statuses(read_all(connection)) == [200] * 3

    def test_answers_with_and_without_a_body_follow_one_another_whole(self, web: Web) -> None:
        head, alive = (f"{method} /healthz HTTP/1.1\r\nhost: test\r\n".encode() for method in ("HEAD", "GET"))
        asked = post(good(), "expect: 100-continue")
        last = head + b"connection: close\r\n\r\n"

        with web.connect() as connection:
            connection.sendall(head + b"\r\n")
            answers = connection.recv(65536)  # it waits for no later request
            asking, end, body = asked.partition(b"\r\n\r\n")
            connection.sendall(asking + end)
            answers += connection.recv(65536)  # nor the leave to send a body for that body
            connection.sendall(body + alive + b"\r\n" + head + b"\r\n" + asked + last)
            answers += read_all(connection)

        first, *others = answers.split(b"HTTP/1.1 ")
        assert not first
        assert [other[:3] for other in others] == [b"200", b"100", b"200", b"200", b"200", b"100", b"200", b"200"]
        bodies = [other.partition(b"\r\n\r\n")[2] for other in others]
        assert [body[:1] for body in bodies] == [b"", b"", b"{", b"a", b"", b"", b"{", b""]
        assert all(body[-1:] in {b"", b"}", b"\n"} for body in bodies)

    @pytest.mark.parametrize("cut", [0, 40, 120, 200, 10_000], ids=lambda cut: f"at {cut}")
    @pytest.mark.parametrize("protocol", ["h2c", "websocket"])
    def test_a_request_that_asks_for_another_protocol_is_answered_as_plain_http(
        self, web: Web, lab: Lab, protocol: str, cut: int
    ) -> None:
        """`curl --http2` asks so with each request (RFC 9110 7.8)."""
        asked = post(good(), f"Upgrade: {protocol}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAM")
        with web.connect() as connection:
            for part in (asked[:cut], asked[cut:] + post(good(), "connection: upgrade, close", "upgrade: x")):
                connection.sendall(part)

            assert statuses(read_all(connection)) == [200, 200]
        assert len(lab.events()) == 2

    def test_a_tunnel_is_refused_and_what_follows_is_not_read(self, web: Web, lab: Lab) -> None:
        asked = b"CONNECT /x HTTP/1.1\r\nhost: test\r\n\r\n"

        assert statuses(talk(web, asked + post(good()))) in ([400], [404])
        assert not lab.events()

    def test_a_client_that_does_not_read_its_answers_is_disconnected(self, hasty: Web) -> None:
        """It goes on sending whole requests; that there is no more room for them is not the end."""
        # The answer repeats the token: few of them fill the buffers on the way.
        request = f"GET {HOOK}?validationToken={'a' * 20_000} HTTP/1.1\r\nhost: test\r\n\r\n".encode()
        unsent = request
        with hasty.connect(request) as connection:
            connection.setblocking(False)

            def is_closed() -> bool:
                nonlocal unsent
                try:
                    unsent = unsent[connection.send(unsent) :] or request
                except BlockingIOError:
                    return False
                except ConnectionError:
                    return True
                return False

            eventually(is_closed, 20, what="the connection is closed")


class TestManyConnections:
    """However many clients connect, memory is bounded, and a sender gets through or is asked to come back later."""

    def test_a_silent_connection_is_closed_before_one_that_waits_between_requests(self, hasty: Web) -> None:
        with ExitStack() as crowd, hasty.connect(post(good())) as warm:
            assert statuses(read_answer(warm)) == [200]
            for _ in range(60):
                crowd.enter_context(hasty.connect())
            with hasty.connect(post(good(), "connection: close")) as sender:
                assert statuses(read_all(sender)) == [200]

            warm.sendall(post(good()))

            assert statuses(read_answer(warm)) == [200]

    def test_a_new_sender_replaces_the_connection_that_has_waited_longest_for_a_request(self, hasty: Web) -> None:
        with ExitStack() as crowd:
            warm = []
            for _ in range(25):
                warm.append(crowd.enter_context(hasty.connect(post(good()))))
                assert statuses(read_answer(warm[-1])) == [200]

            eventually(lambda: refuses(warm[0], post(good())), what="the connection that waited longest is closed")

    @pytest.mark.usefixtures("many_files")
    def test_two_thousand_idle_connections_do_not_keep_out_a_sender(self, tmp_path: Path, valkey: Valkey) -> None:
        """Also where the process was started with 1024 open files."""
        settings = settings_of_one_company(valkey.url)
        with serving(tmp_path, settings, serve_changed(FEW_FILES)) as web, ExitStack() as crowd:
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
    def test_one_request_too_many_is_503_with_retry_after(self, web: Web) -> None:
        with ExitStack() as crowd:
            slow = [crowd.enter_context(web.connect()) for _ in range(1000)]
            for connection in slow:
                connection.sendall(post(b"{", "content-length: 500"))

            def refused() -> bytes:
                answer = talk(web, post(good(), "connection: close"))
                assert statuses(answer) == [503]
                return answer

            answer = eventually(refused, what="a thousand requests are under way").lower()
            assert b"retry-after: 5\r\n" in answer
            assert b"connection: close\r\n" in answer
            assert b'"reason":"overloaded"' in answer
            assert web.http.get("/healthz").status_code == 200

        assert eventually(lambda: web.post(good()).status_code == 200, what="requests are accepted again")


CONFIG = Path(__file__).parents[2] / "deploy/nginx.conf"
MAIN = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/errors;
events {{}}
http {{ {temporary} {server} }}
"""


@contextmanager
def proxied(web: Web, folder: Path) -> Iterator[httpx.Client]:
    """Run nginx with the deployed configuration before a web process; yield a client of it."""
    port = free_port()
    subprocess.run(SELF_SIGNED.split(), cwd=folder, check=True, capture_output=True)
    text = CONFIG.read_text()
    for shipped, ours in (
        ("127.0.0.1:8080", f"127.0.0.1:{web.port}"),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("listen [::]:443 ssl;", ""),
        ("/etc/letsencrypt/live/receiver.example.com/fullchain.pem", f"{folder}/all.pem"),
        ("/etc/letsencrypt/live/receiver.example.com/privkey.pem", f"{folder}/key.pem"),
        ("/var/log/nginx/ota-receiver.log", f"{folder}/access.log"),
    ):
        assert shipped in text
        text = text.replace(shipped, ours)
    paths = [f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, temporary=" ".join(paths), server=text))
    command = ["nginx", "-p", str(folder), "-e", str(folder / "errors"), "-c", str(folder / "nginx.conf")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr
    trust = ssl.create_default_context(cafile=folder / "all.pem")
    url = f"https://127.0.0.1:{port}"
    with (
        Process.start(command, log=folder / "nginx.log") as process,
        httpx.Client(base_url=url, verify=trust, trust_env=False, timeout=10) as client,
    ):
        process.wait_until(lambda: is_up(client, "/readyz"), 20, "nginx answers")
        yield client


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_an_event_passes_and_other_requests_are_answered(redis_url: str, redis_client: Redis, tmp_path: Path) -> None:
    with serving(tmp_path, settings_of_one_company(redis_url)) as web, proxied(web, tmp_path) as client:
        accepted = client.post(HOOK, json={"values": [item()]})
        refused = [
            client.post(HOOK, content=b"x" * 3_000_000),
            client.get("/", headers={"x": "y" * 70_000}),
            client.get("/other"),
        ]

        assert accepted.json()["queued"] == 1
        assert accepted.headers.get_list("x-request-id") == [accepted.json()["request_id"]]
        assert len(Lab(redis_client).events()) == 1
        assert [answer.status_code for answer in refused] == [413, 400, 404]
        assert all(answer.headers.get("x-request-id") for answer in refused)

        def logged() -> list[dict[str, object]]:
            lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
            return [line for line in lines if line["request_id"] == accepted.json()["request_id"]]

        (line,) = eventually(logged, what="the request is in nginx's log")
        assert (line["path"], line["status"], line["upstream_status"]) == (HOOK, 200, "200")
