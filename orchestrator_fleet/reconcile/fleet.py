"""The doors of the fleet loop: plan, apply, status, destroy. Each is one pass from a fresh look.

They run an event loop of their own, so a caller that has one calls them in a thread.
"""

from __future__ import annotations

import asyncio
import getpass
import socket
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from orchestrator_fleet.clock import SystemClock
from orchestrator_fleet.errors import StalePlan, UsageError
from orchestrator_fleet.plan.between import make_plan, plan_id, summarise
from orchestrator_fleet.plan.model import CONTROL_PLANE, Plan
from orchestrator_fleet.reconcile.apply import KeyRow, RegisterKeys, apply
from orchestrator_fleet.reconcile.conditions import FleetStatus, fleet_status
from orchestrator_fleet.reconcile.destroy import take_everything_down
from orchestrator_fleet.reconcile.interrupts import Brake
from orchestrator_fleet.reconcile.look import Look, look, opened
from orchestrator_fleet.reconcile.report import ApplyReport, OnEvent, nobody

GIT_TIMEOUT_S = 5.0
MAX_NAMED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan and what it was made from. `only`: the targets it was narrowed to, None for all."""

    plan: Plan
    seen: Look
    fleet_file: Path
    only: frozenset[str] | None = None


def plan_fleet(fleet_file: Path, *, only: Collection[str] | None = None, allow_deletes: bool = False) -> Planned:
    """Look at everything and plan; `only` keeps the control plane and the machines it names.

    `allow_deletes` lifts `rollout.max_deletes`. Raises SpecInvalid, UsageError for a machine there is none of,
    Protected and Refused as `make_plan` does. Changes nothing anywhere.
    """
    seen = asyncio.run(look(fleet_file))
    policy = seen.fleet.file.rollout
    plan = make_plan(
        desired=seen.desired,
        observed=seen.observed,
        fleet=seen.fleet.file.fleet,
        revision=revision(seen.state.home),
        now_us=SystemClock().now_us(),
        max_deletes=1.0 if allow_deletes else policy.max_deletes,
        drift=policy.drift,
    )
    if only is None:
        return Planned(plan=plan, seen=seen, fleet_file=fleet_file)
    names = frozenset({*only, CONTROL_PLANE})
    return Planned(plan=narrowed(plan, names), seen=seen, fleet_file=fleet_file, only=names)


def narrowed(plan: Plan, names: Collection[str]) -> Plan:
    """The part of a plan that is about these targets; raises UsageError for a name the plan has not."""
    unknown = sorted(set(names) - {target.name for target in plan.targets})
    if unknown:
        there = ", ".join([target.name for target in plan.targets if target.name != CONTROL_PLANE][:MAX_NAMED])
        raise UsageError(f"--only: there is no machine {', '.join(unknown)}; there are {there}")
    targets = tuple(target for target in plan.targets if target.name in names)
    actions = tuple(action for action in plan.actions if action.target in names)
    part = msgspec.structs.replace(plan, targets=targets, actions=actions, summary=summarise(targets, actions))
    return msgspec.structs.replace(part, id=plan_id(part))


def revision(home: Path) -> str:
    """The git commit that the fleet folder is at; empty when it is in no repository, or git does not answer."""
    try:
        done = subprocess.run(
            ["git", "-C", str(home), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()


def plan_again(fleet_file: Path, saved: Plan, *, allow_deletes: bool = False) -> Planned:
    """Plan now for the targets of a saved plan, and hold the two against each other; raises StalePlan."""
    fresh = plan_fleet(fleet_file, allow_deletes=allow_deletes)
    here = {target.name for target in fresh.plan.targets}
    gone = sorted({target.name for target in saved.targets} - here)
    if gone:
        raise StalePlan(f"{', '.join(gone)}: in the plan, but no longer in the fleet; make a new plan")
    names = frozenset(target.name for target in saved.targets)
    planned = Planned(plan=narrowed(fresh.plan, names), seen=fresh.seen, fleet_file=fleet_file, only=names)
    refuse_if_stale(planned.plan, saved)
    return planned


def refuse_if_stale(fresh: Plan, saved: Plan) -> None:
    """Raise StalePlan unless the saved plan was made from the same spec and the same observed state."""
    before = {target.name: target for target in saved.targets}
    now = {target.name: target for target in fresh.targets}
    moved = [n for n, t in now.items() if n not in before or t.fingerprint != before[n].fingerprint]
    moved += [n for n in before if n not in now]
    respecified = [n for n, t in now.items() if n in before and t.desired != before[n].desired]
    if moved:
        raise StalePlan(f"{', '.join(sorted(set(moved)))} moved since the plan was made; make a new plan")
    if respecified:
        raise StalePlan(f"fleet.yaml changed since the plan, for {', '.join(respecified)}; make a new plan")


def apply_plan(
    planned: Planned,
    *,
    holder: str | None = None,
    on_event: OnEvent = nobody,
    saved: Plan | None = None,
    register_keys: RegisterKeys | None = None,
    brake: Brake | None = None,
) -> ApplyReport:
    """Do what the plan says, and nothing where it says nothing; `saved` is a plan that must still be true.

    `brake` stops it from another thread: the machines in hand are finished.

    Raises StalePlan, LeaseHeld, MachineError, RolloutFailed (also when the daemons' keys can't be registered) and
    RolloutReverted, both with the report.
    """
    if saved is not None:
        refuse_if_stale(planned.plan, saved)
    register = register_keys or _registrar(planned.seen)
    return asyncio.run(_apply(planned, holder=holder or who(), on_event=on_event, register_keys=register, brake=brake))


async def _apply(
    planned: Planned, *, holder: str, on_event: OnEvent, register_keys: RegisterKeys, brake: Brake | None
) -> ApplyReport:
    seen = planned.seen
    async with opened(seen.fleet.file.machines, seen.state) as transports:
        return await apply(
            planned.plan, seen, transports, holder=holder, register_keys=register_keys, on_event=on_event, brake=brake
        )


def _registrar(seen: Look) -> RegisterKeys:
    url = seen.state.store_url(seen.fleet.file.control_plane.store)

    def register(rows: Sequence[KeyRow]) -> int:
        # Imported here: a plan, and an apply of a fleet without daemons, need no database.
        from orchestrator_fleet.store.daemon_keys import register_daemon_keys  # noqa: PLC0415

        return register_daemon_keys(url, rows)

    return register


def who() -> str:
    """Who asks, as leases name them: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "somebody"
    return f"{user}@{socket.gethostname()}"


def status(fleet_file: Path) -> FleetStatus:
    """What is there now, and what is to be said of it; raises SpecInvalid. Changes nothing anywhere."""
    seen = asyncio.run(look(fleet_file))
    return fleet_status(seen)


def destroy(fleet_file: Path, *, holder: str | None = None, on_event: OnEvent = nobody) -> ApplyReport:
    """End everything that runs anywhere and remove what apply made, also on machines no longer declared.

    With a fleet.yaml that can't be read this is what stands on this host; SpecInvalid is raised where nothing does.
    The live store, history and keys stay. Raises LeaseHeld, RolloutFailed (with the report).
    """
    return asyncio.run(take_everything_down(fleet_file, holder=holder or who(), on_event=on_event))
