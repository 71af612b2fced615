"""What goes on beside the requests. Each loop has its named interval, sleeps in between, and survives its errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from orchestrator_fleet import log
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.orchestrators import departed
from orchestrator_fleet.store import idempotency
from orchestrator_fleet.tasks import life

RELOAD_S = 0.5
SWEEP_S = 1.0
INGEST_S = 0.5
FORGET_S = 600.0
AGAIN_S, MAX_AGAIN_S, STEADY_S = 1.0, 30.0, 60.0

_log = log.get(__name__)


async def supervised(name: str, loop: Callable[[], Awaitable[None]]) -> None:
    """Run a loop for ever: an error is told and the loop begins again, later each time in a row."""
    again_s, clock = AGAIN_S, asyncio.get_running_loop()
    while True:
        began = clock.time()
        try:
            await loop()
        except FleetError as problem:
            _log.error("a loop failed and begins again", loop=name, problem=str(problem), again_s=again_s)
        except Exception:  # noqa: BLE001 - a loop that stopped would stop the fleet in silence
            _log.exception("a loop failed and begins again", loop=name, again_s=again_s)
        if clock.time() - began > STEADY_S:
            again_s = AGAIN_S
        await asyncio.sleep(again_s)
        again_s = min(again_s * 2, MAX_AGAIN_S)


async def reload(plane: Plane) -> None:
    """Follow the generations of the control plane."""
    told = plane.control.generation
    while True:
        await asyncio.sleep(RELOAD_S)
        await plane.reread_control()
        if plane.control.generation != told:
            await in_force(plane)
            told = plane.control.generation
            _log.info("reloaded", generation=told)


async def in_force(plane: Plane) -> None:
    """After another generation came into force: keys, links and routes follow it."""
    await plane.reread_daemon_keys()
    plane.end_links()
    await reroute(plane)
    plane.workers.wake_all()


async def reroute(plane: Plane) -> None:
    """Route again what nobody has, or what is of an orchestrator that is gone."""
    dispatch = plane.control.dispatch
    while True:
        now_us = plane.clock.now_us()
        await plane.store.write(lambda conn, now_us=now_us: departed.reroute(conn, dispatch=dispatch, now_us=now_us))  # type: ignore[misc] # bound now
        plane.pulse.nudge()
        if not await plane.store.read(lambda conn: departed.left_behind(conn, dispatch)):
            return


async def sweep(plane: Plane) -> None:
    """Take back tasks whose lease has run out; looks at the next expiry, at most SWEEP_S later."""
    while True:
        next_us = await plane.store.read(life.next_lease_expiry)
        left_s = SWEEP_S if next_us is None else (next_us - plane.clock.now_us()) / SECOND_US
        if left_s > 0:
            await asyncio.sleep(min(left_s, SWEEP_S))
            continue
        now_us = plane.clock.now_us()
        expired = await plane.store.write(lambda conn, now_us=now_us: life.expire_leases(conn, now_us=now_us))  # type: ignore[misc] # bound now
        plane.pulse.nudge()
        _log.info("leases ran out", tasks=len(expired))
        if any(task.orchestrator not in plane.control.orchestrators for task in expired):
            await reroute(plane)


async def ingest(plane: Plane) -> None:
    """Bring events to history soon after they happen; nothing runs while nothing happens."""
    while True:
        plane.moved.clear()
        await plane.history.catch_up()
        await asyncio.sleep(INGEST_S)
        await plane.moved.wait()


async def forget(plane: Plane) -> None:
    """Drop answers kept for Idempotency-Key when they are old."""
    while True:
        now_us = plane.clock.now_us()
        await plane.store.write(lambda conn, now_us=now_us: idempotency.forget_old(conn, now_us=now_us))  # type: ignore[misc] # bound now
        await asyncio.sleep(FORGET_S)
