"""When a machine counts as healthy after a switch (pure: what was seen comes in, a verdict goes out).

Healthy is: every program of the current generation RUNNING, started as the generation says, its daemon's own
status naming this generation, and no process younger than `min_healthy`. The link to the control plane is not asked
for: machines must come up while it is down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator_fleet.plan.machine import read
from orchestrator_fleet.render.bundle import SUPERVISORD_CONF
from orchestrator_fleet.wire.machine import Observed, ProgramSeen

MAX_RESTARTS = 5
RUNNING, FATAL = "RUNNING", "FATAL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One program's present process, since when we know it, and how many came before it."""

    pid: int
    since_s: float
    restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`healthy`; else why not yet, and whether waiting longer is `hopeless`."""

    healthy: bool = False
    hopeless: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What has been seen of a machine's processes so far."""

    programs: Mapping[str, Seen] = field(default_factory=dict)

    def looked(self, observed: Observed, *, now_s: float) -> Watch:
        """The watch after one more look at `now_s` seconds (of any clock that only rises)."""
        return Watch(programs={name: self._after(name, program, now_s) for name, program in observed.programs.items()})

    def _after(self, name: str, program: ProgramSeen, now_s: float) -> Seen:
        before = self.programs.get(name)
        if before is None:
            return Seen(pid=program.pid, since_s=now_s)
        if before.pid == program.pid:
            return before
        restarted = 1 if before.pid and program.pid else 0
        return Seen(pid=program.pid, since_s=now_s, restarts=before.restarts + restarted)


def known_before(observed: Observed) -> Watch:
    """A watch that starts from processes that ran before the switch: those have proved themselves already."""
    return Watch(
        programs={
            name: Seen(pid=program.pid, since_s=float("-inf"))
            for name, program in observed.programs.items()
            if program.state == RUNNING
        }
    )


def judge(observed: Observed, watch: Watch, *, digest: str, min_healthy_s: float, now_s: float) -> Verdict:
    """Whether the machine is healthy under generation `digest`, by what this look and the watch show."""
    manifest = read(observed).manifest
    if observed.current != digest or manifest is None:
        return Verdict(reason=f"its current generation is {(observed.current or 'none')[:12]}, or changed by hand")
    if SUPERVISORD_CONF in manifest.files and observed.supervisord != RUNNING:
        return Verdict(reason="supervisord is down")
    for name, wanted in sorted(manifest.programs.items()):
        program, seen = observed.programs.get(name), watch.programs.get(name)
        if program is None or seen is None:
            return Verdict(reason=f"{name}: supervisord does not know it")
        if (verdict := judge_program(name, program, seen, wanted=wanted, digest=digest)) is not None:
            return verdict
    young = [name for name in manifest.programs if now_s - watch.programs[name].since_s < min_healthy_s]
    if young:
        return Verdict(reason=f"{', '.join(sorted(young))}: running for less than {min_healthy_s:g} s")
    return Verdict(healthy=True)


def judge_program(name: str, program: ProgramSeen, seen: Seen, *, wanted: str, digest: str) -> Verdict | None:
    """Why one program is not as it should be; None when it is."""
    detail = f": {program.detail}" if program.detail else ""
    if program.state == FATAL:
        return Verdict(hopeless=True, reason=f"{name}: FATAL{detail}; see log/{name}.log on the machine")
    if seen.restarts > MAX_RESTARTS:
        return Verdict(
            hopeless=True, reason=f"{name}: ended {seen.restarts} times since it was started; see log/{name}.log"
        )
    if program.state != RUNNING:
        return Verdict(reason=f"{name}: {program.state}{detail}")
    if program.program != wanted:
        return Verdict(reason=f"{name}: runs as program {program.program or 'unknown'}, wanted {wanted}")
    if program.generation != digest:
        told = (program.generation or "")[:12] or "nothing yet"
        return Verdict(reason=f"{name}: its daemon tells generation {told}, wanted {digest[:12]}")
    return None
