"""Writes down what has become of delegations and handoffs as their tasks go on, and completes handoffs.

Woken by the events of tasks that were passed on; besides, all that are open are looked at when this begins and each
LOOK_S, for what was not heard. Looks without holding anything, since a row that is held is a row that a claim steps
over, and writes only where there is something to write. Several control planes do the same: the second finds it done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from sqlalchemy import Connection

from orchestrator_fleet import log
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.errors import NotFound
from orchestrator_fleet.orchestrators import coordination, handoff, passing
from orchestrator_fleet.orchestrators.coordination import Coordination
from orchestrator_fleet.store import locks
from orchestrator_fleet.tasks import rows

LOOK_S = 60.0
BATCH = 100  # tasks that one transaction settles, and a page of the look at all

_log = log.get(__name__)


async def settle(plane: Plane) -> None:
    """Do it, for ever."""
    clock = asyncio.get_running_loop()
    await _look_at_all(plane)
    looked_at = clock.time()
    while True:
        wait_s = plane.unsettled.wait_s(looked_at + LOOK_S - clock.time())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await plane.unsettled.woken.wait()
        changed, handovers = plane.unsettled.take()
        for start in range(0, len(changed), BATCH):
            await _settle(plane, changed[start : start + BATCH])
        for of, stopped in handovers.items():
            await hand_over(plane, of, stopped=stopped)
        if clock.time() - looked_at >= LOOK_S:
            await _look_at_all(plane)
            looked_at = clock.time()


async def hand_over(plane: Plane, of: str, *, stopped: bool) -> None:
    """Complete a handoff; one that is completed already stays as it is."""
    now_us = plane.clock.now_us()
    # A task that was purged meanwhile took it along.
    with contextlib.suppress(NotFound):
        await plane.store.write(lambda conn: handoff.complete(conn, of, now_us=now_us, stopped=stopped))
    plane.unsettled.handed_over(of)
    plane.pulse.nudge()


async def _look_at_all(plane: Plane) -> None:
    for kind in passing.KINDS:
        after = ""
        while True:
            found = await plane.store.read(
                lambda conn, kind=kind, after=after: coordination.open_ones(conn, kind, after=after, limit=BATCH)  # type: ignore[misc] # bound now
            )
            for one in found:
                plane.unsettled.note(one.task, one.id, kind=one.kind, state=one.state, source=one.source)
            await _settle(plane, sorted({one.task for one in found}))
            if len(found) < BATCH:
                break
            after = found[-1].id


async def _settle(plane: Plane, task_ids: Sequence[str]) -> None:
    late = await plane.store.read(lambda conn: passing.unsettled(conn, task_ids))
    if not late:
        return
    now_us = plane.clock.now_us()
    moved = await plane.store.write(lambda conn: _write(conn, late, now_us=now_us))
    plane.pulse.nudge()
    for was, now in moved:
        _log.info("settled", coordination=now.id, kind=now.kind, was=was.state, state=now.state, reason=now.reason)


def _write(conn: Connection, task_ids: Sequence[str], *, now_us: int) -> list[tuple[Coordination, Coordination]]:
    locks.hold(conn, "settle")
    moved = []
    for task in rows.get_all_to_change(conn, task_ids).values():
        before = coordination.of_task(conn, task.id)
        _, after = passing.settle(conn, task, before, now_us=now_us)
        moved += [(was, now) for was, now in zip(before, after, strict=True) if was.state != now.state]
    return moved
