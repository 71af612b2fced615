"""The rollout: canary first, then batches; each machine is switched, watched, confirmed, or put back.

One failed machine ends the rollout: its batch is finished, the machines after it are not touched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator_fleet.errors import MachineError, Unreachable
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.reconcile import health
from orchestrator_fleet.reconcile.observe import observe_one
from orchestrator_fleet.reconcile.report import Event, OnEvent, Outcome, Result
from orchestrator_fleet.render.bundle import Bundle
from orchestrator_fleet.spec.model import Rollout
from orchestrator_fleet.wire.machine import Answer, Confirm, Observed, Refusal, Reject, Request, Switch

SWITCH_TIMEOUT_S = 120.0
SHORT_TIMEOUT_S = 40.0
POLL_FIRST_S, POLL_LAST_S, POLL_GROWTH = 0.02, 0.2, 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One target to bring to `bundle`: its transport and fencing token, what was there before, and the plan's steps."""

    transport: Transport
    token: int
    bundle: Bundle
    before: Observed
    start: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The target's name."""
        return self.transport.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Turned:
    """What became of one target, and the last look at it."""

    outcome: Outcome
    seen: Observed | None = None


class MachineRefused(MachineError):
    """The machine said no."""


async def asked(transport: Transport, request: Request, *, timeout_s: float = SHORT_TIMEOUT_S) -> Answer:
    """Ask for a change; raises MachineRefused when the machine says no, Unreachable when it says nothing."""
    answer = await transport.call(request, timeout_s=timeout_s)
    if isinstance(answer, Refusal):
        raise MachineRefused(transport.name, answer.problem)
    return answer


def batches(works: Sequence[Work], *, canary: int, max_parallel: int) -> list[list[Work]]:
    """The canaries, then the others in groups of at most `max_parallel`; no group is empty."""
    first, rest = list(works[:canary]), works[canary:]
    groups = [list(rest[at : at + max_parallel]) for at in range(0, len(rest), max_parallel)]
    return [first, *groups] if first else groups


async def roll(
    works: Sequence[Work], *, policy: Rollout, spare_unreachable: int, halt: asyncio.Event, on_event: OnEvent
) -> dict[str, Turned]:
    """Bring every target to its bundle, batch by batch; what became of each.

    `spare_unreachable`: how many more may be out of reach. `halt`, once set, lets the machines in hand finish.
    """
    turned: dict[str, Turned] = {}
    why_not = ""
    for batch in batches(works, canary=policy.canary, max_parallel=policy.max_parallel):
        why_not = why_not or ("interrupted" if halt.is_set() else "")
        if why_not:
            turned |= {work.name: _skipped(work, why_not, on_event) for work in batch}
            continue
        done = await asyncio.gather(*(turn(work, policy=policy, on_event=on_event) for work in batch))
        turned |= {work.name: one for work, one in zip(batch, done, strict=True)}
        bad = [one.outcome.target for one in done if one.outcome.result in (Result.FAILED, Result.ROLLED_BACK)]
        lost = [one.outcome.target for one in turned.values() if one.outcome.result is Result.UNREACHABLE]
        if bad:
            why_not = f"the rollout stopped at {', '.join(bad)}"
        elif len(lost) > spare_unreachable:
            why_not = f"more machines are out of reach than max_unreachable allows: {', '.join(lost)}"
    return turned


def _skipped(work: Work, reason: str, on_event: OnEvent) -> Turned:
    on_event(Event(kind="skipped", target=work.name, text=reason))
    outcome = Outcome(target=work.name, result=Result.SKIPPED, reason=reason, generation=work.before.current)
    return Turned(outcome=outcome, seen=work.before)


async def turn(work: Work, *, policy: Rollout, on_event: OnEvent) -> Turned:
    """Bring one target to its bundle, or back to its last good generation. Never raises for what a machine does."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(policy.progress_deadline):
            turned = await _turn(work, policy=policy, on_event=on_event)
    except Unreachable as error:
        turned = _ended(work, Result.UNREACHABLE, str(error).removeprefix(f"{work.name}: "))
    except MachineError as error:
        turned = _ended(work, Result.FAILED, str(error).removeprefix(f"{work.name}: "))
    except TimeoutError:
        turned = _ended(work, Result.FAILED, f"not done within progress_deadline, {policy.progress_deadline:g} s")
    outcome = Outcome(
        target=work.name,
        result=turned.outcome.result,
        reason=turned.outcome.reason,
        generation=turned.outcome.generation,
        seconds=time.monotonic() - began,
    )
    on_event(Event(kind=outcome.result.value, target=work.name, text=outcome.reason))
    return Turned(outcome=outcome, seen=turned.seen)


def _ended(work: Work, result: Result, reason: str, seen: Observed | None = None) -> Turned:
    generation = seen.current if seen is not None else None
    return Turned(outcome=Outcome(target=work.name, result=result, reason=reason, generation=generation), seen=seen)


async def _turn(work: Work, *, policy: Rollout, on_event: OnEvent) -> Turned:
    digest = work.bundle.digest
    on_event(Event(kind="switching", target=work.name, text=f"to {digest[:12]}"))
    request = Switch(token=work.token, digest=digest, start=work.start, stop=work.stop, restart=work.restart)
    problem, seen = await _switched(work, request, policy=policy, on_event=on_event)
    if not problem:
        await asked(work.transport, Confirm(token=work.token, digest=digest))
        return _ended(work, Result.APPLIED, "", seen)
    on_event(Event(kind="rejected", target=work.name, text=problem))
    await asked(work.transport, Reject(token=work.token, digest=digest, reason=problem))
    good = work.before.last_good
    if not policy.auto_revert or good is None or good == digest:
        why = "auto_revert is off" if not policy.auto_revert else "there is no other good generation to go back to"
        return _ended(work, Result.FAILED, f"{problem}; {why}", seen)
    return await _go_back(work, good, problem, policy=policy, on_event=on_event)


async def _go_back(work: Work, good: str, problem: str, *, policy: Rollout, on_event: OnEvent) -> Turned:
    """Switch to the last good generation. The machine itself finds what that needs started, stopped and renewed."""
    back = Switch(
        token=work.token,
        digest=good,
        start=work.stop if work.before.current == good else (),
        stop=work.start if work.before.current == good else (),
        restart=work.restart if work.before.current == good else (),
    )
    worse, seen = await _switched(work, back, policy=policy, on_event=on_event)
    if worse:
        return _ended(work, Result.FAILED, f"{problem}; and going back to {good[:12]} failed: {worse}", seen)
    await asked(work.transport, Confirm(token=work.token, digest=good))
    return _ended(work, Result.ROLLED_BACK, f"{problem}; back to {good[:12]}", seen)


async def _switched(work: Work, request: Switch, *, policy: Rollout, on_event: OnEvent) -> tuple[str, Observed | None]:
    """Switch and wait for health: why it is not healthy (empty when it is), and the last look."""
    try:
        await asked(work.transport, request, timeout_s=SWITCH_TIMEOUT_S)
    except MachineRefused as error:
        return str(error).removeprefix(f"{work.name}: "), None
    return await _became_healthy(work, request.digest, policy=policy, on_event=on_event)


async def _became_healthy(
    work: Work, digest: str, *, policy: Rollout, on_event: OnEvent
) -> tuple[str, Observed | None]:
    watch = health.known_before(work.before)
    deadline = time.monotonic() + policy.healthy_deadline
    pause_s, told = POLL_FIRST_S, ""
    while True:
        seen = await observe_one(work.transport)
        now_s = time.monotonic()
        if isinstance(seen, str):
            verdict = health.Verdict(reason=seen)
        else:
            watch = watch.looked(seen, now_s=now_s)
            verdict = health.judge(seen, watch, digest=digest, min_healthy_s=policy.min_healthy, now_s=now_s)
        last = seen if isinstance(seen, Observed) else None
        if verdict.healthy:
            return "", last
        if verdict.hopeless:
            return verdict.reason, last
        if now_s > deadline:
            return f"not healthy within {policy.healthy_deadline:g} s: {verdict.reason}", last
        if verdict.reason != told:
            told = verdict.reason
            on_event(Event(kind="waiting", target=work.name, text=told))
        await asyncio.sleep(min(pause_s, policy.min_healthy or pause_s))
        pause_s = min(pause_s * POLL_GROWTH, POLL_LAST_S)
