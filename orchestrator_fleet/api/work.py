"""Handing out work: what pollers over HTTP and daemons over the link share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from orchestrator_fleet import log
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.errors import FleetError, TaskError
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.task import Grant

NO_WORK, NO_SLOT, CLOSING = "no task is ready", "every session is taken", "the control plane is closing"

_log = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimant:
    """Who claims. `holder` tells daemons' lives apart; `sessions_max` None is no limit of running attempts."""

    orchestrator: str
    actor: str
    lease_s: float
    machine: str = ""
    holder: str = ""
    sessions_max: int | None = None
    generation: str | None = None
    charter_version: str | None = None


@asynccontextmanager
async def claimed(
    plane: Plane, claimant: Claimant, *, limit: int, wait_s: float
) -> AsyncIterator[tuple[Sequence[Grant], str]]:
    """Tasks that are the claimant's now, or () and why. Waits up to `wait_s` for the first.

    Hand them over inside the context: when that fails, or is cancelled, they are given back at once.
    """
    if limit <= 0:
        yield (), NO_SLOT
        return
    grants = await _wait_for_some(plane, claimant, limit=limit, wait_s=wait_s)
    try:
        yield grants, "" if grants else CLOSING if plane.closing.is_set() else NO_WORK
    except BaseException:
        await _give_back(plane, claimant, grants)
        raise


async def _wait_for_some(plane: Plane, claimant: Claimant, *, limit: int, wait_s: float) -> Sequence[Grant]:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    with plane.workers.waiting(claimant.orchestrator) as woken:
        while True:
            woken.clear()
            grants = await _claim(plane, claimant, limit=limit)
            if grants or plane.closing.is_set() or loop.time() >= deadline:
                return grants
            wakes_us = await plane.store.read(lambda conn: life.next_available(conn, claimant.orchestrator))
            left_s = deadline - loop.time()
            if wakes_us is not None:
                left_s = min(left_s, max(0.0, (wakes_us - plane.clock.now_us()) / SECOND_US))
            try:
                async with asyncio.timeout(left_s):
                    await woken.wait()
            except TimeoutError:
                continue


async def _claim(plane: Plane, claimant: Claimant, *, limit: int) -> Sequence[Grant]:
    writing = asyncio.ensure_future(
        plane.store.write(
            lambda conn: life.claim(
                conn,
                orchestrator=claimant.orchestrator,
                machine=claimant.machine,
                holder=claimant.holder,
                limit=limit,
                lease_s=claimant.lease_s,
                sessions_max=claimant.sessions_max,
                generation=claimant.generation,
                charter_version=claimant.charter_version,
                actor=claimant.actor,
                now_us=plane.clock.now_us(),
            )
        )
    )
    try:
        grants = await asyncio.shield(writing)
    except asyncio.CancelledError:
        # It commits all the same: whoever asked is gone, so the tasks go back in line.
        await _give_back(plane, claimant, await asyncio.shield(writing))
        raise
    if grants:
        plane.pulse.nudge()
    return grants


async def _give_back(plane: Plane, claimant: Claimant, grants: Sequence[Grant]) -> None:
    """Release what could not be handed over; what fails here ends with its lease."""
    for grant in grants:
        try:
            await plane.store.write(
                lambda conn, grant=grant: life.finish(  # type: ignore[misc] # bound now, not when it runs
                    conn,
                    task_id=grant.task.id,
                    token=grant.token,
                    outcome="released",
                    retry=plane.control.dispatch.retry(claimant.orchestrator),
                    roll=0.0,
                    actor=claimant.actor,
                    now_us=plane.clock.now_us(),
                )
            )
        except TaskError:
            continue  # it is somebody else's by now
        except FleetError:
            _log.exception("a grant could not be given back", task=grant.task.id)
    plane.pulse.nudge()
