"""The way in: address, key, faults, limits, then the operation; one ASGI app, lean, for it is called the most."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from app.dev.sandbox import connection, operations
from app.dev.sandbox.answer import Answer, faulty, refused, spoilt
from app.dev.sandbox.call import Call, read
from app.dev.sandbox.company import Company
from app.dev.sandbox.fault import Strike
from app.dev.sandbox.mint import guid
from app.dev.sandbox.refusal import Refusal
from app.dev.sandbox.world import World

# Answered by what stands before the queue, so they cost no slot.
_AT_THE_DOOR = {401, 403, 429}


class Gateway:
    """The Channel Manager and the webhook API of all companies."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call, unless the caller hangs up first."""
        tally = self._world.tally
        operation = "unknown"
        answer: Answer | None
        try:
            call = read(scope["method"], scope["raw_path"], scope["query_string"])
            operation = call.operation
            answer = await self._answered(call, scope, receive)
        except Refusal as refusal:
            answer = refused(refusal)
        if answer is None:
            tally.call(operation, "abandoned")
            return
        tally.call(operation, answer.status if answer.sound else f"{answer.status} spoilt")
        await answer.give(send)

    async def _answered(self, call: Call, scope: Scope, receive: Receive) -> Answer | None:
        world, settings = self._world, self._world.settings
        company = world.companies.at(call.address)
        if call.operation == "getOrder" and call.order_id:
            world.tally.order(company.id, call.order_id).gets += 1
        key = _key(scope)
        company.admit(key)
        strikes = world.faults.strike(call.operation, company.id, call.order_id)
        status = next((fault for fault, _ in strikes if fault.kind == "status"), None)
        if status is not None and status.status in _AT_THE_DOOR:
            if status.status == 429:
                world.tally.throttled["fault"] += 1
            return faulty(status, call.order_id)
        gate = world.gates[key]
        gate.count(settings)
        body = await connection.body(receive) if scope["method"] in ("POST", "PUT") else b""
        if not await gate.enter(settings, receive):
            return None
        try:
            if not await self._slow(call, strikes, receive):
                return None
            if status is not None:
                return faulty(status, call.order_id)
            return await self._worked(call, company, strikes, body)
        finally:
            gate.leave(world.settings)

    async def _slow(self, call: Call, strikes: list[Strike], receive: Receive) -> bool:
        """Take the time a call is to take, in its slot; return False if the caller hung up.

        Raises Refusal (408) when it takes longer than the limit.
        """
        world = self._world
        seconds = world.settings.latency_ms / 1000 if call.operation == "getOrder" else 0.0
        seconds += sum(drawn for fault, drawn in strikes if fault.kind == "latency")
        limit = world.settings.operation_limit
        hang = next((fault for fault, _ in strikes if fault.kind == "hang"), None)
        if hang is not None:
            limit = seconds = min(limit, limit if hang.seconds is None else hang.seconds)
        if seconds and not await connection.outlasts(receive, min(seconds, limit)):
            return False
        if hang is not None or seconds > limit:
            raise Refusal(408, "server_timeout", "The operation took too long")
        return True

    async def _worked(self, call: Call, company: Company, strikes: list[Strike], body: bytes) -> Answer:
        world = self._world
        answer = await operations.perform(world, company, call, body)
        for fault, _ in strikes:
            other_id = guid(world.seed, "other", call.order_id)
            answer = spoilt(answer, fault, call.order_id, other_id)
        if call.operation == "getOrder" and answer.sound:
            world.tally.order(company.id, call.order_id).answered += 1
        return answer


def _key(scope: Scope) -> str:
    """Return the API key of a call, "" without one; the older Bearer scheme is declared upstream as well."""
    bearer = ""
    for name, value in scope["headers"]:
        if name == b"x-np-api-key":
            return str(value.decode("latin-1"))
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            bearer = value[7:].decode("latin-1")
    return bearer
