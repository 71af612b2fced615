"""Handing out work: what pollers over HTTP and daemons over the link share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from orchestrator_fleet import log
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.errors import FleetError, TaskError
from orchestrator_fleet.orchestrators.carried import along
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.task import Ask, Claimed, Grant

NO_SLOT, CLOSING = "every session is taken", "the control plane is closing"
# The moment at which time alone changes something may be reached a little before the store agrees.
MIN_WAIT_S = 0.05

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
    got = await wait_for_some(
        plane, claimant, limit=limit, wait_s=wait_s, claim=lambda ask: _claim(plane, claimant, ask)
    )
    reason = CLOSING if plane.closing.is_set() else got.reason
    try:
        yield got.grants, "" if got.grants else reason
    except BaseException:
        await _give_back(plane, claimant, got.grants)
        raise


async def carried(plane: Plane, grants: Sequence[Grant]) -> Mapping[str, dict[str, Any]]:
    """What granted tasks bring along, by task; a look at the store only where somebody was asked about one of them."""
    asked_about = [grant.task for grant in grants if grant.task.coordinated]
    return await plane.store.read(lambda conn: along(conn, asked_about)) if asked_about else {}


async def wait_for_some(
    plane: Plane, claimant: Claimant, *, limit: int, wait_s: float, claim: Callable[[Ask], Awaitable[Claimed]]
) -> Claimed:
    """What `claim` gets, asked again whenever there may be something, for up to `wait_s`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    with plane.workers.waiting(claimant.orchestrator) as woken:
        while True:
            woken.clear()
            got = await claim(_ask(plane, claimant, limit))
            is_over = plane.closing.is_set() or claimant.orchestrator not in plane.control.orchestrators
            if got.grants or is_over or loop.time() >= deadline:
                return got
            left_s = deadline - loop.time()
            if got.again_at_us is not None:
                left_s = min(left_s, max(MIN_WAIT_S, (got.again_at_us - plane.clock.now_us()) / SECOND_US))
            try:
                async with asyncio.timeout(left_s):
                    await woken.wait()
            except TimeoutError:
                continue


def _ask(plane: Plane, claimant: Claimant, limit: int) -> Ask:
    return Ask(
        orchestrator=claimant.orchestrator,
        machine=claimant.machine,
        holder=claimant.holder,
        limit=limit,
        lease_s=claimant.lease_s,
        sessions_max=claimant.sessions_max,
        generation=claimant.generation,
        charter_version=claimant.charter_version,
        actor=claimant.actor,
        rules=plane.control.rules,
        now_us=plane.clock.now_us(),
    )


async def _claim(plane: Plane, claimant: Claimant, ask: Ask) -> Claimed:
    writing = asyncio.ensure_future(plane.store.write_batched(life.claim_all, ask))
    try:
        got = await asyncio.shield(writing)
    except asyncio.CancelledError:
        # It commits all the same: whoever asked is gone, so the tasks go back in line.
        await _give_back(plane, claimant, (await asyncio.shield(writing)).grants)
        raise
    # Also without grants: what was ripe, or is over a budget, has its events.
    plane.pulse.nudge()
    return got


async def _give_back(plane: Plane, claimant: Claimant, grants: Sequence[Grant]) -> None:
    """Release what could not be handed over; what fails here ends with its lease."""
    for grant in grants:
        report = life.Report(
            task_id=grant.task.id,
            token=grant.token,
            outcome="released",
            retry_of=plane.control.dispatch.retry,
            roll=0.0,
            actor=claimant.actor,
            now_us=plane.clock.now_us(),
        )
        try:
            await plane.store.write_batched(life.finish_all, report)
        except TaskError:
            continue  # it is somebody else's by now
        except FleetError:
            _log.exception("a grant could not be given back", task=grant.task.id)
    plane.pulse.nudge()
