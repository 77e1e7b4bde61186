"""deploy/nginx.conf before the web process: valid, and with limits that are answered with their status."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from redis import Redis

from app.dev.processes import Process, free_port
from tests.eventually import eventually
from tests.lab import Lab
from tests.service import HOOK, Web, item, serving, settings_of_one_company

CONFIG = Path(__file__).parents[2] / "deploy/nginx.conf"
MAIN = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/errors;
events {{}}
http {{ {temporary} {server} }}
"""
SELF_SIGNED = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out all.pem"
)

pytestmark = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")


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

        def answers() -> bool:
            try:
                return client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        process.wait_until(answers, 20, "nginx answers")
        yield client


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
