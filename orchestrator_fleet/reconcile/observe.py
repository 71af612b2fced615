"""Looking at all machines at once. One that can't be looked at yields why, and stops no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from orchestrator_fleet.errors import MachineError
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.wire.machine import Observe, Observed, Refusal

PARALLEL = 16
TIMEOUT_S = 15.0


async def observe(
    transports: Mapping[str, Transport], *, documents_for: Callable[[str], bool]
) -> dict[str, Observed | str]:
    """Name -> what is there, or why it can't be told. `documents_for(name)` also asks for the files' content."""
    gate = asyncio.Semaphore(PARALLEL)

    async def one(transport: Transport) -> Observed | str:
        async with gate:
            return await observe_one(transport, documents=documents_for(transport.name))

    seen = await asyncio.gather(*(one(transport) for transport in transports.values()))
    return dict(zip(transports, seen, strict=True))


async def observe_one(transport: Transport, *, documents: bool = False) -> Observed | str:
    """What is there on one machine, or why it can't be told."""
    try:
        answer = await transport.call(Observe(documents=documents), timeout_s=TIMEOUT_S)
    except MachineError as error:
        return str(error).removeprefix(f"{error.machine}: ")
    match answer:
        case Observed():
            return answer
        case Refusal():
            return answer.problem
        case _:
            return f"answered a look with {type(answer).__name__}"
