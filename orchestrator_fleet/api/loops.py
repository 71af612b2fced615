"""What goes on beside the requests. Each loop has its named interval, sleeps in between, and survives its errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from sqlalchemy import Connection

from orchestrator_fleet import log
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.errors import FleetError, StoreError
from orchestrator_fleet.orchestrators import collaboration, escalation, notices
from orchestrator_fleet.orchestrators.presence import BEAT_S, LEASE_S, MISSED_BEATS
from orchestrator_fleet.store import idempotency
from orchestrator_fleet.tasks import life, reroute, schedules
from orchestrator_fleet.tasks.schedules import Schedule

RELOAD_S = 0.5
SWEEP_S = 1.0
MAX_SILENCE_S = MISSED_BEATS * BEAT_S
INGEST_S = 0.5
FORGET_S = 600.0
SCHEDULE_S = 1.0
HELP_S, HELP_LOOK_S = 0.25, 5.0
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
    """After another generation came into force: keys and links follow it."""
    await plane.reread_daemon_keys()
    await plane.reread_revocations()
    plane.end_links()
    plane.workers.wake_all()


async def route_again(plane: Plane) -> None:
    """Follow the routing rules: after each change of them, what has not started goes where it belongs now.

    So does what an orchestrator that is gone was still at, once that attempt has ended.
    """
    routed_by, looks = None, 0
    while True:
        if plane.control.dispatch is not routed_by:
            # Twice: what was being made under the rules before may be there only after the first look.
            routed_by, looks = plane.control.dispatch, 2
        if looks or plane.astray.is_set():
            looks = max(0, looks - 1)
            plane.astray.clear()
            await route_astray(plane)
        await asyncio.sleep(RELOAD_S)


async def route_astray(plane: Plane) -> None:
    """Route again what nobody has, what is of an orchestrator that is gone, and, under new rules, what may be moved.

    In batches, between which others write. Ends early when other rules came into force: those begin anew.
    """
    dispatch = plane.control.dispatch

    def look(conn: Connection) -> tuple[bool, list[str]]:
        settled = reroute.are_settled(conn, dispatch)
        return settled, reroute.astray(conn, dispatch, rules_changed=not settled)

    # As a write, on SQLite it comes after the writes that were routed by the rules before.
    settled, task_ids = await plane.store.write(look)
    moved = 0
    for start in range(0, len(task_ids), reroute.BATCH):
        batch, now_us = task_ids[start : start + reroute.BATCH], plane.clock.now_us()
        moved += len(
            await plane.store.write(
                lambda conn, batch=batch, now_us=now_us: reroute.again(conn, batch, dispatch=dispatch, now_us=now_us)  # type: ignore[misc] # bound now
            )
        )
        plane.pulse.nudge()
        if plane.control.dispatch is not dispatch:
            return
    if not settled:
        await plane.store.write(lambda conn: reroute.settle(conn, dispatch))
    if moved:
        _log.info("routed again", tasks=moved, looked_at=len(task_ids))


async def follow_schedules(plane: Plane) -> None:
    """Make the tasks of schedules when their moments come.

    Looks at the clock each SCHEDULE_S at least: that is how soon a jump of it, or a new generation, is followed. What
    is wrong with one schedule is told, and it waits for the next generation; the others go on.
    """
    known, declared = None, dict[str, Schedule]()
    next_us: dict[str, int] = {}
    while True:
        now_us = plane.clock.now_us()
        if plane.control is not known:
            known = plane.control
            declared = {one.name: one for one in schedules.schedules_of(known.doc.spec)}
            next_us = await _upcoming(plane, list(declared.values()), now_us)
        for name in [name for name, at_us in next_us.items() if at_us <= now_us]:
            following_us = await _fire(plane, declared[name])
            if following_us is None:
                del next_us[name]
            else:
                next_us[name] = following_us
        left_s = (min(next_us.values(), default=now_us + SECOND_US) - plane.clock.now_us()) / SECOND_US
        await asyncio.sleep(min(max(left_s, 0.0), SCHEDULE_S))


async def _upcoming(plane: Plane, declared: list[Schedule], now_us: int) -> dict[str, int]:
    await plane.store.write(lambda conn: schedules.forget(conn, declared))
    found = await plane.store.read(lambda conn: schedules.upcoming(conn, declared, now_us=now_us))
    for name, at_us in found.items():
        if isinstance(at_us, ValueError):
            _log.error("a schedule can't be followed", schedule=name, problem=str(at_us))
    return {name: at_us for name, at_us in found.items() if isinstance(at_us, int)}


async def _fire(plane: Plane, schedule: Schedule) -> int | None:
    """When it is due next; None when it can't be followed any more, or never comes again."""
    now_us, dispatch = plane.clock.now_us(), plane.control.dispatch
    try:
        fired = await plane.store.write(
            lambda conn: schedules.fire(conn, schedule=schedule, dispatch=dispatch, now_us=now_us)
        )
    except StoreError:
        raise  # all of them wait for the store
    except ValueError as wrong:
        _log.error("a schedule can't be followed", schedule=schedule.name, problem=str(wrong))
        return None
    except Exception:  # noqa: BLE001 - one schedule must not stop the others, nor itself for ever
        _log.exception("a schedule's turn failed and comes again", schedule=schedule.name, again_s=MAX_AGAIN_S)
        return now_us + round(MAX_AGAIN_S * SECOND_US)
    plane.pulse.nudge()
    for task in fired.made:
        _log.info("a schedule made a task", schedule=schedule.name, task=task.id)
    return fired.next_us


async def follow_help(plane: Plane) -> None:
    """Ask on where nobody answers an escalation in time; tell what came of those, and of collaborators' children.

    Looks soon after something happened to a task, when the next time-out is over, and each HELP_LOOK_S at least: that
    is how soon a jump of the clock is followed.
    """
    while True:
        plane.tasks_moved.clear()
        now_us = plane.clock.now_us()
        climbs, gathers, next_us = await plane.store.read(
            lambda conn, now_us=now_us: (  # type: ignore[misc] # bound now
                escalation.any_due(conn, now_us=now_us),
                collaboration.any_due(conn),
                escalation.next_at(conn),
            )
        )
        if climbs:
            await _climb(plane)
        if gathers:
            await _gather(plane)
        left_s = HELP_LOOK_S if next_us is None else (next_us - plane.clock.now_us()) / SECOND_US
        await asyncio.sleep(HELP_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left_s, HELP_LOOK_S) - HELP_S):
                await plane.tasks_moved.wait()


async def _climb(plane: Plane) -> None:
    """In batches, between which others write."""
    now_us, declared = plane.clock.now_us(), plane.control.orchestrators
    while moved := await plane.store.write(lambda conn: escalation.climb(conn, declared=declared, now_us=now_us)):
        plane.pulse.nudge()
        _log.info("escalations went on", moved=moved)


async def _gather(plane: Plane) -> None:
    """Likewise."""
    now_us = plane.clock.now_us()
    while moved := await plane.store.write(lambda conn: collaboration.gather(conn, now_us=now_us)):
        plane.pulse.nudge()
        _log.info("collaborators' answers were told", moved=moved)


async def sweep(plane: Plane) -> None:
    """Take back tasks whose lease has run out; looks at the next expiry, at most SWEEP_S later.

    While the store can't be used, or this process stands still, nobody can beat: those who held a task before that get
    time to say that they still do.
    """
    clock = asyncio.get_running_loop()
    cut_off, looked_s = False, clock.time()
    while True:
        cut_off = cut_off or clock.time() - looked_s > MAX_SILENCE_S
        looked_s = clock.time()
        try:
            if cut_off:
                until_us = plane.clock.now_us() + round(LEASE_S * SECOND_US)
                await plane.store.write(lambda conn, until_us=until_us: life.hold_all(conn, until_us=until_us))  # type: ignore[misc] # bound now
                cut_off = False
            left_s = await _sweep(plane)
        except StoreError as problem:
            _log.error("leases can't be looked at", problem=str(problem))
            cut_off, left_s = True, SWEEP_S
        await asyncio.sleep(min(left_s, SWEEP_S))


async def _sweep(plane: Plane) -> float:
    """Seconds until it is worth another look."""
    next_us = await plane.store.read(life.next_lease_expiry)
    now_us = plane.clock.now_us()
    if next_us is None or next_us > now_us:
        return SWEEP_S if next_us is None else (next_us - now_us) / SECOND_US
    expired = await plane.store.write(lambda conn: life.expire_leases(conn, now_us=now_us))
    if not expired:
        return SWEEP_S  # another control plane, or a beat, was there first
    plane.pulse.nudge()
    _log.info("leases ran out", tasks=len(expired))
    return 0.0


async def ingest(plane: Plane) -> None:
    """Bring events to history soon after they happen; nothing runs while nothing happens."""
    while True:
        plane.moved.clear()
        await plane.history.catch_up()
        await asyncio.sleep(INGEST_S)
        await plane.moved.wait()


async def forget(plane: Plane) -> None:
    """Drop what is old: answers kept for Idempotency-Key, and notices that were delivered or that nobody took."""
    while True:
        now_us = plane.clock.now_us()
        while await plane.store.write(lambda conn, now_us=now_us: notices.forget(conn, now_us=now_us)):  # type: ignore[misc] # bound now
            plane.pulse.nudge()
        while await plane.store.write(lambda conn, now_us=now_us: idempotency.forget_old(conn, now_us=now_us)):  # type: ignore[misc] # bound now
            pass
        await asyncio.sleep(FORGET_S)
