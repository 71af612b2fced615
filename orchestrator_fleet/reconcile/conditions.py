"""What is said of each machine and program: conditions, each with its reason (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from orchestrator_fleet.plan.machine import drift, read
from orchestrator_fleet.plan.model import CONTROL_PLANE
from orchestrator_fleet.reconcile.look import Look
from orchestrator_fleet.render.bundle import SUPERVISORD_CONF, Bundle
from orchestrator_fleet.wire.machine import Observed, ProgramSeen

TRUE, FALSE, UNKNOWN = "True", "False", "Unknown"
MAX_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """`type` is Ready or Linked; `status` True, False or Unknown; `reason` one word, `message` a sentence.

    `generation` is the one that this was seen under.
    """

    type: str
    status: str
    reason: str
    message: str = ""
    generation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramStatus:
    """One orchestrator's daemon. `since_us`: when its process started (microseconds since 1970 UTC), or 0."""

    state: str
    pid: int = 0
    since_us: int = 0
    generation: str | None = None
    charter_version: str | None = None
    link: str = "unknown"
    sessions: int = 0
    detail: str = ""
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineStatus:
    """One target. `generation`: what it has, `desired`: what it ought to have, both None when there is none."""

    name: str
    declared: bool
    generation: str | None = None
    desired: str | None = None
    last_good: str | None = None
    supervisord: str = "UNKNOWN"
    supervisord_pid: int = 0
    programs: dict[str, ProgramStatus] = field(default_factory=dict)
    generations: tuple[str, ...] = ()
    drifted: tuple[str, ...] = ()
    lease: str = ""
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStatus:
    """The whole fleet as seen now."""

    fleet: str
    control_plane: MachineStatus
    machines: tuple[MachineStatus, ...]

    @property
    def ready(self) -> bool:
        """Whether every target is Ready."""
        return all(is_ready(target) for target in (self.control_plane, *self.machines))


def is_ready(target: MachineStatus) -> bool:
    """Whether the target's Ready condition is True."""
    return any(c.type == "Ready" and c.status == TRUE for c in target.conditions)


def fleet_status(seen: Look) -> FleetStatus:
    """The status of every target, declared ones and those that are left over."""
    names = sorted((seen.desired.machines.keys() | seen.observed.keys()) - {CONTROL_PLANE})
    return FleetStatus(
        fleet=seen.fleet.file.fleet,
        control_plane=_target(CONTROL_PLANE, seen),
        machines=tuple(_target(name, seen) for name in names),
    )


def _target(name: str, seen: Look) -> MachineStatus:
    bundle, there = seen.wanted(name), seen.observed[name]
    desired = bundle.digest if bundle is not None else None
    if isinstance(there, str):
        unknown = Condition(type="Ready", status=UNKNOWN, reason="Unreachable", message=there)
        return MachineStatus(name=name, declared=bundle is not None, desired=desired, conditions=(unknown,))
    return MachineStatus(
        name=name,
        declared=bundle is not None,
        generation=there.current,
        desired=desired,
        last_good=there.last_good,
        supervisord=there.supervisord,
        supervisord_pid=there.supervisord_pid,
        programs=_programs(there),
        generations=there.generations,
        drifted=tuple(path for path, _ in drift(there)),
        lease=there.lease.holder if there.lease is not None else "",
        conditions=(_ready(there, bundle),),
    )


def _ready(there: Observed, bundle: Bundle | None) -> Condition:
    """The first thing that is wrong, or that all is well."""
    for reason, message in _wrong(there, bundle):
        return Condition(type="Ready", status=FALSE, reason=reason, message=message, generation=there.current)
    return Condition(type="Ready", status=TRUE, reason="Converged", generation=there.current)


def _wrong(there: Observed, bundle: Bundle | None) -> Iterator[tuple[str, str]]:
    if bundle is None:
        yield "Undeclared", "fleet.yaml no longer names it; `fleet apply` takes it down"
        return
    if there.current is None:
        yield "NotApplied", "nothing is applied here yet"
        return
    manifest = read(there).manifest
    if manifest is not None and SUPERVISORD_CONF in manifest.files and there.supervisord != "RUNNING":
        yield "SupervisordDown", "supervisord does not run; `fleet apply` starts it"
    down = [n for n in (manifest.programs if manifest else ()) if not _runs(there.programs.get(n))]
    if down:
        yield "ProgramsDown", f"not running: {', '.join(sorted(down)[:MAX_NAMED])}"
    if there.current != bundle.digest:
        yield "Outdated", f"generation {there.current[:12]}, wanted {bundle.digest[:12]}; `fleet apply` brings it"
    drifted = [path for path, _ in drift(there)]
    if drifted:
        yield "Drifted", f"changed by hand: {', '.join(drifted[:MAX_NAMED])}"
    behind = [n for n, p in there.programs.items() if _runs(p) and p.generation != there.current]
    if behind:
        yield "Reloading", f"not yet on this generation: {', '.join(sorted(behind)[:MAX_NAMED])}"
    if there.current in there.rejected:
        yield "Rejected", there.rejected[there.current]


def _runs(program: ProgramSeen | None) -> bool:
    return program is not None and program.state == "RUNNING"


def _programs(there: Observed) -> dict[str, ProgramStatus]:
    """Every program that supervisord has or the generation names."""
    manifest = read(there).manifest
    names = sorted(set(there.programs) | set(manifest.programs if manifest is not None else ()))
    return {name: _program(there.programs.get(name), there) for name in names}


def _program(seen: ProgramSeen | None, there: Observed) -> ProgramStatus:
    if seen is None:
        down = Condition(type="Ready", status=FALSE, reason="Down", generation=there.current)
        return ProgramStatus(state="STOPPED", conditions=(down,))
    running = seen.state == "RUNNING"
    current = seen.generation == there.current
    reason = ("Running" if current else "Reloading") if running else seen.state.capitalize()
    ready = Condition(
        type="Ready",
        status=TRUE if running and current else FALSE,
        reason=reason,
        message=seen.detail,
        generation=seen.generation,
    )
    linked = Condition(
        type="Linked",
        status=TRUE if seen.link == "connected" else UNKNOWN if seen.link == "unknown" else FALSE,
        reason=seen.link.capitalize(),
        message=seen.detail,
        generation=seen.generation,
    )
    return ProgramStatus(
        state=seen.state,
        pid=seen.pid,
        since_us=seen.since_us,
        generation=seen.generation,
        charter_version=seen.charter_version,
        link=seen.link,
        sessions=seen.sessions,
        detail=seen.detail,
        conditions=(ready, linked),
    )
