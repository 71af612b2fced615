"""Our side of `scripts/bench queue` through the store: what the control plane does for a task, without its HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import uvloop
import yaml
from bench_sample import HOME

from orchestrator_fleet.clock import SystemClock
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.rules import ANYTHING_GOES
from orchestrator_fleet.tasks.task import Ask, Grant, NewTask

SAMPLE: dict[str, Any] = yaml.safe_load((HOME / "fleet.yaml").read_text(encoding="utf-8"))
LINES: tuple[str, ...] = tuple(SAMPLE["orchestrators"])
LEASE_S = 30.0
ACTOR = "k-bench"
SPEC: dict[str, Any] = {"orchestrators": {line: {"discipline": "bench"} for line in LINES}, "routing": []}
T = TypeVar("T")


class Ours:
    """The one place here that knows how a task is made, claimed and finished."""

    def __init__(self, url: str) -> None:
        self.store = open_store(url)
        self._clock, self._dispatch = SystemClock(), Dispatch.of_spec(SPEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    async def create(self, number: int, line: str) -> None:
        """Make a task for a line."""
        new = NewTask(title=f"task {number}", orchestrator=line)
        order = life.Order(new=new, dispatch=self._dispatch, actor=ACTOR, now_us=self._clock.now_us())
        await self.store.write_batched(life.create_all, order)

    async def claim(self, line: str, limit: int) -> Sequence[Grant]:
        """Take up to `limit` tasks of a line."""
        ask = Ask(
            orchestrator=line,
            machine="m01",
            holder="bench/1",
            limit=limit,
            lease_s=LEASE_S,
            generation="g1",
            charter_version="c1",
            actor=ACTOR,
            rules=ANYTHING_GOES,
            now_us=self._clock.now_us(),
        )
        return (await self.store.write_batched(life.claim_all, ask)).grants

    async def finish(self, grant: Grant) -> None:
        """Report that it is done."""
        report = life.Report(
            task_id=grant.task.id,
            token=grant.token,
            outcome="done",
            retry_of=self._dispatch.retry,
            roll=0.5,
            actor=ACTOR,
            now_us=self._clock.now_us(),
        )
        await self.store.write_batched(life.finish_all, report)


def run(main: Coroutine[Any, Any, T]) -> T:
    """On the loop that `fleet serve` uses."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def create(ours: Ours, count: int, *, callers: int, lines: Sequence[str]) -> float:
    """Make `count` tasks, each caller one after the other; tasks a second."""

    async def caller(first: int) -> None:
        for number in range(first, count, callers):
            await ours.create(number, lines[number % len(lines)])

    return count / await _taken(caller, callers)


async def drain(ours: Ours, count: int, *, callers: int, lines: Sequence[str], batch: int = 1) -> float:
    """Claim and finish all that is queued, `batch` at a claim; tasks a second. Ends the benchmark when not `count`."""
    done = 0

    async def caller(number: int) -> None:
        nonlocal done
        line = lines[number % len(lines)]
        while grants := await ours.claim(line, batch):
            if batch == 1:
                await ours.finish(grants[0])
            else:
                await asyncio.gather(*(ours.finish(grant) for grant in grants))
            done += len(grants)

    taken = await _taken(caller, callers)
    if done != count:
        raise SystemExit(f"bench: {done} tasks were done, wanted {count}")
    return count / taken


async def alone(ours: Ours, count: int, lines: Sequence[str]) -> tuple[list[float], list[float]]:
    """One caller claims and finishes `count` tasks in turn; seconds that each claim and each finish took, sorted."""
    claims, ends = [], []
    for number in range(count):
        begun = time.perf_counter()
        (grant,) = await ours.claim(lines[number % len(lines)], 1)
        claimed = time.perf_counter()
        await ours.finish(grant)
        claims.append(claimed - begun)
        ends.append(time.perf_counter() - claimed)
    return sorted(claims), sorted(ends)


async def _taken(caller: Callable[[int], Awaitable[None]], callers: int) -> float:
    begun = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(callers)))
    return time.perf_counter() - begun


def sqlite_url(folder: Path, name: str) -> str:
    """A store that is not there yet."""
    return f"sqlite:///{folder / name}.sqlite"
