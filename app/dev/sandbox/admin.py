"""The admin API under `/_sandbox`: what the package's docstring lists, one function each.

Many orders at once, put straight into their status: what a load test or a chaos test starts from.

The counts of a run as the admin API shows them.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.dev.sandbox.company import Address, Company
from app.dev.sandbox.faults import Fault
from app.dev.sandbox.http import Refusal
from app.dev.sandbox.orders import Status
from app.dev.sandbox.settings import guid, timestamp
from app.dev.sandbox.submission import header, order_body, shells
from app.dev.sandbox.world import World

# Orders made between two looks at the sockets.
_STRIDE = 100
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Share = Annotated[float, msgspec.Meta(ge=0)]


class Bulk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is wanted.

    The company is named by `company_id` or by its address. `mix` gives shares: of 10 orders, {"Issued": 8,
    "Draft": 1, "Error": 1} makes exactly so many, shuffled by the seed. `order_ids` (instead of `count`) sets the
    ids. `events` is how often each is announced, at once; with `same_timestamp` these are exact duplicates.
    """

    company_id: str | None = None
    tenant: str = "sandbox"
    environment: str = "Sandbox"
    company: str = "Sandbox"
    partner_id: str | None = None
    count: _Count = 1
    order_ids: tuple[str, ...] = ()
    mix: dict[Status, _Share] = msgspec.field(default_factory=lambda: {"Issued": 1.0})
    items: tuple[str, ...] = ("31001",)
    quantity: Annotated[int, msgspec.Meta(ge=1)] = 1
    reference: str = "BULK"
    events: _Count = 0
    same_timestamp: bool = False


async def make(world: World, company: Company, wish: Bulk) -> list[dict[str, str]]:
    """Make the orders and return their ids and statuses; raises Refusal (400) for lines that cannot be."""
    partner_id = wish.partner_id or next(iter(sorted(company.partner_ids)), guid("partner", company.id))
    count = len(wish.order_ids) or wish.count
    book = world.book(company)
    made = []
    for number, status in enumerate(_statuses(wish.mix, count, world.seed)):
        reference = f"{wish.reference}-{len(book) + 1}-{number}"
        body = order_body(
            partner_id,
            reference,
            payment_reference="" if status == "Draft" else f"PAY-{number}",
            items=wish.items,
            quantity=wish.quantity,
        )
        top = header(body)
        order_id = wish.order_ids[number].lower() if wish.order_ids else None
        row = book.place(top, shells(body, top), order_id)
        if status != "Submitted":
            book.force(row, status)
        made.append({"order_id": row.order.order_id, "status": status})
        at = timestamp(world.settings.digits) if wish.same_timestamp else None
        for _ in range(wish.events):
            # A cancelled order was announced as what it was before: cancelling itself fires nothing.
            world.announce(company, row.order, "Issued" if status == "Cancelled" else status, at)
        if number % _STRIDE == _STRIDE - 1:
            await asyncio.sleep(0)
    return made


def _statuses(mix: dict[Status, float], count: int, seed: int) -> list[Status]:
    whole = sum(mix.values()) or 1
    # 0.29 of 100 is 28.999... in binary, and 29 are meant.
    statuses: list[Status] = [status for status, share in mix.items() for _ in range(int(count * share / whole + 1e-6))]
    statuses += [next(iter(mix), "Issued")] * (count - len(statuses))
    random.Random(seed).shuffle(statuses)  # noqa: S311 (a shuffle that the seed repeats, no secret)
    return statuses


def totals(world: World) -> dict[str, Any]:
    """Return all that can be said without naming an order."""
    tally, gates = world.tally, list(world.gates.values())
    throttled = sum((gate.refused for gate in gates), Counter(tally.throttled))
    statuses = Counter(row.order.status for company in world.companies for row in world.book(company))
    return {
        "operations": tally.operations,
        "throttled": {name: throttled[name] for name in ("window", "queue", "fault")},
        "active": sum(gate.active for gate in gates),
        "waiting": sum(gate.waiting for gate in gates),
        "most_active": max((gate.most_active for gate in gates), default=0),
        "most_waiting": max((gate.most_waiting for gate in gates), default=0),
        "orders": statuses,
        "settlements": tally.settled,
        "events": {
            "fired": tally.fired,
            "accepted": tally.accepted,
            "pending": world.deliveries.pending,
            "lost": tally.lost,
        },
        "deliveries": tally.codes,
        "paused": world.deliveries.paused,
    }


def order_rows(world: World, company_id: str | None) -> list[dict[str, Any]]:
    """Return a row for every order of a company (None: of all) that is or was there, or was asked for."""
    statuses = {
        (company.id, row.order.order_id): row.order.status for company in world.companies for row in world.book(company)
    }
    keys = dict.fromkeys([*statuses, *world.tally.orders])
    return [_row(world, key, statuses.get(key)) for key in keys if company_id is None or key[0] == company_id]


def _row(world: World, key: tuple[str, str], status: str | None) -> dict[str, Any]:
    counts = world.tally.orders.get(key)
    return {
        "company_id": key[0],
        "order_id": key[1],
        "status": status,
        "gets": counts.gets if counts else 0,
        "answered": counts.answered if counts else 0,
        "settlements": counts.settlements if counts else [],
        "fired": counts.fired if counts else 0,
        "accepted": counts.accepted if counts else 0,
    }


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
        wish = await _body(request, Bulk)
        return {"orders": await make(self._world, self._named(wish), wish)}

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

    def _named(self, wish: Bulk) -> Company:
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
