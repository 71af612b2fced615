"""Restarting one orchestrator's daemon where it runs, without another generation.

look ▶ lease ▶ restart ▶ look again until it is healthy ▶ wait a moment for its link ▶ lease given back
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from orchestrator_fleet.errors import MachineError, Unreachable
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.plan.machine import read
from orchestrator_fleet.reconcile import health
from orchestrator_fleet.reconcile.leases import held
from orchestrator_fleet.reconcile.observe import observe_one
from orchestrator_fleet.reconcile.rollout import MachineRefused
from orchestrator_fleet.wire.machine import Observed, Refusal, Restart

RESTART_TIMEOUT_S = 60.0
HEALTHY_S = 30.0
LINK_S = 5.0
POLL_FIRST_S, POLL_LAST_S, POLL_GROWTH = 0.02, 0.2, 1.5
CONNECTED = "connected"


class NotRunning(MachineError):
    """There is no supervisord at the machine, or it lacks the program: nothing to restart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted:
    """What became of it. `problem` is empty when the new process is healthy; `connected`: it has its link again."""

    before: int
    pid: int
    problem: str = ""
    connected: bool = False


async def restart(transport: Transport, program: str, *, holder: str) -> Restarted:
    """Restart `program` under the machine's lease, and wait until its daemon says that it is up.

    Raises NotRunning, Unreachable, LeaseHeld when an apply is at the machine, MachineError for whatever else it says.
    """
    before = await _running(transport, program)
    async with held({transport.name: transport}, first=transport.name, holder=holder) as leases:
        if transport.name not in leases.tokens:
            raise Unreachable(transport.name, leases.problems[transport.name])
        asked = Restart(token=leases.tokens[transport.name], programs=(program,))
        answer = await transport.call(asked, timeout_s=RESTART_TIMEOUT_S)
        if isinstance(answer, Refusal):
            said = NotRunning if answer.code == "not_running" else MachineRefused
            raise said(transport.name, answer.problem)
        return await _became_healthy(transport, program, before=before)


async def _running(transport: Transport, program: str) -> int:
    """The pid of its process. Asked before the lease, which would make a root where there is none."""
    seen = await observe_one(transport)
    if isinstance(seen, str):
        raise Unreachable(transport.name, seen)
    if seen.supervisord != health.RUNNING:
        raise NotRunning(transport.name, "no supervisord runs there; `fleet apply` starts it")
    if program not in seen.programs:
        raise NotRunning(transport.name, f"supervisord has no {program}; `fleet apply` brings what is declared")
    return seen.programs[program].pid


async def _became_healthy(transport: Transport, program: str, *, before: int) -> Restarted:
    watch, pause_s = health.Watch(), POLL_FIRST_S
    began_s, healthy_s = time.monotonic(), None
    while True:
        seen, now_s = await observe_one(transport), time.monotonic()
        watch = watch if isinstance(seen, str) else watch.looked(seen, now_s=now_s)
        verdict, pid = _judged(seen, watch, program)
        if verdict.healthy:
            healthy_s = healthy_s or now_s
            connected = isinstance(seen, Observed) and seen.programs[program].link == CONNECTED
            if connected or now_s - healthy_s > LINK_S:
                return Restarted(before=before, pid=pid, connected=connected)
        elif verdict.hopeless or now_s - began_s > HEALTHY_S:
            late = "" if verdict.hopeless else f"not healthy within {HEALTHY_S:g} s: "
            return Restarted(before=before, pid=pid, problem=f"{late}{verdict.reason}")
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * POLL_GROWTH, POLL_LAST_S)


def _judged(seen: Observed | str, watch: health.Watch, program: str) -> tuple[health.Verdict, int]:
    """Whether the program is as its machine's current generation wants it, and its pid."""
    if isinstance(seen, str):
        return health.Verdict(reason=seen), 0
    manifest, now = read(seen).manifest, seen.programs.get(program)
    if now is None:
        return health.Verdict(reason=f"{program}: supervisord does not know it any more", hopeless=True), 0
    if manifest is None or seen.current is None:
        return health.Verdict(reason="its current generation was changed by hand; run `fleet apply`"), now.pid
    wanted = manifest.programs.get(program, "")
    verdict = health.judge_program(program, now, watch.programs[program], wanted=wanted, digest=seen.current)
    return verdict or health.Verdict(healthy=True), now.pid
