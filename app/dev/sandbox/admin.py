"""The admin API under `/_sandbox`, as the package's docstring lists it: one handler per route."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.dev.sandbox.faults import Fault
from app.dev.sandbox.http import Refusal, bad_request, json, no_order
from app.dev.sandbox.orders import Orders, Row, Status
from app.dev.sandbox.submission import Submission, order_body
from app.dev.sandbox.values import Count, guid
from app.dev.sandbox.webhooks import Webhooks
from app.dev.sandbox.world import Address, Company, World

_T = TypeVar("_T")
_Share = Annotated[float, msgspec.Meta(ge=0)]
_Handler = Callable[[Request], Awaitable[Any]]


class Bulk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Orders to make without createOrder, put straight into their status.

    `company_id` or the address names the company. `mix` gives shares: {"Issued": 8, "Draft": 1, "Error": 1} with
    `count` 10 makes exactly these, shuffled by the seed. `order_ids` (instead of `count`) sets the ids. Each
    order is announced `events` times, at once.
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

    def __init__(self, world: World, orders: Orders, webhooks: Webhooks) -> None:
        self._world = world
        self._orders = orders
        self._webhooks = webhooks

    def routes(self) -> list[Route]:
        """Return the routes, relative to `/_sandbox`."""
        table: list[tuple[str, str, _Handler]] = [
            ("GET PATCH", "/settings", self._settings),
            ("GET", "/companies", self._company),
            ("POST", "/companies", self._declare),
            ("GET", "/faults", self._faults),
            ("POST PUT", "/faults", self._add_faults),
            ("DELETE", "/faults", self._remove_faults),
            ("DELETE", "/faults/{number:int}", self._remove_faults),
            ("GET DELETE", "/stats", self._stats),
            ("GET", "/orders", self._list_orders),
            ("POST", "/orders", self._make_orders),
            ("POST", "/settle", self._settle),
            ("POST", "/fire", self._fire),
            ("PATCH", "/subscriptions/{id}", self._set_subscription_state),
        ]
        return [Route(path, _endpoint(handler), methods=methods.split()) for methods, path, handler in table]

    async def _settings(self, request: Request) -> Any:
        # A GET has no body, and changes nothing.
        self._world.settings.change(await _body(request, dict[str, Any]))
        return self._world.settings

    async def _company(self, request: Request) -> Any:
        return self._world.companies.at(Address(*(request.query_params.get(name, "") for name in Address._fields)))

    async def _declare(self, request: Request) -> Any:
        return self._world.companies.declare(await _body(request, Company))

    async def _faults(self, request: Request) -> Any:
        return self._world.faults.rules

    async def _add_faults(self, request: Request) -> Any:
        given: Fault | list[Fault] = msgspec.json.decode(await request.body(), type=Fault | list[Fault])
        if request.method == "PUT":
            self._world.faults.rules.clear()
        return self._world.faults.add(given if isinstance(given, list) else [given])

    async def _remove_faults(self, request: Request) -> Any:
        number = request.path_params.get("number")
        faults = self._world.faults
        faults.rules = [rule for rule in faults.rules if number not in (None, rule.number)]
        return faults.rules

    async def _stats(self, request: Request) -> Any:
        if request.method == "DELETE":
            self._world.reset_counts()
        counts, limits = self._world.counts, list(self._world.limits.values())
        refused = sum((one.refused for one in limits), Counter())
        return {
            "operations": counts.operations,
            "throttled": {"window": refused["window"], "queue": refused["queue"], "fault": counts.throttled},
            "active": sum(one.active for one in limits),
            "most_active": max((one.most_active for one in limits), default=0),
            "most_waiting": max((one.most_waiting for one in limits), default=0),
            "events": {"pending": self._webhooks.pending, "lost": counts.lost},
            "deliveries": counts.deliveries,
        }

    async def _list_orders(self, request: Request) -> Any:
        """Return a row for every order of a company, or of all, that exists, existed or was called for."""
        counts, wanted = self._world.counts.orders, request.query_params.get("company_id")
        statuses = {(row.company.id, row.order_id): row.status for row in self._orders.rows.values()}
        return [
            {"company_id": key[0], "order_id": key[1], "status": statuses.get(key), **vars(counts[key])}
            for key in dict.fromkeys([*statuses, *counts])
            if wanted in (None, key[0])
        ]

    async def _make_orders(self, request: Request) -> Any:
        bulk, companies = await _body(request, Bulk), self._world.companies
        if bulk.company_id is None:
            company = companies.at(Address(bulk.tenant, bulk.environment, bulk.company))
        else:
            company = companies.of_id(bulk.company_id)
        made = []
        for number, status in enumerate(_statuses(bulk, self._world.seed)):
            body = order_body(
                bulk.partner_id or guid("partner", company.id),
                f"{bulk.reference}-{len(self._orders.rows) + 1}-{number}",
                payment_reference="" if status == "Draft" else f"PAY-{number}",
                items=bulk.items,
            )
            order_id = bulk.order_ids[number].lower() if bulk.order_ids else ""
            row = self._orders.add(company, msgspec.convert(body, Submission), order_id)
            if status != "Submitted":
                self._orders.set_status(row, status)
            made.append({"order_id": row.order_id, "status": status})
            for _ in range(bulk.events):
                self._orders.announce(row)
        return {"orders": made}

    async def _settle(self, request: Request) -> Any:
        settle = await _body(request, Settle)
        return self._orders.set_status(self._find(settle.order_id, settle.company_id), settle.status).answer()

    async def _fire(self, request: Request) -> Any:
        fire = await _body(request, Fire)
        row = self._find(fire.order_id, fire.company_id)
        last = self._world.counts.orders[row.company.id, row.order_id].last_event if fire.timestamp else None
        if fire.timestamp and last is None:
            raise Refusal(404, "resource_not_found", "the order has no last event")
        return {"fired": sum(self._orders.announce(row, last) for _ in range(fire.times))}

    async def _set_subscription_state(self, request: Request) -> Any:
        body = await _body(request, State)
        return self._webhooks.set_state(request.path_params["id"].lower(), body.state)

    def _find(self, order_id: str, company_id: str | None) -> Row:
        for row in self._orders.rows.values():
            if row.order_id == order_id.lower() and company_id in (None, row.company.id):
                return row
        raise no_order(order_id)


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
        try:
            answer = json(await handler(request))
        except Refusal as refusal:
            answer = refusal.answer
        except ValueError as error:
            answer = bad_request(str(error)).answer
        return Response(answer.body, answer.status, media_type=answer.content_type.decode())

    return endpoint


async def _body(request: Request, kind: type[_T]) -> _T:
    return msgspec.json.decode(await request.body() or b"{}", type=kind)
