"""All of one apply, in its order.

    leases on all that is touched ─▶ look again ─▶ stage everywhere ─▶ control plane ─▶ machines, batch by batch
        ─▶ machines that are to go ─▶ old generations ─▶ daemon keys ─▶ leases back

Nothing that runs is touched before every target has all it needs, and nothing old is removed before the new is healthy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator_fleet.errors import FleetError, MachineError, StalePlan, Unreachable
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.plan.model import CONTROL_PLANE, Plan
from orchestrator_fleet.reconcile.control import put_in_force
from orchestrator_fleet.reconcile.interrupts import Brake, first_finishes
from orchestrator_fleet.reconcile.leases import Held, held
from orchestrator_fleet.reconcile.look import Look
from orchestrator_fleet.reconcile.observe import PARALLEL, observe
from orchestrator_fleet.reconcile.report import (
    ApplyReport,
    Event,
    OnEvent,
    Outcome,
    Result,
    RolloutFailed,
    RolloutReverted,
    told,
)
from orchestrator_fleet.reconcile.rollout import Work, asked, roll
from orchestrator_fleet.reconcile.staging import stage
from orchestrator_fleet.wire.machine import Destroy, Observed, Prune

DESTROY_TIMEOUT_S = 120.0
CANARY_LABEL, CANARY = "tier", "canary"

KeyRow = tuple[str, str, str, str]  # orchestrator, machine, key id, SHA-256
RegisterKeys = Callable[[Sequence[KeyRow]], int]


@dataclass(slots=True, kw_only=True)
class _Pass:
    """One apply under way: what it works on, and what became of the targets so far."""

    plan: Plan
    seen: Look
    transports: Mapping[str, Transport]
    halt: asyncio.Event
    on_event: OnEvent
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    last: dict[str, Observed] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """Whether something failed, so that nothing more may be begun."""
        bad = (Result.FAILED, Result.ROLLED_BACK, Result.SKIPPED)
        return any(outcome.result in bad for outcome in self.outcomes.values())

    def end(self, target: str, result: Result, reason: str = "") -> None:
        """Note what became of a target."""
        seen = self.last.get(target)
        generation = seen.current if seen is not None else None
        self.outcomes[target] = Outcome(target=target, result=result, reason=reason, generation=generation)
        if result is not Result.UNCHANGED:
            self.on_event(Event(kind=result.value, target=target, text=reason))

    def steps(self, target: str, kind: str) -> tuple[str, ...]:
        """The subjects of the plan's actions of one kind on a target."""
        return tuple(a.subject for a in self.plan.actions if a.target == target and a.kind == kind)


async def apply(
    plan: Plan,
    seen: Look,
    transports: Mapping[str, Transport],
    *,
    holder: str,
    register_keys: RegisterKeys,
    on_event: OnEvent,
    brake: Brake | None = None,
) -> ApplyReport:
    """Do what the plan says; raises LeaseHeld, StalePlan, RolloutFailed, RolloutReverted.

    `transports` has a way to every target of the plan. `brake` stops it from another thread.
    """
    began = time.monotonic()
    with first_finishes(on_event, brake) as halt:
        work = _Pass(plan=plan, seen=seen, transports=transports, halt=halt, on_event=on_event)
        _note_what_is_known(work)
        touched = sorted({a.target for a in plan.actions if a.kind != "no-op"} - work.outcomes.keys())
        if touched:
            ways = {name: transports[name] for name in (CONTROL_PLANE, *touched)}
            async with held(ways, first=CONTROL_PLANE, holder=holder) as leases:
                await _change(work, [name for name in touched if name in leases.tokens], leases)
        registered, keys_problem = await asyncio.to_thread(_register, work, register_keys)
        report = ApplyReport(
            fleet=plan.fleet,
            outcomes={target.name: work.outcomes[target.name] for target in plan.targets},
            keys_registered=registered,
            seconds=time.monotonic() - began,
            interrupted=halt.is_set(),
        )
    _raise_if_bad(report, spare=seen.fleet.file.rollout.max_unreachable)
    if keys_problem:
        problem = f"the daemons' keys are not registered, so new daemons can't connect: {keys_problem}"
        raise RolloutFailed(problem, report)
    return report


def _note_what_is_known(work: _Pass) -> None:
    """The targets that were out of reach, and those with nothing to do."""
    busy = {action.target for action in work.plan.actions if action.kind != "no-op"}
    for target in work.plan.targets:
        there = work.seen.observed.get(target.name)
        if isinstance(there, Observed):
            work.last[target.name] = there
        if target.problem:
            work.end(target.name, Result.UNREACHABLE, target.problem)
        elif target.name not in busy:
            work.end(target.name, Result.UNCHANGED, "nothing to do")


async def _change(work: _Pass, touched: list[str], leases: Held) -> None:
    """Change the targets in `touched`, all of which are held."""
    for name, problem in leases.problems.items():
        work.end(name, Result.UNREACHABLE, problem)
    work.on_event(Event(kind="leased", target="", text=f"{len(leases.tokens)} targets"))
    await _refuse_if_moved(work, touched)
    going = [name for name in touched if work.seen.wanted(name) is None]
    staying = [name for name in touched if name not in going]
    spare = work.seen.fleet.file.rollout.max_unreachable - _unreachable(work)
    if spare < 0:
        _skip(work, touched, "more machines are out of reach than max_unreachable allows")
        return
    await _stage(work, staying, leases)
    if work.broken:
        _skip(work, touched, "staging failed elsewhere, so nothing was switched")
        return
    await _control_plane(work, staying, leases)
    if work.broken:
        _skip(work, touched, "the control plane could not be changed")
        return
    await _machines(work, staying, leases)
    if work.broken or work.halt.is_set():
        _skip(work, touched, "what goes is removed only after all else is healthy")
        return
    await _take_down(work, going, leases)
    await _prune(work, staying, leases)


def _unreachable(work: _Pass) -> int:
    return sum(outcome.result is Result.UNREACHABLE for outcome in work.outcomes.values())


def _skip(work: _Pass, names: Sequence[str], reason: str) -> None:
    for name in names:
        if name not in work.outcomes:
            work.end(name, Result.SKIPPED, reason)


async def _refuse_if_moved(work: _Pass, touched: Sequence[str]) -> None:
    """Look again, now that nobody else can change anything: another apply may have been here since the plan."""
    now = await observe({name: work.transports[name] for name in touched}, documents_for=lambda _: False)
    planned = {target.name: target.observed for target in work.plan.targets}
    moved = [n for n, there in now.items() if isinstance(there, Observed) and there.current != planned[n]]
    if moved:
        raise StalePlan(f"{', '.join(moved)} moved since the plan was made; plan again")
    work.last.update({name: there for name, there in now.items() if isinstance(there, Observed)})


async def _each(work: _Pass, names: Sequence[str], do: Callable[[str], Awaitable[None]]) -> None:
    """Do one thing to several targets at once; what a target refuses or does not answer becomes its outcome."""
    gate = asyncio.Semaphore(PARALLEL)

    async def one(name: str) -> None:
        async with gate:
            try:
                await do(name)
            except Unreachable as error:
                work.end(name, Result.UNREACHABLE, _without_name(error))
            except MachineError as error:
                work.end(name, Result.FAILED, _without_name(error))

    await asyncio.gather(*(one(name) for name in names))


def _without_name(error: MachineError) -> str:
    return str(error).removeprefix(f"{error.machine}: ")


async def _stage(work: _Pass, names: Sequence[str], leases: Held) -> None:
    """Bring every bundle to its target before anything is switched anywhere."""

    async def one(name: str) -> None:
        bundle, there = work.seen.wanted(name), work.last.get(name)
        if bundle is None or (there is not None and _has(there, bundle.digest)):
            return
        await stage(work.transports[name], bundle, token=leases.tokens[name], seen=there)
        work.on_event(Event(kind="staged", target=name, text=bundle.digest[:12]))

    await _each(work, names, one)


def _has(there: Observed, digest: str) -> bool:
    return there.current == digest and not (there.drifted or there.missing or there.foreign)


async def _control_plane(work: _Pass, names: Sequence[str], leases: Held) -> None:
    """The control plane first, so that it knows whoever is about to call."""

    async def one(name: str) -> None:
        digest = work.seen.desired.control.digest
        await put_in_force(work.transports[name], digest, token=leases.tokens[name])
        work.end(name, Result.APPLIED)
        work.outcomes[name] = Outcome(target=name, result=Result.APPLIED, generation=digest)

    await _each(work, [name for name in names if name == CONTROL_PLANE], one)
    outcome = work.outcomes.get(CONTROL_PLANE)
    if outcome is not None and outcome.result is Result.UNREACHABLE:
        work.end(CONTROL_PLANE, Result.FAILED, outcome.reason)


async def _machines(work: _Pass, names: Sequence[str], leases: Held) -> None:
    """Roll the new generations out."""
    policy = work.seen.fleet.file.rollout
    ready = [name for name in names if name != CONTROL_PLANE and name not in work.outcomes]
    turned = await roll(
        [_work(work, name, leases) for name in sorted(ready, key=lambda name: _turn_of(work, name))],
        policy=policy,
        spare_unreachable=policy.max_unreachable - _unreachable(work),
        halt=work.halt,
        on_event=work.on_event,
    )
    for name, one in turned.items():
        work.outcomes[name] = one.outcome
        if one.seen is not None:
            work.last[name] = one.seen


def _turn_of(work: _Pass, name: str) -> tuple[bool, bool, str]:
    """Labelled canaries first; then who lets orchestrators go, so that those that move rarely run twice."""
    labels = work.seen.fleet.file.machines[name].labels
    return (labels.get(CANARY_LABEL) != CANARY, not work.steps(name, "stop"), name)


def _work(work: _Pass, name: str, leases: Held) -> Work:
    return Work(
        transport=work.transports[name],
        token=leases.tokens[name],
        bundle=work.seen.desired.machines[name],
        before=work.last[name],
        start=work.steps(name, "start"),
        stop=work.steps(name, "stop"),
        restart=work.steps(name, "restart"),
    )


async def _take_down(work: _Pass, names: Sequence[str], leases: Held) -> None:
    """End and remove the machines that fleet.yaml no longer names."""

    async def one(name: str) -> None:
        await asked(work.transports[name], Destroy(token=leases.tokens[name]), timeout_s=DESTROY_TIMEOUT_S)
        leases.gone(name)
        work.last.pop(name, None)
        work.end(name, Result.APPLIED, "taken down")

    await _each(work, names, one)


async def _prune(work: _Pass, names: Sequence[str], leases: Held) -> None:
    """Remove old generations, last of all. What can't be removed now is removed by a later apply."""
    keep = work.seen.fleet.file.rollout.keep_generations

    async def one(name: str) -> None:
        try:
            await asked(work.transports[name], Prune(token=leases.tokens[name], keep=keep))
        except MachineError as error:
            work.on_event(Event(kind="pruned", target=name, text=f"old generations stay: {_without_name(error)}"))

    applied = {outcome.target for outcome in work.outcomes.values() if outcome.result is Result.APPLIED}
    await _each(work, [name for name in names if name in applied], one)


def _register(work: _Pass, register_keys: RegisterKeys) -> tuple[int, str]:
    """Hand the daemons' key hashes to the live store; how many it did not have, and why it took none, if so.

    A store that can't be used must not hide what became of the machines.
    """
    rows = [
        (orchestrator, machine, program.key.id, program.key.sha256)
        for machine, bundle in work.seen.desired.machines.items()
        for orchestrator, program in (work.last[machine].programs.items() if machine in work.last else ())
        if program.key is not None and orchestrator in bundle.manifest.programs
    ]
    try:
        added = register_keys(sorted(rows)) if rows else 0
    except FleetError as error:
        work.on_event(Event(kind="keys", target="", text=f"not registered: {error}"))
        return 0, f"{error}; then apply again"
    if added:
        work.on_event(Event(kind="keys", target="", text=f"{added} daemon keys registered"))
    return added, ""


def _raise_if_bad(report: ApplyReport, *, spare: int) -> None:
    """Turn what became of the targets into the error that a person should read, if any."""
    failed, reverted = report.having(Result.FAILED), report.having(Result.ROLLED_BACK)
    lost, skipped = report.having(Result.UNREACHABLE), report.having(Result.SKIPPED)
    rest = f"; not touched: {', '.join(outcome.target for outcome in skipped)}" if skipped else ""
    if failed:
        raise RolloutFailed(f"not applied: {told([*failed, *reverted])}{rest}", report)
    if reverted:
        raise RolloutReverted(f"rolled back: {told(reverted)}{rest}", report)
    if len(lost) > spare:
        raise RolloutFailed(f"out of reach, more than max_unreachable ({spare}): {told(lost)}{rest}", report)
    if skipped:
        why = "interrupted" if report.interrupted else "stopped"
        raise RolloutFailed(f"{why}: {told(skipped)}; apply again for the rest", report)
