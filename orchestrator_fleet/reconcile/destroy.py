"""Taking everything down: programs, sessions, supervisords, generations, roots; declared or left over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from orchestrator_fleet.errors import MachineError, SpecInvalid, Unreachable
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.plan.model import CONTROL_PLANE
from orchestrator_fleet.reconcile import applied
from orchestrator_fleet.reconcile.leases import Held, held
from orchestrator_fleet.reconcile.look import opened
from orchestrator_fleet.reconcile.observe import PARALLEL
from orchestrator_fleet.reconcile.report import ApplyReport, Event, OnEvent, Outcome, Result, RolloutFailed, told
from orchestrator_fleet.reconcile.rollout import asked
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.spec.model import Machine
from orchestrator_fleet.wire.machine import Destroy, Done

TIMEOUT_S = 120.0


async def take_everything_down(fleet_file: Path, *, holder: str, on_event: OnEvent) -> ApplyReport:
    """Destroy every target; raises LeaseHeld, and RolloutFailed when something could not be ended or reached."""
    began, state = time.monotonic(), State(fleet_file)
    name, machines = _declared(fleet_file, state, on_event)
    async with opened(machines, state) as transports, held(transports, first=CONTROL_PLANE, holder=holder) as leases:
        outcomes = await _end_all(transports, leases, on_event)
    for folder in (state.machines, state.dir):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    report = ApplyReport(fleet=name, outcomes=outcomes, seconds=time.monotonic() - began)
    bad = report.having(Result.FAILED, Result.UNREACHABLE)
    if bad:
        raise RolloutFailed(f"not destroyed: {told(bad)}", report)
    return report


def _declared(fleet_file: Path, state: State, on_event: OnEvent) -> tuple[str, Mapping[str, Machine]]:
    """The fleet's name and machines. A broken fleet.yaml must not keep alive what runs: then, what was applied."""
    try:
        file = load_fleet(fleet_file).file
    except SpecInvalid as invalid:
        before = applied.read(state.control_root)
        if not (before or state.local_roots()):
            raise
        problem = invalid.diagnostics[0]
        on_event(Event(kind="spec_invalid", target="", text=f"{problem}; taking down what stands on this host"))
        return before[0].fleet if before else "", {}
    return file.fleet, file.machines


async def _end_all(transports: Mapping[str, Transport], leases: Held, on_event: OnEvent) -> dict[str, Outcome]:
    gate = asyncio.Semaphore(PARALLEL)

    async def one(name: str) -> Outcome:
        if name not in leases.tokens:
            return Outcome(target=name, result=Result.UNREACHABLE, reason=leases.problems[name])
        async with gate:
            outcome = await _end(transports[name], leases.tokens[name])
        if outcome.result in (Result.APPLIED, Result.UNCHANGED):
            leases.gone(name)
        return outcome

    outcomes = {}
    for ended in asyncio.as_completed([one(name) for name in transports]):
        outcome = await ended
        outcomes[outcome.target] = outcome
        kind = "destroyed" if outcome.result is Result.APPLIED else outcome.result.value
        if outcome.result is Result.UNCHANGED:
            continue
        on_event(Event(kind=kind, target=outcome.target, text=outcome.reason))
    return dict(sorted(outcomes.items()))


async def _end(transport: Transport, token: int) -> Outcome:
    try:
        answer = await asked(transport, Destroy(token=token), timeout_s=TIMEOUT_S)
    except MachineError as error:
        result = Result.UNREACHABLE if isinstance(error, Unreachable) else Result.FAILED
        why = str(error).removeprefix(f"{transport.name}: ")
        return Outcome(target=transport.name, result=result, reason=why)
    notes = answer.notes if isinstance(answer, Done) else ()
    if not notes:
        return Outcome(target=transport.name, result=Result.UNCHANGED, reason="nothing was there")
    return Outcome(target=transport.name, result=Result.APPLIED, reason="; ".join(notes))
