"""The ops page as a browser gets it: its app behind the real server, on a socket of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import Final
from unittest.mock import patch

import httpx
from starlette.types import ASGIApp

from app import bootstrap, settings
from app.ops import overview
from app.web.server import Server, listen
from tests.eventually import eventually
from tests.service import as_another

READ: Final = "canary-ops-token"
ACT: Final = "canary-ops-act-token"
WHO: Final = "Ada Lovelace"


class OpsSite:
    """A running ops page. `url` has no slash at its end; `http` sends no password, each time from another address."""

    def __init__(self, url: str, http: httpx.Client) -> None:
        self.url = url
        self.http = http

    def get(self, path: str, who: str = WHO, password: str = READ, **headers: str) -> httpx.Response:
        """Return the answer of a page, as a reader gets it."""
        return self.http.get(path, auth=_basic(who, password), headers=headers)

    def read(self, path: str) -> str:
        """Return the HTML of a page, which must be there."""
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def act(self, path: str, form: Mapping[str, str], who: str = WHO, **headers: str) -> httpx.Response:
        """Return the answer of an action, as a form of the page sends it."""
        headers = {"origin": self.url, "sec-fetch-site": "same-origin", **headers}
        return self.http.post(path, data=form, auth=_basic(who, ACT), headers=headers)


def _basic(who: str, password: str) -> httpx.BasicAuth:
    return httpx.BasicAuth(who.encode(), password.encode())


@contextmanager
def ops_site(variables: Mapping[str, str], *, can_act: bool = True) -> Iterator[OpsSite]:
    """Serve the ops page with these settings until the block ends; it reads Redis anew for each request."""
    tokens = {"OPS_TOKEN": READ} | ({"OPS_ACT_TOKEN": ACT} if can_act else {})
    app = bootstrap.ops_app(settings.parse({**variables, **tokens}))
    with patch.object(overview, "FRESH_SECONDS", 0.0), site_of(app) as site:
        yield site


@contextmanager
def site_of(app: ASGIApp) -> Iterator[OpsSite]:
    """Serve an app of the ops page, with the server of the process."""
    listeners = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listeners[0].getsockname()[1]}"
    server = Server(app, "127.0.0.1", 0)
    thread = Thread(target=lambda: asyncio.run(server.serve(listeners)))
    with httpx.Client(base_url=url, trust_env=False, timeout=10, event_hooks={"request": [as_another]}) as http:
        thread.start()
        try:
            eventually(lambda: server.started, 10, what="the ops page listens")
            yield OpsSite(url, http)
        finally:
            http.close()
            server.should_exit = True
            thread.join(15)
