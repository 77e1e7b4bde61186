"""The admin API under `/_sandbox`, as the package's docstring lists it: one handler per route."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.dev.sandbox.companies import Address, Company
from app.dev.sandbox.faults import Fault
from app.dev.sandbox.http import Refusal
from app.dev.sandbox.orders import Status
from app.dev.sandbox.settings import Count
from app.dev.sandbox.submission import Submission, order_body
from app.dev.sandbox.values import guid
from app.dev.sandbox.world import World

# Orders made before other calls are served.
_STRIDE = 100
_T = TypeVar("_T")
_Share = Annotated[float, msgspec.Meta(ge=0)]
_Handler = Callable[[Request], Awaitable[Any]]
_ENCODER = msgspec.json.Encoder()


class Bulk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Orders to make without createOrder, put straight into their status.

    `company_id` or the address names the company. `mix` gives shares: {"Issued": 8, "Draft": 1, "Error": 1} with
    `count` 10 makes exactly these, shuffled by the seed. `order_ids` (instead of `count`) sets the ids. Each order is
    announced `events` times, at once.
    """

    company_id: str | None = None
    tenant: str = "sandbox"
    environment: str = "Sandbox"
    company: str = "Sandbox"
    partner_id: str | None = None
    count: Count = 1
    order_ids: tuple[str, ...] = ()
    mix: dict[Status, _Share] = msgspec.field(default_factory=lambda: {"Issued": 1.0})
    items: tuple[str, ...] = ("31001",)
    reference: str = "BULK"
    events: Count = 0


class Settle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order and the status it gets."""

    order_id: str
    status: Status
    company_id: str | None = None


class Fire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order and how often its event is sent; without `timestamp` each event is a new one."""

    order_id: str
    company_id: str | None = None
    times: Count = 1
    timestamp: Literal["last"] | None = None


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state a subscription gets."""

    state: str


class Admin:
    """The handlers."""

    def __init__(self, world: World) -> None:
        self._world = world

    def routes(self) -> list[Route]:
        """Return the routes, relative to `/_sandbox`."""
        table: list[tuple[str, str, _Handler]] = [
            ("GET", "/settings", self._settings),
            ("PATCH", "/settings", self._change_settings),
            ("GET", "/companies", self._company),
            ("POST", "/companies", self._declare),
            ("GET", "/faults", self._faults),
            ("POST", "/faults", self._add_faults),
            ("PUT", "/faults", self._replace_faults),
            ("DELETE", "/faults", self._clear_faults),
            ("DELETE", "/faults/{number:int}", self._remove_fault),
            ("GET", "/stats", self._stats),
            ("DELETE", "/stats", self._reset_stats),
            ("GET", "/orders", self._orders),
            ("POST", "/orders", self._make_orders),
            ("POST", "/settle", self._settle),
            ("POST", "/fire", self._fire),
            ("PATCH", "/subscriptions/{id}", self._set_subscription_state),
        ]
        return [Route(path, _endpoint(handler), methods=[method]) for method, path, handler in table]

    async def _settings(self, request: Request) -> Any:
        return self._world.settings

    async def _change_settings(self, request: Request) -> Any:
        self._world.settings.change(await _body(request, dict[str, Any]))
        return self._world.settings

    async def _company(self, request: Request) -> Any:
        address = Address(*(request.query_params.get(name, "") for name in Address._fields))
        return self._world.companies.at(address)

    async def _declare(self, request: Request) -> Any:
        return self._world.companies.declare(await _body(request, Company))

    async def _faults(self, request: Request) -> Any:
        return self._world.faults.described()

    async def _add_faults(self, request: Request) -> Any:
        return self._world.faults.add(await _fault_list(request))

    async def _replace_faults(self, request: Request) -> Any:
        faults = await _fault_list(request)
        self._world.faults.clear()
        return self._world.faults.add(faults)

    async def _clear_faults(self, request: Request) -> Any:
        self._world.faults.clear()
        return []

    async def _remove_fault(self, request: Request) -> Any:
        self._world.faults.remove(request.path_params["number"])
        return self._world.faults.described()

    async def _stats(self, request: Request) -> Any:
        world, counts, limits = self._world, self._world.counts, list(self._world.limits.values())
        throttled = sum((one.refused for one in limits), Counter(counts.throttled))
        return {
            "operations": counts.operations,
            "throttled": {name: throttled[name] for name in ("window", "queue", "fault")},
            "active": sum(one.active for one in limits),
            "waiting": sum(one.waiting for one in limits),
            "most_active": max((one.most_active for one in limits), default=0),
            "most_waiting": max((one.most_waiting for one in limits), default=0),
            "orders": Counter(row.order.status for company in world.companies for row in world.orders(company)),
            "settlements": counts.settlements,
            "events": {
                "fired": counts.fired,
                "accepted": counts.accepted,
                "pending": world.webhooks.pending,
                "lost": counts.lost,
            },
            "deliveries": counts.deliveries,
        }

    async def _reset_stats(self, request: Request) -> Any:
        self._world.counts.clear()
        for limits in self._world.limits.values():
            limits.reset_counts()
        return await self._stats(request)

    async def _orders(self, request: Request) -> Any:
        """Return a row for every order of a company, or of all, that exists, existed or was called for."""
        world, wanted = self._world, request.query_params.get("company_id")
        statuses = {
            (company.id, row.order.order_id): row.order.status
            for company in world.companies
            for row in world.orders(company)
        }
        rows = []
        for company_id, order_id in dict.fromkeys([*statuses, *world.counts.orders]):
            if wanted in (None, company_id):
                counts = world.counts.order(company_id, order_id)
                rows.append(
                    {
                        "company_id": company_id,
                        "order_id": order_id,
                        "status": statuses.get((company_id, order_id)),
                        "gets": counts.gets,
                        "answered": counts.answered,
                        "settlements": counts.settlements,
                        "fired": counts.fired,
                        "accepted": counts.accepted,
                    }
                )
        return rows

    async def _make_orders(self, request: Request) -> Any:
        bulk, world = await _body(request, Bulk), self._world
        company = self._named(bulk)
        partner_id = bulk.partner_id or guid("partner", company.id)
        orders = world.orders(company)
        made = []
        for number, status in enumerate(_statuses(bulk, world.seed)):
            body = order_body(
                partner_id,
                f"{bulk.reference}-{len(orders) + 1}-{number}",
                payment_reference="" if status == "Draft" else f"PAY-{number}",
                items=bulk.items,
            )
            order_id = bulk.order_ids[number].lower() if bulk.order_ids else None
            row = orders.add(msgspec.convert(body, Submission), order_id)
            if status != "Submitted":
                orders.set_status(row, status)
            made.append({"order_id": row.order.order_id, "status": status})
            for _ in range(bulk.events):
                # Cancelling fires no event: a cancelled order was announced as Issued.
                world.announce(company, row.order, "Issued" if status == "Cancelled" else status)
            if number % _STRIDE == _STRIDE - 1:
                await asyncio.sleep(0)
        return {"orders": made}

    async def _settle(self, request: Request) -> Any:
        settle = await _body(request, Settle)
        company, row = self._world.find(settle.order_id.lower(), settle.company_id)
        self._world.orders(company).set_status(row, settle.status)
        return row.order

    async def _fire(self, request: Request) -> Any:
        fire, world = await _body(request, Fire), self._world
        company, row = world.find(fire.order_id.lower(), fire.company_id)
        event: tuple[str, str | None] | None = (row.order.status, None)
        if fire.timestamp == "last":
            event = world.counts.order(company.id, row.order.order_id).last_event
        if event is None:
            raise Refusal(404, "resource_not_found", "the order has no last event")
        return {"fired": sum(world.announce(company, row.order, *event) for _ in range(fire.times))}

    async def _set_subscription_state(self, request: Request) -> Any:
        body = await _body(request, State)
        return self._world.webhooks.set_state(request.path_params["id"].lower(), body.state)

    def _named(self, bulk: Bulk) -> Company:
        if bulk.company_id is None:
            return self._world.companies.at(Address(bulk.tenant, bulk.environment, bulk.company))
        for company in self._world.companies:
            if company.id == bulk.company_id:
                return company
        raise Refusal(404, "resource_not_found", "there is no such company")


def _statuses(bulk: Bulk, seed: int) -> list[Status]:
    count, whole = len(bulk.order_ids) or bulk.count, sum(bulk.mix.values()) or 1
    # 0.29 of 100 is 28.999... in binary, and 29 are meant.
    statuses: list[Status] = [
        status for status, share in bulk.mix.items() for _ in range(int(count * share / whole + 1e-6))
    ]
    statuses += [next(iter(bulk.mix), "Issued")] * (count - len(statuses))
    random.Random(seed).shuffle(statuses)  # noqa: S311 (a shuffle that the seed repeats, no secret)
    return statuses


def _endpoint(handler: _Handler) -> Callable[[Request], Awaitable[Response]]:
    """Return a Starlette endpoint: the handler's value as JSON, its Refusal or ValueError as 4xx."""

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
    given: Fault | list[Fault] = msgspec.json.decode(await request.body(), type=Fault | list[Fault])
    return given if isinstance(given, list) else [given]
