"""Planning and applying from `fleet serve`: what the CLI does, on a thread beside the requests, one pass at a time.

    plan (holds `declaring`: no file changes under it) ─▶ apply ─▶ what is in force is read anew

A pass runs an event loop of its own on a thread that does not keep the process alive: a control plane that is ended
lets it finish the machines in hand, for CLOSE_S, and what is left then is what an apply that was killed leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from orchestrator_fleet import log
from orchestrator_fleet.errors import FleetError, LeaseHeld, Protected, Refused, SpecInvalid, StalePlan, UsageError
from orchestrator_fleet.plan import show
from orchestrator_fleet.reconcile import fleet, report
from orchestrator_fleet.reconcile.apply import RegisterKeys
from orchestrator_fleet.reconcile.fleet import Planned
from orchestrator_fleet.reconcile.interrupts import Brake
from orchestrator_fleet.reconcile.report import ApplyReport, Event, Result, RolloutFailed, RolloutReverted

HOLDER = "fleet serve"
CLOSE_S = 10.0
MAX_STALE = 3

APPLIED, UNCHANGED, FAILED, ROLLED_BACK, REFUSED, BUSY, UNSOUND, STOPPED = (
    "applied",
    "unchanged",
    "failed",
    "rolled_back",
    "refused",
    "lease_held",
    "fleet_unsound",
    "stopped",
)

T = TypeVar("T")

_log = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What came of planning and applying once.

    `result`: applied, unchanged (there was nothing to do), failed, rolled_back, refused (by a guard of the plan),
    lease_held (somebody else is at it), fleet_unsound, stopped (the control plane is closing). `problem` says why it
    is neither of the first two. `summary` is the plan in a line. `wanted`: target -> the generation it was to have.
    """

    result: str
    problem: str = ""
    summary: str = ""
    report: ApplyReport | None = None
    wanted: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether the machines are what the fleet's files say."""
        return self.result in (APPLIED, UNCHANGED)

    @property
    def rejected(self) -> dict[str, str | None]:
        """The targets that did not become what they were to be, with the generation they refused."""
        bad = self.report.having(Result.FAILED, Result.ROLLED_BACK) if self.report else []
        return {outcome.target: self.wanted.get(outcome.target) for outcome in bad}

    def to_json(self) -> dict[str, Any]:
        """For an answer of the API."""
        told: dict[str, Any] = {"result": self.result, "problem": self.problem or None, "summary": self.summary}
        return told | (report.to_json(self.report) if self.report is not None else {})


class Reconciler:
    """One fleet's passes. Belongs to one event loop.

    `declaring` is held by whoever changes the fleet's files, until all that goes with the change is done; a plan is
    made while nobody holds it. `register` takes the daemons' keys, on a pass's thread; `applied` is awaited after each.
    `rejected` are the targets that did not become what the last pass wanted, with the generation they refused.
    """

    def __init__(self, fleet_file: Path, *, register: RegisterKeys, applied: Callable[[], Awaitable[object]]) -> None:
        self.fleet_file = fleet_file
        self.declaring = asyncio.Lock()
        self._register, self._applied = register, applied
        self._one_at_a_time = asyncio.Lock()
        self._brake = Brake()
        self._passes: set[asyncio.Task[Pass]] = set()
        self.rejected: Mapping[str, str | None] = {}

    async def plan(self, *, only: Collection[str] | None = None, allow_deletes: bool = False) -> Planned:
        """See `reconcile.fleet.plan_fleet`."""
        async with self.declaring:
            return await on_thread(
                "plan", lambda: fleet.plan_fleet(self.fleet_file, only=only, allow_deletes=allow_deletes)
            )

    def start(
        self,
        *,
        only: Collection[str] | None = None,
        allow_deletes: bool = False,
        unless: Callable[[Planned], str | None],
        then: Callable[[Pass], Awaitable[None]],
    ) -> asyncio.Task[Pass]:
        """Begin a pass, after those that were begun before; it goes on when nobody waits for it.

        `unless` may say, of the plan that was made, why it is not to be applied; `then` is told what came of it.
        """
        work = self._alone(only=only, allow_deletes=allow_deletes, unless=unless, then=then)
        task = asyncio.create_task(work, name="pass")
        self._passes.add(task)
        task.add_done_callback(self._passes.discard)
        return task

    async def close(self) -> None:
        """Let what runs finish the machines in hand, for CLOSE_S."""
        self._brake.pull()
        if self._passes:
            await asyncio.wait(self._passes, timeout=CLOSE_S)
        for task in list(self._passes):
            task.cancel()

    async def _alone(
        self,
        *,
        only: Collection[str] | None,
        allow_deletes: bool,
        unless: Callable[[Planned], str | None],
        then: Callable[[Pass], Awaitable[None]],
    ) -> Pass:
        async with self._one_at_a_time:
            done = await self._pass(only=only, allow_deletes=allow_deletes, unless=unless)
            if done.report is not None:
                well = {outcome.target for outcome in done.report.having(Result.APPLIED, Result.UNCHANGED)}
                before = {name: digest for name, digest in self.rejected.items() if name not in well}
                self.rejected = before | done.rejected
            await self._applied()
            await then(done)
        return done

    async def _pass(
        self, *, only: Collection[str] | None, allow_deletes: bool, unless: Callable[[Planned], str | None]
    ) -> Pass:
        stale = ""
        for _ in range(MAX_STALE):
            try:
                planned = await self.plan(only=only, allow_deletes=allow_deletes)
            except UsageError:
                raise
            except FleetError as problem:
                return Pass(result=result_of(problem), problem=str(problem))
            wanted = {target.name: target.desired for target in planned.plan.targets}
            summary = show.summary(planned.plan)
            if (why := unless(planned)) is not None:
                return Pass(result=REFUSED, problem=why, summary=summary, wanted=wanted)
            try:
                done = await on_thread("apply", lambda planned=planned: self._apply(planned))  # type: ignore[misc] # bound now
            except StalePlan as problem:
                stale = str(problem)
                continue  # somebody applied between the look and the leases
            except (RolloutFailed, RolloutReverted) as failed:
                return Pass(
                    result=STOPPED if failed.report.interrupted else result_of(failed),
                    problem=str(failed),
                    summary=summary,
                    report=failed.report,
                    wanted=wanted,
                )
            except FleetError as problem:
                return Pass(result=result_of(problem), problem=str(problem), summary=summary, wanted=wanted)
            touched = done.having(Result.APPLIED)
            return Pass(result=APPLIED if touched else UNCHANGED, summary=summary, report=done, wanted=wanted)
        return Pass(result=BUSY, problem=stale)

    def _apply(self, planned: Planned) -> ApplyReport:
        return fleet.apply_plan(planned, holder=HOLDER, on_event=_told, register_keys=self._register, brake=self._brake)


def result_of(problem: FleetError) -> str:
    """A refusal's or failure's word, as `Pass.result` and as a problem's code."""
    match problem:
        case SpecInvalid():
            return UNSOUND
        case LeaseHeld():
            return BUSY
        case Protected():
            return "protected"
        case Refused():
            return REFUSED
        case RolloutReverted():
            return ROLLED_BACK
        case _:
            return FAILED


def _told(event: Event) -> None:
    if event.kind in ("failed", "rolled_back", "unreachable", "keys"):
        _log.info("apply", kind=event.kind, target=event.target or None, text=event.text)


async def on_thread(name: str, work: Callable[[], T]) -> T:
    """Run `work` on a thread of its own that does not keep the process alive, and answer what it does."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(error: BaseException | None, value: T | None) -> None:
        if answer.done():
            return  # nobody waits any more
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(value)  # type: ignore[arg-type] # a value where there is no error

    def run() -> None:
        error, value = None, None
        try:
            value = work()
        except BaseException as raised:  # noqa: BLE001 - whatever it is, the one who waits gets it
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(settle, error, value)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await answer
