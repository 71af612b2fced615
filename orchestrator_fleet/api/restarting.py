"""What people do to orchestrators that takes its time, beside the requests that asked for it.

A restart is done by the control plane that was asked, at its machine, one at a time there; whoever asked waits a while
for its end. A drain stands in the store, and whoever looks first ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from orchestrator_fleet import log
from orchestrator_fleet.api.acting import check_reachable, show
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.errors import Conflict, LeaseHeld, MachineError, NotFound, StoreError, Unreachable
from orchestrator_fleet.machines.connect import transport_to
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.orchestrators import actions
from orchestrator_fleet.orchestrators.actions import Action, Outcome
from orchestrator_fleet.reconcile.restart import NotRunning, Restarted, restart

AGAIN_S, MAX_TRIES = 1.0, 60

_log = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a restart ended. `before`, `after`: what the orchestrator showed; `refused`: why nothing was restarted."""

    action: Action
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    refused: Conflict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    outcome: Outcome
    detail: str
    refused: Conflict | None = None


async def do_restart(plane: Plane, action: Action, *, before: Mapping[str, Any]) -> Ended:
    """Restart the daemon of the action's orchestrator, and write down how that ended."""
    try:
        told = await _restarted(plane, action)
    except Exception:  # noqa: BLE001 - whatever it was, the log of actions must not say that it goes on
        _log.exception("a restart failed inside", action=action.id, orchestrator=action.orchestrator)
        told = _Told(outcome="failed", detail="it failed inside; the control plane's log says how")
    ended = await _write_end(plane, action, told, before=before)
    _log.info("restarted", orchestrator=action.orchestrator, outcome=ended.action.outcome, detail=ended.action.detail)
    return ended


async def _restarted(plane: Plane, action: Action) -> _Told:
    vp = action.orchestrator
    try:
        machine, address = check_reachable(plane, vp)
    except Conflict as problem:
        return _refused(problem.code, str(problem))
    async with plane.errands.turn(machine):
        transport = _way(plane, machine, address)
        try:
            return _said(machine, await restart(transport, vp, holder=f"restart of {vp} by {action.actor}"))
        except LeaseHeld as problem:
            return _refused("lease_held", str(problem))
        except Unreachable as problem:
            return _refused("unreachable", str(problem))
        except NotRunning as problem:
            return _refused("not_running", str(problem))
        except MachineError as problem:
            return _Told(outcome="failed", detail=str(problem))
        finally:
            await transport.close()


def _way(plane: Plane, machine: str, address: str) -> Transport:
    declared = plane.control.doc.spec["machines"].get(machine, {})
    root = Path(declared["root"]) if declared.get("root") else plane.machine_root(machine)
    return transport_to(machine, address=address, root=root, home=plane.fleet_file.parent)


def _refused(code: str, problem: str) -> _Told:
    return _Told(outcome="failed", detail=problem, refused=Conflict(code, problem))


def _said(machine: str, done: Restarted) -> _Told:
    pids = f"{machine}: pid {done.before or 'none'} -> {done.pid or 'none'}"
    if done.problem:
        return _Told(outcome="failed", detail=f"{pids}; {done.problem}")
    return _Told(outcome="done", detail=pids if done.connected else f"{pids}; it has not connected yet")


async def _write_end(plane: Plane, action: Action, told: _Told, *, before: Mapping[str, Any]) -> Ended:
    """Write it down, again and again while the store can't be used: nobody else knows."""

    def end(conn: Connection) -> Ended:
        now_us = plane.clock.now_us()
        try:
            after: Mapping[str, Any] = show(plane, conn, action.orchestrator, now_us=now_us)
        except NotFound:
            after = {}  # an apply has removed it meanwhile
        ended = actions.end(
            conn,
            action,
            told.outcome,
            detail=told.detail,
            actor=action.actor,
            now_us=now_us,
            before=before,
            after=after,
        )
        return Ended(action=ended, before=before, after=after, refused=told.refused)

    for _ in range(MAX_TRIES):
        try:
            ended = await plane.store.write(end)
        except StoreError as problem:
            _log.error("how a restart ended can't be written yet", action=action.id, problem=str(problem))
            await asyncio.sleep(AGAIN_S)
        else:
            plane.pulse.nudge()
            return ended
    return await plane.store.write(end)


async def follow(plane: Plane) -> None:
    """End what people did to orchestrators and has come to its end by itself."""
    now_us = plane.clock.now_us()
    if not await plane.store.read(lambda conn: actions.any_to_settle(conn, now_us=now_us)):
        return
    settled = await plane.store.write(lambda conn: actions.settle(conn, now_us=now_us))
    plane.pulse.nudge()
    for one in settled:
        _log.info("an action ended", action=one.id, orchestrator=one.orchestrator, kind=one.action, outcome=one.outcome)
