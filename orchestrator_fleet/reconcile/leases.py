"""Holding the machines while they are changed: taken together, renewed while working, given back at the end."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from orchestrator_fleet.errors import LeaseHeld, MachineError
from orchestrator_fleet.machines import processes
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.wire.machine import Acquire, Leased, Refusal, Release

TTL_S = 60.0
RENEW_S = 20.0
TIMEOUT_S = 40.0  # a machine that is being changed answers when that is done, at most 30 s later


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The leases of one apply. `tokens`: target -> fencing token; `problems`: target -> why it could not be asked."""

    tokens: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def gone(self, target: str) -> None:
        """A target that was destroyed took its lease along: asking for it again would make a new root."""
        self.tokens.pop(target, None)


@asynccontextmanager
async def held(transports: Mapping[str, Transport], *, first: str, holder: str) -> AsyncIterator[Held]:
    """Hold all targets or none; raises LeaseHeld naming who holds one already.

    `first` is asked before the others, so that of two applies at once exactly one goes on.
    """
    request = Acquire(holder=_unique(holder), ttl_s=TTL_S, process=processes.own_name())
    leases = Held()
    try:
        await _take({first: transports[first]}, request, leases)
        await _take({name: way for name, way in transports.items() if name != first}, request, leases)
        renewing = asyncio.create_task(_renew(transports, request, leases))
        try:
            yield leases
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
    finally:
        await asyncio.gather(*(_give_back(transports[name], token) for name, token in leases.tokens.items()))


def _unique(holder: str) -> str:
    """Two applies of the same person are two holders."""
    return f"{holder} (pid {os.getpid()}, {secrets.token_hex(3)})"


async def _take(transports: Mapping[str, Transport], request: Acquire, leases: Held) -> None:
    refused = []

    async def one(name: str, transport: Transport) -> None:
        try:
            answer = await transport.call(request, timeout_s=TIMEOUT_S)
        except MachineError as error:
            leases.problems[name] = str(error).removeprefix(f"{name}: ")
            return
        match answer:
            case Leased():
                leases.tokens[name] = answer.token
            case Refusal(code="lease_held"):
                refused.append(f"{name}: {answer.problem}")
            case Refusal():
                leases.problems[name] = answer.problem
            case _:
                leases.problems[name] = f"answered a lease with {type(answer).__name__}"

    await asyncio.gather(*(one(name, transport) for name, transport in transports.items()))
    if refused:
        raise LeaseHeld("\n".join(sorted(refused)))


async def _renew(transports: Mapping[str, Transport], request: Acquire, leases: Held) -> None:
    """Lengthen all, again and again. A renewal that fails changes nothing here: the machine refuses late writes."""
    while True:
        await asyncio.sleep(RENEW_S)
        await asyncio.gather(*(_renew_one(transports[name], request) for name in leases.tokens))


async def _renew_one(transport: Transport, request: Acquire) -> None:
    with suppress(MachineError):
        await transport.call(request, timeout_s=TIMEOUT_S)


async def _give_back(transport: Transport, token: int) -> None:
    """Best effort: a lease that can't be given back expires by itself."""
    with suppress(MachineError):
        await transport.call(Release(token=token), timeout_s=TIMEOUT_S)
