"""Three thousand connections without a secret: nothing is stored, nothing fails, and memory does not grow."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Final

from tests.lab import KEYS, Lab
from tests.service import (
    COMPANY,
    HOOK,
    good,
    item,
    missing_of,
    post,
    rss_kb,
    serving,
    settings_of_one_company,
    statuses,
)

SEED: Final = 20261122
CONNECTIONS: Final = 3000
BODIES: Final = 11_000
AT_ONCE: Final = 60
PIPELINED: Final = 16
MOST_GROWTH_KB: Final = 5_000

TLS_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(200))
METHODS = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "PATCH", "PROPFIND", "get", "\x00")
PATHS = (HOOK, "/", "/%00", "//x", "http://x/", "*", "/\xe9", "/%ff%fe", "/healthz", f"{HOOK}?validationToken=<")


def unproven(random: Random) -> bytes:
    """Return an envelope, or nearly one, without a valid clientState."""
    one = item(clientState=random.choice(["wrong", "", None, 5, "\ud83d", ["canary-right-client-state"]]))
    body = json.dumps({random.choice(["values", "value"]): [one] * random.randint(1, 20)}).encode()
    if random.random() < 0.5:
        at = random.randrange(len(body))
        body = body[:at] + random.randbytes(random.randint(0, 4)) + body[at + random.randint(0, 3) :]
    return body


def unproven_post(random: Random) -> bytes:
    return post(unproven(random))


def garbage(random: Random) -> bytes:
    return random.choice([random.randbytes(random.randint(1, 3000)), TLS_HELLO[: random.randint(1, len(TLS_HELLO))]])


def changed(random: Random) -> bytes:
    """A request with a few bytes of it changed, anywhere."""
    request = bytearray(unproven_post(random))
    for _ in range(random.randint(1, 6)):
        request[random.randrange(min(len(request), 300))] = random.randrange(256)
    return bytes(request)


def cut(random: Random) -> bytes:
    request = unproven_post(random)
    return request[: random.randrange(len(request))]


def odd_request(random: Random) -> bytes:
    line = f"{random.choice(METHODS)} {random.choice(PATHS)} HTTP/{random.choice(['1.0', '1.1', '2.0', '9.9'])}"
    return f"{line}\r\nhost: {random.choice(['x', '', 'a b'])}\r\n\r\n".encode("latin-1")


def wrong_length(random: Random) -> bytes:
    lie = random.choice(["0", "1", "99999", "-1", "1e3", "+5", " 7", "99999999999999999999999", "5, 6", "", "0x10"])
    more = random.choice([[], ["content-length: 6"], ["transfer-encoding: chunked"]])
    return post(unproven(random), f"content-length: {lie}", *more)


def lying_chunks(random: Random) -> bytes:
    sizes = [b"5", b"ffffffffffffffff", b"-1", b"zz", b"", b"0", b"5;" + b"x" * 5000, b"00000000000000005", b" 5"]
    chunks = b"".join(
        random.choice(sizes) + b"\r\n" + random.randbytes(5) + b"\r\n" for _ in range(random.randint(1, 9))
    )
    return post(chunks + random.choice([b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b""]), "transfer-encoding: chunked")


def head_bomb(random: Random) -> bytes:
    many, long = random.choice([(10_000, 1), (99, 700), (3, 60_000), (1, 500_000), (200, 0)])
    return post(unproven(random), *[f"x{number}: {'y' * long}" for number in range(many)])


def pipelined(random: Random) -> bytes:
    kinds = (unproven_post, cut, garbage, odd_request, lying_chunks, changed)
    return b"".join(random.choice(kinds)(random) for _ in range(random.randint(2, 40)))


def too_large(random: Random) -> bytes:
    return post(b" " * random.choice([1_048_577, 1_500_000]), *random.choice([[], ["expect: 100-continue"]]))


def upgrade(random: Random) -> bytes:
    protocol = random.choice(["websocket", "h2c", "TLS/1.0"])
    return post(unproven(random), "connection: Upgrade", f"upgrade: {protocol}") + garbage(random)


KINDS: Final[tuple[Callable[[Random], bytes], ...]] = (
    *(unproven_post, garbage, changed, cut, odd_request, wrong_length, lying_chunks),
    *(head_bomb, pipelined, too_large, upgrade),
)


class Fuzzer:
    """Opens connections to the process and counts the statuses of all answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._random = Random(SEED)
        self.answers: Counter[int] = Counter()
        self.bodies = 0
        self.connections = 0

    async def send_all_kinds(self) -> None:
        """Open half of CONNECTIONS."""
        places = asyncio.Semaphore(AT_ONCE)

        async def one(kind: Callable[[Random], bytes]) -> None:
            async with places:
                await self._once(kind(self._random), self._random.random())

        await asyncio.gather(*(one(KINDS[number % len(KINDS)]) for number in range(CONNECTIONS // 2)))

    async def post_bodies(self, count: int) -> None:
        """Send bodies over ten connections, PIPELINED requests at a time."""
        await asyncio.gather(*(self._keep_posting(count // 10) for _ in range(10)))

    async def _once(self, sent: bytes, mood: float) -> None:
        """Send, then disconnect, or end the sending side and read all answers."""
        async with self._connected() as (reader, writer):
            writer.write(sent)
            if mood < 0.2:
                return
            with suppress(OSError):
                await writer.drain()
                writer.write_eof()
                self._count(await asyncio.wait_for(reader.read(), 30))

    async def _keep_posting(self, count: int) -> None:
        async with self._connected() as (reader, writer):
            for _ in range(count // PIPELINED + 1):
                writer.write(b"".join(unproven_post(self._random) for _ in range(PIPELINED)))
                for _ in range(PIPELINED):
                    answer = await reader.readuntil(b"\r\n\r\n")
                    answer += await reader.readexactly(missing_of(answer))
                    self._count(answer)
                    self.bodies += 1

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Open a connection; whatever happens, it ends with the block, also where the other side does not read."""
        self.connections += 1
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def _count(self, answers: bytes) -> None:
        self.answers.update(statuses(answers))


def test_without_a_secret_nothing_is_stored_fails_or_grows(redis_url: str, lab: Lab, tmp_path: Path) -> None:
    """test_connections.py and test_web.py have slow and endless senders."""
    with serving(tmp_path, settings_of_one_company(redis_url)) as web:
        fuzzer = Fuzzer(web.port)
        # The process keeps the memory that AT_ONCE large requests need; from then on it must not grow.
        asyncio.run(fuzzer.send_all_kinds())
        asyncio.run(fuzzer.post_bodies(BODIES // 2))
        early = rss_kb(web)
        asyncio.run(fuzzer.send_all_kinds())
        asyncio.run(fuzzer.post_bodies(BODIES // 2))
        growth = rss_kb(web) - early

        assert fuzzer.connections >= CONNECTIONS
        assert fuzzer.bodies >= BODIES
        assert fuzzer.answers.keys() >= {400, 401, 404, 405, 431}
        # A reset may destroy this answer, as the rest of the body is not read.
        assert any(line.get("status") == 413 for line in web.lines())
        assert not [status for status in fuzzer.answers if status >= 500]
        # Only the counts of rejected items are stored, and nothing of the items.
        counts = {KEYS.counters, f"ota:reconcile:{COMPANY}", f"ota:alert:{COMPANY}"}
        assert {name.decode() for name in lab.dump()} <= counts
        assert b"canary" not in lab.everything()
        assert growth < MOST_GROWTH_KB
        lines = web.lines()
        assert {line["event"] for line in lines if line["level"] in {"error", "critical"}} <= {"auth.alert"}
        requests = [line for line in lines if line["event"] == "request"]
        assert not [line for line in requests if line["status"] >= 500 or line.get("queued")]
        assert web.post(good()).status_code == 200
        assert len(lab.events()) == 1
        assert web.process.stop() == 0
