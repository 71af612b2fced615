"""Keeps what binds claims right as time passes and rules change: pauses that end, limits that have room again.

And what people did to orchestrators, where that ends later: see `restarting.follow`.
"""

from __future__ import annotations

import asyncio

from orchestrator_fleet import log
from orchestrator_fleet.api import restarting
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.tasks import holds, limits
from orchestrator_fleet.tasks.rules import Rules

GOVERN_S = 1.0
FORGET_EVERY = 60  # looks

_log = log.get(__name__)


async def govern(plane: Plane) -> None:
    """Look each GOVERN_S; writes only when there is something to write."""
    followed: Rules | None = None
    looks = 0
    while True:
        rules = plane.control.rules
        if rules is not followed:
            await begin_anew(plane, rules, before=followed)
            followed = rules
        await _end_holds(plane)
        await restarting.follow(plane)
        # Also without limits: a claim under the rules before may have parked a task since they were followed.
        if await plane.store.read(limits.any_are_parked):
            await _call_up(plane, rules)
        if rules.limits and looks % FORGET_EVERY == 0:
            await _forget(plane)
        looks += 1
        await asyncio.sleep(GOVERN_S)


async def begin_anew(plane: Plane, rules: Rules, *, before: Rules | None = None) -> None:
    """Other rules are in force: what was parked stands in line again, and what runs counts on the new limits.

    Who has another budget than `before` asks anew whether it is spent.
    """
    for name in rules.orchestrators if before is not None else ():
        if before is not None and before.of(name).budget != rules.of(name).budget:
            now_us = plane.clock.now_us()
            await plane.store.write(
                lambda conn, name=name, now_us=now_us: holds.let_go(
                    conn, orchestrator=name, reason="budget", now_us=now_us
                )  # type: ignore[misc] # bound now
            )
    while await plane.store.write(lambda conn: limits.unpark_all(conn, plane.clock.now_us())):
        pass
    after: str | None = ""
    while after is not None:
        after = await plane.store.write(lambda conn, after=after: limits.recount(conn, rules=rules, after=after))  # type: ignore[misc] # bound now
    plane.workers.wake_all()


async def _forget(plane: Plane) -> None:
    while await plane.store.write(lambda conn: limits.forget(conn, plane.clock.now_us())) == limits.BATCH:
        pass


async def _end_holds(plane: Plane) -> None:
    next_us = await plane.store.read(holds.next_end)
    now_us = plane.clock.now_us()
    if next_us is None or next_us > now_us:
        return
    over = await plane.store.write(lambda conn: holds.ended(conn, now_us))
    plane.pulse.nudge()
    for hold in over:
        _log.info("may claim again", orchestrator=hold.orchestrator, after=hold.kind)


async def _call_up(plane: Plane, rules: Rules) -> None:
    now_us = plane.clock.now_us()
    if await plane.store.write(lambda conn: limits.call_up(conn, rules=rules, now_us=now_us)):
        plane.pulse.nudge()
