"""The admin API under `/_sandbox`: what the package's docstring lists, one function each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.dev.sandbox import bulk
from app.dev.sandbox.company import Address, Company
from app.dev.sandbox.fault import Fault
from app.dev.sandbox.order import Status
from app.dev.sandbox.refusal import Refusal
from app.dev.sandbox.stats import order_rows, totals
from app.dev.sandbox.world import World

_T = TypeVar("_T")
_Handler = Callable[[Request], Awaitable[Any]]
_ENCODER = msgspec.json.Encoder()


class Settle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Put an order into a status, and announce that `events` times."""

    order_id: str
    status: Status
    company_id: str | None = None
    events: int = 0


class Fire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Announce an order again; `timestamp` None is now, "last" that of the last announcement."""

    order_id: str
    company_id: str | None = None
    times: int = 1
    timestamp: str | None = None
    status: str | None = None


class Switch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state a subscription is to have."""

    state: str


class Admin:
    """The handlers, over one world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def routes(self) -> list[Route]:
        """Return the routes, relative to `/_sandbox`."""
        table: list[tuple[str, str, _Handler]] = [
            ("GET", "/settings", self.settings),
            ("PATCH", "/settings", self.change_settings),
            ("GET", "/companies", self.companies),
            ("POST", "/companies", self.declare),
            ("GET", "/faults", self.faults),
            ("POST", "/faults", self.add_faults),
            ("PUT", "/faults", self.set_faults),
            ("DELETE", "/faults", self.lift_faults),
            ("DELETE", "/faults/{number:int}", self.lift_fault),
            ("GET", "/stats", self.stats),
            ("DELETE", "/stats", self.forget),
            ("GET", "/orders", self.orders),
            ("POST", "/orders", self.make_orders),
            ("POST", "/settle", self.settle),
            ("POST", "/fire", self.fire),
            ("GET", "/deliveries", self.deliveries),
            ("POST", "/pause", self.pause),
            ("POST", "/resume", self.resume),
            ("PATCH", "/subscriptions/{id}", self.switch),
        ]
        return [Route(path, _answering(handler), methods=[method]) for method, path, handler in table]

    async def settings(self, request: Request) -> Any:
        """Return the present settings."""
        return self._world.settings

    async def change_settings(self, request: Request) -> Any:
        """Change what the body names."""
        self._world.settings = self._world.settings.changed(await _body(request, dict[str, Any]))
        return self._world.settings

    async def companies(self, request: Request) -> Any:
        """Return the companies known, or the one at the address in the query."""
        names = ("tenant", "environment", "company")
        if all(name in request.query_params for name in names):
            return self._world.companies.at(Address(*(request.query_params[name] for name in names)))
        return list(self._world.companies)

    async def declare(self, request: Request) -> Any:
        """Declare a company."""
        return self._world.companies.declare(await _body(request, Company))

    async def faults(self, request: Request) -> Any:
        """Return the rules in force."""
        return self._world.faults.described()

    async def add_faults(self, request: Request) -> Any:
        """Add a rule, or several; return their numbers."""
        return [one.number for one in self._world.faults.add(await _fault_list(request))]

    async def set_faults(self, request: Request) -> Any:
        """Put a rule, or several, into force instead of all others; return their numbers."""
        return [one.number for one in self._world.faults.set(await _fault_list(request))]

    async def lift_faults(self, request: Request) -> Any:
        """Lift all rules."""
        return self._world.faults.set([])

    async def lift_fault(self, request: Request) -> Any:
        """Lift one rule."""
        self._world.faults.drop(request.path_params["number"])
        return self._world.faults.described()

    async def stats(self, request: Request) -> Any:
        """Return the totals."""
        return totals(self._world)

    async def forget(self, request: Request) -> Any:
        """Start counting anew."""
        self._world.tally.clear()
        for gate in self._world.gates.values():
            gate.forget()
        return totals(self._world)

    async def orders(self, request: Request) -> Any:
        """Return a row for every order that is or was there, or was asked for."""
        return order_rows(self._world, request.query_params.get("company_id"))

    async def make_orders(self, request: Request) -> Any:
        """Make orders without createOrder."""
        wish = await _body(request, bulk.Bulk)
        return {"orders": await bulk.make(self._world, self._named(wish), wish)}

    async def settle(self, request: Request) -> Any:
        """Put an order into a status."""
        wish = await _body(request, Settle)
        company, row = self._world.find(wish.order_id.lower(), wish.company_id)
        self._world.book(company).force(row, wish.status)
        for _ in range(wish.events):
            self._world.announce(company, row.order, wish.status, None)
        return row.order

    async def fire(self, request: Request) -> Any:
        """Announce an order again."""
        wish = await _body(request, Fire)
        company, payload, last = self._world.last_announced(wish.order_id.lower(), wish.company_id)
        if wish.status is not None:
            payload = msgspec.structs.replace(payload, status=wish.status)
        at = last if wish.timestamp == "last" else wish.timestamp
        return {"told": sum(self._world.repeat(company, payload, at) for _ in range(wish.times))}

    async def deliveries(self, request: Request) -> Any:
        """Return the latest POSTs to webhooks."""
        return list(self._world.tally.deliveries(int(request.query_params.get("since", "0"))))

    async def pause(self, request: Request) -> Any:
        """Stop sending webhooks."""
        self._world.deliveries.pause()
        return totals(self._world)

    async def resume(self, request: Request) -> Any:
        """Send webhooks again."""
        self._world.deliveries.resume()
        return totals(self._world)

    async def switch(self, request: Request) -> Any:
        """Set the state of a subscription."""
        wish = await _body(request, Switch)
        return self._world.switch(request.path_params["id"].lower(), wish.state)

    def _named(self, wish: bulk.Bulk) -> Company:
        if wish.company_id is None:
            return self._world.companies.at(Address(wish.tenant, wish.environment, wish.company))
        for company in self._world.companies:
            if company.id == wish.company_id:
                return company
        raise Refusal(404, "resource_not_found", "there is no such company")


def _answering(handler: _Handler) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler as Starlette wants it: its value as JSON, what it does not like as 4xx with the reason."""

    async def endpoint(request: Request) -> Response:
        status = 200
        try:
            value = await handler(request)
        except Refusal as refusal:
            status, value = refusal.status, {"code": refusal.code, "message": refusal.message}
        except ValueError as error:
            status, value = 400, {"code": "generic_error", "message": str(error)}
        return Response(_ENCODER.encode(value), status, media_type="application/json")

    return endpoint


async def _body(request: Request, kind: type[_T]) -> _T:
    return msgspec.json.decode(await request.body() or b"{}", type=kind)


async def _fault_list(request: Request) -> list[Fault]:
    given = msgspec.json.decode(await request.body(), type=Fault | list[Fault])
    return given if isinstance(given, list) else [given]
