"""The whole service on a laptop: embedded Valkey, the sandbox, web and workers, as real processes on loopback."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal
from urllib.parse import urlsplit

import httpx

from app.dev import valkey
from app.dev.processes import PortTaken, Process, check_free, free_port
from app.dev.sandbox import process as sandbox_process
from app.dev.sandbox.process import Sandbox
from app.dev.sandbox.values import company_id
from app.settings import NAMES, Settings, parse
from workers.sinks.build import build
from workers.sinks.output import TRACEBACKS

TENANT: Final = "5d2c6b0e-3f1a-4a57-9d0e-0c4c5b7f1a11"
ENVIRONMENT: Final = "Sandbox"
COMPANY: Final = "CRONUS International Ltd."
PARTNER_ID: Final = "21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
CLIENT_STATE: Final = "secret_value_from_subscription_creation_mirrored"
API_KEY: Final = "key-of-the-sandbox"
"""Made up, and valid only at the sandbox of one run."""

OPS_PORT: Final = "8082"
"""Of the ops page, if it is free and an earlier start had no other."""

_READY_WITHIN: Final = 20.0
_OURS: Final = frozenset(name.upper() for name in NAMES)


@dataclass(frozen=True)
class Stack:
    """The running parts of the service. `variables`: the settings, of which the two passwords are for this run."""

    settings: Settings
    variables: dict[str, str]
    sandbox: Sandbox
    web: Process
    worker: Process

    @property
    def web_url(self) -> str:
        return f"http://{self.settings.host}:{self.settings.port}"

    @property
    def webhook_url(self) -> str:
        return self.web_url + self.settings.webhook_path

    @property
    def ops_url(self) -> str:
        return f"http://{self.settings.ops_host}:{self.settings.ops_port}/"


@contextlib.contextmanager
def start(
    folder: Path,
    *,
    port: int = 0,
    last: Mapping[str, str] = MappingProxyType({}),
    sandbox_options: Sequence[str] = (),
    sinks: Mapping[str, str] = MappingProxyType({}),
    tracebacks: Path | None = None,
) -> Iterator[Stack]:
    """Start all parts and stop them at the end; their data and logs go to `folder`. Main thread only (see Process).

    `port` is that of web. `last` are the variables of an earlier start, whose addresses the others keep if they are
    free. `sinks` has SINKS and SINKS_FILE of the workers; functions are also searched in the working directory.
    `tracebacks`: a file for the tracebacks of the sinks.
    Raises PortTaken, ValkeyUnavailable, ProcessEnded, TimeoutError, SettingsError.
    """
    if port:
        # The /readyz of another process would pass for that of our web process.
        check_free(port, "name another with --port")
    with contextlib.ExitStack() as parts:
        server = parts.enter_context(valkey.start(folder / "valkey", last.get("REDIS_URL", "")))
        sandbox_port = free_or(urlsplit(last.get("NP_BASE_URL", "")).port)
        sandbox = parts.enter_context(sandbox_process.start(port=sandbox_port, options=sandbox_options))
        port = port or free_port()
        ops_port = free_or(int(last.get("OPS_PORT", OPS_PORT)))
        variables = receiver_settings(sandbox.url) | {
            "REDIS_URL": server.url,
            "NP_PARTNER_ID": PARTNER_ID,
            "PORT": str(port),
            "OPS_PORT": str(free_port() if ops_port in (0, port) else ops_port),
            "OPS_TOKEN": secrets.token_urlsafe(12),
            "OPS_ACT_TOKEN": secrets.token_urlsafe(12),
            "LOG_FORMAT": "json",
            **sinks,
        }
        with contextlib.chdir(folder):  # the processes work there, and read relative paths from there
            settings = parse(variables)
        build(settings.declared_sinks)
        if sinks:
            # Commands that read them, such as `check`, search the functions too.
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
        if tracebacks:
            tracebacks.touch(mode=0o600)
        shown = {TRACEBACKS: str(tracebacks)} if tracebacks else {}
        web = parts.enter_context(_started("serve", folder / "web.log", variables))
        worker = parts.enter_context(_started("worker", folder / "worker.log", variables | shown))
        stack = Stack(settings, variables, sandbox, web, worker)
        web.wait_until(lambda: _is_ready(stack.web_url), _READY_WITHIN, "/readyz answers 200")
        worker.wait_for_line("pool.worker_started", _READY_WITHIN)
        yield stack


@contextlib.contextmanager
def ops_page(stack: Stack, folder: Path) -> Iterator[Process]:
    """Start the ops page of a stack and stop it at the end; its log goes to `folder`. Main thread only (see Process).

    Raises ProcessEnded or TimeoutError.
    """
    with _started("ops", folder / "ops.log", stack.variables) as process:
        process.wait_for_line("Application startup complete", _READY_WITHIN)
        yield process


def _started(command: Literal["serve", "worker", "ops"], log: Path, variables: Mapping[str, str]) -> Process:
    """Start a command with these settings, in the folder of its log, which begins anew."""
    # The caller's own settings are left out.
    environment = {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") not in _OURS}
    log.write_bytes(b"")
    return Process.start(
        [sys.executable, "-m", "app.cli", command], env=environment | {**variables}, cwd=log.parent, log=log
    )


def free_or(port: int | None) -> int:
    """Return the port if it is given and free, else 0, which stands for any free one."""
    with contextlib.suppress(PortTaken):
        check_free(port or 0, "")
        return port or 0
    return 0


def env_line(name: str, value: str) -> str:
    """Return a line NAME=value that a shell, our reader of `.env`, systemd and `docker --env-file` understand alike.

    With both kinds of quotes in it, or one and a backslash or a dollar, only a shell does.
    """
    if "'" not in value:
        return f"{name}='{value}'"
    return f'{name}="{value}"' if not set(value) & {*'"$`\\'} else f"{name}={shlex.quote(value)}"


def receiver_settings(sandbox_url: str) -> dict[str, str]:
    """Return the environment a receiver needs for a sandbox; nothing in it is secret."""
    return {
        "CLIENT_STATE": CLIENT_STATE,
        "NP_BASE_URL": sandbox_url,
        "NP_API_KEY": API_KEY,
        "NP_TENANT": TENANT,
        "NP_ENVIRONMENT": ENVIRONMENT,
        "NP_COMPANY": COMPANY,
        "NP_COMPANY_ID": company_id(TENANT, ENVIRONMENT, COMPANY),
    }


def _is_ready(web_url: str) -> bool:
    try:
        return httpx.get(f"{web_url}/readyz", trust_env=False, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
